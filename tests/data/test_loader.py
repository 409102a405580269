"""The loader: ranks share the order exactly, whatever their number; the state is a number and resumes at once."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainwright.data.loader import Loader
from trainwright.data.packing import SEGMENT, Rows, pad_rows
from trainwright.data.rows import PackedSource, RowSet, RowWriter
from trainwright.data.shards import Document, ShardWriter
from trainwright.errors import UserError

SEQ_LEN = 8


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> RowSet:
    """40 rows in two sources; the first token of a row is its number."""
    folder = tmp_path_factory.mktemp("rows")
    sources = []
    for source, numbers in enumerate((range(100, 125), range(200, 215))):
        shard = ShardWriter(folder / f"part-{source}", np.dtype("<u2"))
        shard.add([Document([number, *range(2, 2 + number % 6 + 1)], None, number) for number in numbers])
        shard.close()
        segments = np.zeros(len(numbers), SEGMENT)
        segments["length"] = [number % 6 + 2 for number in numbers]
        segments["start"] = np.cumsum(segments["length"]) - segments["length"]
        with RowWriter(folder / f"source-{source}") as writer:
            writer.add(pad_rows(segments))
        sources.append(PackedSource(folder / f"source-{source}", [str(folder / f"part-{source}")]))
    return RowSet(SEQ_LEN, 0, True, sources, [1.0, 1.0], None, "abc")


def numbers(loader: Loader, steps: int) -> list[list[int]]:
    """The row numbers of each micro batch."""
    found = [batch.input_ids[:, 0].tolist() for batch in itertools.islice(loader, steps)]
    loader.close()
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    runs=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4
    ),
    seed=st.integers(0, 100),
)
def test_any_sequence_of_world_sizes_trains_the_order_of_one_process(
    rows: RowSet, runs: list[tuple[int, int, int, int]], seed: int
) -> None:
    """Each run (ranks, micro batch, accumulation, steps) goes on from the state of the one before. Together they
    train exactly the rows that one process would: nothing lost, nothing twice, and step by step the same."""
    state = Loader(rows, micro_batch_size=1, seed=seed).state_dict()
    trained: list[int] = []
    for world, micro, accumulation, steps in runs:
        per_rank = []
        for rank in range(world):
            loader = Loader(
                rows, micro_batch_size=micro, rank=rank, world_size=world, accumulation=accumulation, seed=999
            )
            loader.load_state_dict(state)
            per_rank.append(numbers(loader, steps * accumulation))
            after = loader.state_dict()
        for micro_batches in zip(*per_rank, strict=True):  # of all ranks at one time
            trained += [number for batch in micro_batches for number in batch]
        state = after
        assert state["consumed_rows"] == len(trained)
    alone = Loader(rows, micro_batch_size=1, seed=seed)
    assert trained == [batch[0] for batch in numbers(alone, len(trained))]
    for start in range(0, len(trained) - 39, 40):
        assert len(set(trained[start : start + 40])) == 40


def test_state_is_of_what_was_handed_out_and_not_of_what_was_read_ahead(rows: RowSet) -> None:
    loader = Loader(rows, micro_batch_size=2, seed=1, prefetch=8)
    first = [next(loader).input_ids[:, 0].tolist() for _ in range(3)]
    state = loader.state_dict()
    rest = numbers(loader, 5)
    again = Loader(rows, micro_batch_size=2, seed=1)
    again.load_state_dict(state)
    assert numbers(again, 5) == rest
    assert state == {"consumed_rows": 6, "seed": 1, "fingerprint": "abc"}
    assert len(first) == 3


def test_resuming_far_away_reads_nothing_in_between(rows: RowSet) -> None:
    loader = Loader(rows, micro_batch_size=2)
    loader.load_state_dict({"consumed_rows": 10**15, "seed": 0, "fingerprint": "abc"})
    assert numbers(loader, 1)[0] == [row for batch in numbers(_at(rows, 10**15), 2) for row in batch]


def _at(rows: RowSet, consumed: int) -> Loader:
    loader = Loader(rows, micro_batch_size=1)
    loader.load_state_dict({"consumed_rows": consumed, "seed": 0, "fingerprint": "abc"})
    return loader


def test_other_data_than_the_checkpoints_are_refused(rows: RowSet) -> None:
    with pytest.raises(UserError, match="data changed since the checkpoint"):
        Loader(rows, micro_batch_size=1).load_state_dict({"consumed_rows": 0, "seed": 0, "fingerprint": "other"})


@pytest.mark.parametrize("world", [1, 3])
def test_one_pass_is_filled_with_padding_and_starts_again(rows: RowSet, world: int) -> None:
    """An evaluation: every rank has as many micro batches, every row comes once, the rest has no target."""
    per_rank = []
    for rank in range(world):
        loader = Loader(rows, micro_batch_size=3, rank=rank, world_size=world, shuffle=False, accumulation=2, epochs=1)
        for _ in range(2):
            batches = list(loader)
        loader.close()
        per_rank.append(batches)
    assert len({len(batches) for batches in per_rank}) == 1
    assert len(per_rank[0]) % 2 == 0
    seen = [row for batches in per_rank for batch in batches for row in batch.input_ids[:, 0].tolist()]
    assert sorted(row for row in seen if row) == [*range(100, 125), *range(200, 215)]
    for batches in per_rank:
        for batch in batches:
            assert (batch.labels[batch.input_ids[:, 0] == 0] == -100).all()


def test_a_batch_is_what_the_contract_says(rows: RowSet) -> None:
    loader = Loader(rows, micro_batch_size=4, shuffle=False)
    batch = next(loader)
    loader.close()
    assert [each.dtype for each in batch if each is not None] == [torch.int64, torch.int64, torch.int64, torch.int32]
    assert batch.input_ids[0].tolist() == [100, 2, 3, 4, 5, 6, 0, 0]
    assert batch.labels[0].tolist() == [2, 3, 4, 5, 6, -100, -100, -100]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert batch.document_ids is not None
    assert batch.document_ids[0].tolist() == [0, 0, 0, 0, 0, 0, -1, -1]
    assert loader.take_wait_seconds() > 0
    assert loader.take_wait_seconds() == 0


def test_a_failure_while_reading_ahead_reaches_the_caller(rows: RowSet, tmp_path: Path) -> None:
    broken = RowSet(
        SEQ_LEN, 0, True, [PackedSource(rows.sources[0].prefix, [str(tmp_path / "gone")])], [1.0], None, "abc"
    )
    with pytest.raises(FileNotFoundError):
        next(Loader(broken, micro_batch_size=1))


def test_rows_with_several_shards_are_gathered(tmp_path: Path) -> None:
    for name, tokens in (("a", [5, 6, 7]), ("b", [8, 9])):
        shard = ShardWriter(tmp_path / name, np.dtype("<u2"))
        shard.add([Document(tokens, None, 0)])
        shard.close()
    segments = np.array([(1, 0, 2), (0, 0, 3)], SEGMENT)
    with RowWriter(tmp_path / "rows") as writer:
        writer.add(Rows(segments, np.array([2])))
    source = PackedSource(tmp_path / "rows", [str(tmp_path / "a"), str(tmp_path / "b")])
    arrays = RowSet(6, 0, True, [source], [1.0], None, "").read(np.array([0]), np.array([0]))
    assert arrays.input_ids[0].tolist() == [8, 9, 5, 6, 7, 0]
    assert arrays.labels[0].tolist() == [9, -100, 6, 7, -100, -100]
