"""The order: bijections, epochs and weights, by property."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainwright.data.order import Mix, Order, Permutation


@given(st.integers(1, 3000), st.integers(0, 2**40))
def test_a_permutation_is_one(count: int, key: int) -> None:
    assert sorted(Permutation(count, key)(np.arange(count)).tolist()) == list(range(count))


def test_a_permutation_mixes() -> None:
    """Neighbours do not stay neighbours, and every place is about equally likely."""
    images = np.stack([Permutation(64, seed)(np.arange(64)) for seed in range(500)])
    assert (np.abs(np.diff(images, axis=1)) == 1).mean() < 0.06  # 2/64 by chance
    counts = np.stack([np.bincount(images[:, place], minlength=64) for place in range(64)])
    assert counts.min() >= 0
    assert abs(counts.std() - np.sqrt(500 / 64)) < 0.5


def test_a_permutation_needs_no_memory_for_its_range() -> None:
    images = Permutation(10**15, "large")(np.arange(1000))
    assert len(set(images.tolist())) == 1000
    assert images.max() > 10**14


@given(
    st.lists(st.tuples(st.integers(1, 60), st.sampled_from([0.5, 1.0, 2.0, 3.0])), min_size=1, max_size=4),
    st.integers(0, 5),
    st.booleans(),
)
def test_an_epoch_has_each_row_as_often_as_asked(sources: list[tuple[int, float]], seed: int, shuffle: bool) -> None:
    counts, epochs = [count for count, _ in sources], [passes for _, passes in sources]
    order = Order(counts, epochs, None, seed, shuffle)
    assert order.rows_per_epoch == sum(max(1, round(count * passes)) for count, passes in sources)
    for epoch in range(2):
        start = epoch * order.rows_per_epoch
        chosen, rows = order.locate(np.arange(start, start + order.rows_per_epoch))
        for source, (count, passes) in enumerate(sources):
            times = np.bincount(rows[chosen == source], minlength=count)
            assert times.sum() == max(1, round(count * passes))
            assert times.max() - times.min() <= 1 + (epoch > 0 and passes * count % 1 != 0)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 10)), min_size=2, max_size=4),
    st.integers(0, 3),
    st.integers(1, 5000),
)
def test_a_weighted_mix_keeps_its_shares_and_goes_round(
    sources: list[tuple[int, float]], seed: int, length: int
) -> None:
    counts, weights = [count for count, _ in sources], [weight for _, weight in sources]
    order = Order(counts, [1.0] * len(counts), weights, seed, True)
    chosen, rows = order.locate(np.arange(length))
    for source, count in enumerate(counts):
        drawn = rows[chosen == source]
        share = length * weights[source] / sum(weights)
        assert (
            abs(len(drawn) - share) <= Mix(weights, seed).block * weights[source] / sum(weights) + 2
        )  # within its block
        whole = len(drawn) // count * count
        for at in range(0, whole, count):
            assert sorted(drawn[at : at + count].tolist()) == list(range(count))


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=4), st.integers(0, 5000))
def test_a_mix_knows_what_it_has_drawn(weights: list[float], position: int) -> None:
    mix = Mix(weights, 0)
    sources, draws = mix.locate(np.arange(position))
    assert mix.drawn(position).tolist() == np.bincount(sources, minlength=len(weights)).tolist()
    for source in range(len(weights)):
        assert draws[sources == source].tolist() == list(range((sources == source).sum()))


@given(st.integers(0, 10), st.integers(0, 10**9), st.booleans())
def test_any_position_is_reached_at_once(seed: int, position: int, weighted: bool) -> None:
    """What is found one by one is what is found together: nothing depends on what came before."""
    order = Order([7, 30], [1.0, 2.0], [1.0, 3.0] if weighted else None, seed, True)
    together = order.locate(np.arange(position, position + 20))
    for at in range(20):
        alone = order.locate(np.array([position + at]))
        assert (alone[0][0], alone[1][0]) == (together[0][at], together[1][at])


def test_seeds_and_epochs_differ() -> None:
    order, other = (Order([100], [1.0], None, seed, True) for seed in (0, 1))
    first, second = order.locate(np.arange(100))[1], order.locate(np.arange(100, 200))[1]
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.locate(np.arange(100))[1].tolist()


def test_without_shuffle_rows_come_in_order() -> None:
    chosen, rows = Order([2, 3], [1.0, 1.0], None, 0, False).locate(np.arange(10))
    assert chosen.tolist() == [0, 0, 1, 1, 1] * 2
    assert rows.tolist() == [0, 1, 0, 1, 2] * 2


# fmt: off
GOLDEN = [
    (1, 2), (0, 1), (0, 2), (1, 4), (1, 8), (0, 0), (1, 1),
    (0, 4), (1, 3), (1, 6), (1, 7), (0, 3), (1, 0), (1, 5),
]
# fmt: on


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    """Resuming a run under a newer release must go on with the same rows."""
    chosen, rows = Order([5, 9], [1.0, 1.0], None, 3, True).locate(np.arange(14))
    assert list(zip(chosen.tolist(), rows.tolist(), strict=True)) == GOLDEN
