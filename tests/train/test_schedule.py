"""Exact values of every shape, and agreement with the implementation that most people use."""

import math

import pytest

from trainwright.errors import UserError
from trainwright.train.schedule import Schedule


def rates(kind, total=10, warmup=2.0, peak=1.0, minimum=0.0, decay=0.3):
    schedule = Schedule(kind, peak, minimum, total, warmup, decay)
    return [schedule.at(step) for step in range(total)]


def test_warmup_rises_from_the_first_step_and_meets_the_peak():
    assert rates("constant", warmup=4.0)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear():
    assert rates("linear") == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_cosine_with_a_minimum():
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert rates("cosine", minimum=0.1)[2:] == pytest.approx(expected)


def test_wsd_is_flat_then_falls():
    assert rates("wsd") == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])


def test_after_the_end_the_minimum_stays():
    for kind in ("cosine", "linear", "wsd"):
        assert Schedule(kind, 1.0, 0.25, 10, 0).at(10_000) == pytest.approx(0.25)


def test_shares_are_rounded_up_and_zero_is_none():
    assert Schedule("cosine", 1, 0, 10, 0.03).warmup_steps == 1
    assert Schedule("cosine", 1, 0, 10, 0).warmup_steps == 0
    assert rates("cosine", warmup=0.0)[0] == 1.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_agrees_with_transformers_after_the_warmup(kind):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=20)
    ours = rates(kind, total=20, warmup=3.0)
    for step in range(20):
        if step >= 3:
            assert ours[step] == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match=r"train.warmup=100 is longer than the run's 10 steps"):
        Schedule("cosine", 1, 0, 10, 100)
    with pytest.raises(UserError, match="more than the run's 10"):
        Schedule("wsd", 1, 0, 10, 8, 0.5)
