"""Rows: nothing lost, nothing twice, no row over its length, targets and boundaries right. By property."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.data.packing import (
    Rows,
    Selection,
    StreamCutter,
    best_fit,
    find_duplicates,
    fit_documents,
    pack_rows,
    pad_rows,
)
from trainwright.data.rows import PackedSource, RowSet, RowWriter
from trainwright.data.shards import IGNORED, Document, Shard, ShardWriter
from trainwright.errors import UserError

EOS, PAD = 1, 0
# A document: token ids (distinct from PAD) with, for each, whether it is trained.
documents = st.lists(
    st.lists(st.tuples(st.integers(2, 60000), st.booleans()), min_size=1, max_size=40), min_size=1, max_size=30
)


def write_shard(prefix: Path, docs: list[list[tuple[int, bool]]], stops: bool = False) -> Shard:
    writer = ShardWriter(prefix, np.dtype("<u2"))
    for number, doc in enumerate(docs):  # one at a time: bits of several calls must join
        ids, trained = zip(*doc, strict=True)
        stop = (len(ids) - 1,) if stops and number % 2 and len(ids) > 1 else ()
        writer.add([Document(list(ids), list(trained), number, stop, EOS)])
    writer.close()
    return Shard(prefix)


def row_set(folder: Path, shards: list[str], rows: list[Rows], seq_len: int, mask: bool) -> RowSet:
    with RowWriter(folder / "rows") as writer:
        for each in rows:
            writer.add(each)
    return RowSet(seq_len, PAD, mask, [PackedSource(folder / "rows", shards)], [1.0], None, "fingerprint")


def expected_targets(doc: list[tuple[int, bool]]) -> list[int]:
    """What each position of a lone document must predict."""
    return [token if trained else IGNORED for token, trained in doc[1:]] + [IGNORED]


@given(st.lists(st.integers(1, 64), max_size=200), st.integers(64, 100))
def test_best_fit_fills_no_row_over_its_capacity_and_wastes_little(lengths: list[int], capacity: int) -> None:
    rows = best_fit(np.array(lengths, np.int64), capacity)
    filled = np.bincount(rows, weights=lengths) if lengths else np.zeros(0)
    assert (filled <= capacity).all()
    assert sorted(set(rows.tolist())) == list(range(len(filled)))
    # two rows that are both at most half full would have been one
    assert (filled * 2 <= capacity).sum() <= 1


@given(documents, st.integers(8, 40), st.booleans())
def test_packed_rows_hold_each_document_once_as_if_alone(
    tmp_path_factory: pytest.TempPathFactory, docs: list[list[tuple[int, bool]]], seq_len: int, pack: bool
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    shard = write_shard(folder / "part", docs)
    counts: Counter[str] = Counter()
    segments = fit_documents(shard, 0, np.arange(len(docs)), seq_len, "truncate", counts)
    rows = row_set(
        folder, [str(folder / "part")], [pack_rows(segments, seq_len) if pack else pad_rows(segments)], seq_len, True
    )
    found = []
    if len(segments):
        arrays = rows.read(np.zeros(len(rows.sources[0]), np.int64), np.arange(len(rows.sources[0])))
        assert arrays.document_ids is not None
        for row, ids in enumerate(arrays.document_ids):
            assert (np.diff(ids[ids >= 0]) >= 0).all()
            assert (ids[(ids >= 0).sum() :] == -1).all()
            assert (arrays.input_ids[row][ids < 0] == PAD).all()
            assert (arrays.labels[row][ids < 0] == IGNORED).all()
            for document in range(ids.max() + 1):
                mine = ids == document
                assert arrays.position_ids[row][mine].tolist() == list(range(mine.sum()))
                found.append((arrays.input_ids[row][mine].tolist(), arrays.labels[row][mine].tolist()))
    cut = [doc[:seq_len] for doc in docs]
    wanted = [([token for token, _ in doc], expected_targets(doc)) for doc in cut if any(t for _, t in doc[1:])]
    assert sorted(found) == sorted(wanted)
    assert counts["untrained"] == len(docs) - len(wanted)


@given(st.lists(documents, min_size=1, max_size=3), st.integers(8, 40), st.booleans())
def test_a_stream_trains_each_token_once(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[list[tuple[int, bool]]]], seq_len: int, mask: bool
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    cutter = StreamCutter(seq_len, mask)
    rows = []
    for number, docs in enumerate(shards):
        shard = write_shard(folder / f"part-{number}", [[(token, True) for token, _ in doc] for doc in docs])
        rows.append(cutter.add(number, shard.starts, shard.lengths))
    rows.append(cutter.finish())
    prefixes = [str(folder / f"part-{number}") for number in range(len(shards))]
    made = row_set(folder, prefixes, rows, seq_len, mask)
    stream = [(token, begins) for docs in shards for doc in docs for token, begins in _with_begins(doc)]
    if len(stream) < 2:
        assert len(made.sources[0]) == 0
        return
    arrays = made.read(np.zeros(len(made.sources[0]), np.int64), np.arange(len(made.sources[0])))
    inputs, labels = arrays.input_ids.reshape(-1), arrays.labels.reshape(-1)
    tokens = [token for token, _ in stream]
    # a last token that stands alone in its row has no target, so that row is left out
    count = len(tokens) if len(tokens) % seq_len != 1 else len(tokens) - 1
    assert inputs[:count].tolist() == tokens[:count]
    wanted = [IGNORED if mask and begins else token for token, begins in stream[1:]]
    assert labels[: len(wanted)].tolist() == wanted
    assert (labels[len(wanted) :] == IGNORED).all()
    assert (inputs[count:] == PAD).all()
    if not mask:
        assert arrays.document_ids is None
        assert (arrays.position_ids == np.arange(seq_len)).all()
    else:
        assert arrays.document_ids is not None
        begins = np.array([begins for _, begins in stream[:count]] + [True] * (inputs.size - count))
        positions = arrays.position_ids.reshape(-1)[:count]
        assert (positions[begins[:count]] == 0).all()
        for row in range(len(arrays.input_ids)):
            ids = arrays.document_ids[row]
            inside = begins.reshape(arrays.input_ids.shape)[row][1:] & (ids[1:] >= 0)
            assert (np.diff(ids)[ids[1:] >= 0] == inside[ids[1:] >= 0]).all()


@given(documents, st.integers(8, 20))
def test_split_documents_lose_only_the_target_at_each_cut(
    tmp_path_factory: pytest.TempPathFactory, docs: list[list[tuple[int, bool]]], seq_len: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    docs = [[(token, True) for token, _ in doc] for doc in docs]
    shard = write_shard(folder / "part", docs)
    segments = fit_documents(shard, 0, np.arange(len(docs)), seq_len, "split", Counter())
    pieces = [doc[at : at + seq_len] for doc in docs for at in range(0, len(doc), seq_len)]
    assert segments["length"].tolist() == [len(piece) for piece in pieces if len(piece) > 1]
    read = [shard.tokens[start : start + length].tolist() for _, start, length in segments.tolist()]
    assert read == [[token for token, _ in piece] for piece in pieces if len(piece) > 1]


@given(documents)
def test_a_stop_is_predicted_in_place_of_the_token_that_follows(
    tmp_path_factory: pytest.TempPathFactory, docs: list[list[tuple[int, bool]]]
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    shard = write_shard(folder / "part", docs, stops=True)
    tokens, targets = shard.read(np.arange(len(shard.tokens)))
    wanted = []
    for number, doc in enumerate(docs):
        line = [token if trained else IGNORED for token, trained in doc]
        if number % 2 and len(doc) > 1:
            line[-1] = EOS
        wanted += line
    assert tokens.tolist() == [token for doc in docs for token, _ in doc]
    assert targets.tolist() == wanted


def test_what_is_too_long_is_counted_dropped_or_refused(tmp_path: Path) -> None:
    docs = [[(5, False)] * 6 + [(7, True)] * 6, [(5, False), (7, True)], [(5, False)] * 20 + [(7, True)]]
    shard = write_shard(tmp_path / "part", docs)
    everything = np.arange(3)
    counts: Counter[str] = Counter()
    assert fit_documents(shard, 0, everything, 8, "truncate", counts)["length"].tolist() == [8, 2]
    assert (counts["too_long"], counts["truncated_answers"], counts["untrained"]) == (2, 2, 1)
    counts.clear()
    assert fit_documents(shard, 0, everything, 8, "drop", counts)["length"].tolist() == [2]
    assert counts["too_long"] == 2
    with pytest.raises(UserError, match=r"21 tokens, data.seq_len=8"):
        fit_documents(shard, 0, everything, 8, "raise", counts)


def test_the_two_sides_of_a_split_share_nothing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "part", np.dtype("<u2"))
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, 2000, dtype=np.uint64)
    writer.add([Document([2, 3], None, int(each)) for each in hashes])
    writer.close()
    shard = Shard(tmp_path / "part")
    train = Selection(held_out=0.1).choose(shard, None, Counter())
    held_out = Selection(held_out=0.1, side="validation").choose(shard, None, Counter())
    assert sorted([*train, *held_out]) == list(range(2000))
    assert len(held_out) == pytest.approx(200, abs=50)


def test_duplicates_are_found_across_shards(tmp_path: Path) -> None:
    for name, hashes in (("a", [1, 2, 1]), ("b", [3, 2, 4])):
        writer = ShardWriter(tmp_path / name, np.dtype("<u2"))
        writer.add([Document([2, 3], None, each) for each in hashes])
        writer.close()
    found = find_duplicates([Shard(tmp_path / "a"), Shard(tmp_path / "b")])
    assert [each.tolist() for each in found] == [[False, False, True], [False, True, False]]
    counts: Counter[str] = Counter()
    assert Selection().choose(Shard(tmp_path / "a"), found[0], counts).tolist() == [0, 1]
    assert counts["dropped_duplicate"] == 1


def _with_begins(doc: list[tuple[int, bool]]) -> list[tuple[int, bool]]:
    return [(token, at == 0) for at, (token, _) in enumerate(doc)]
