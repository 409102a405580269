"""Rows of `seq_len` tokens out of memory-mapped shards, as arrays.

Owns reading: a row's segments gathered, targets shifted, padding, and the boundaries between documents. Which segments
make a row was decided by packing.py; which row comes when is in order.py; tensors are made in loader.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainwright.data.indexed import map_file
from trainwright.data.order import Order
from trainwright.data.packing import SEGMENT, Rows
from trainwright.data.shards import IGNORED, Shard

OFFSET = np.dtype("<i8")
LOCATED = 256  # positions whose rows are found together, which costs little more than one


class RowArrays(NamedTuple):
    """Rows [B, S]. `labels[b, t]` is what position t must predict, IGNORED where nothing; `document_ids` is -1 on
    padding, None when documents are not kept apart."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    document_ids: NDArray[np.int32] | None


class RowWriter:
    """Writes rows as they are packed: PREFIX.segments, and PREFIX.rows with the number of each row's first segment."""

    def __init__(self, prefix: str | Path) -> None:
        self._segments = open(f"{prefix}.segments", "wb")  # noqa: SIM115  (closed by __exit__)
        self._rows = open(f"{prefix}.rows", "wb")  # noqa: SIM115
        self._written = 0
        self.rows = 0
        self.tokens = 0

    def add(self, rows: Rows) -> None:
        ends = self._written + np.cumsum(rows.counts)
        self._segments.write(np.ascontiguousarray(rows.segments).data)
        self._rows.write((ends - rows.counts).astype(OFFSET).data)
        self._written += len(rows.segments)
        self.rows += len(rows.counts)
        self.tokens += int(rows.segments["length"].sum())

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.write(np.array([self._written], OFFSET).data)
        self._rows.close()
        self._segments.close()


class PackedSource:
    """The rows of one source, on disk as RowWriter wrote them, over `shards`, the prefixes of its shards."""

    def __init__(self, prefix: str | Path, shards: Sequence[str]) -> None:
        self.prefix = str(prefix)
        self.shards = list(shards)
        self._open: dict[int, Shard] = {}

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        path = Path(f"{self.prefix}.rows")
        return map_file(path, OFFSET, 0, path.stat().st_size // OFFSET.itemsize)

    @cached_property
    def _segments(self) -> NDArray:
        return map_file(Path(f"{self.prefix}.segments"), SEGMENT, 0, int(self._starts[-1]))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def segments(self, row: int) -> NDArray:
        """The segments of a row, in order."""
        return self._segments[self._starts[row] : self._starts[row + 1]]

    def shard(self, number: int) -> Shard:
        if number not in self._open:
            self._open[number] = Shard(self.shards[number])
        return self._open[number]


class HeldRows(PackedSource):
    """Rows in memory, as packing.py made them, over shards that are open already."""

    def __init__(self, rows: Rows, shards: Sequence[Shard]) -> None:
        super().__init__("", [shard.prefix for shard in shards])
        self._open = dict(enumerate(shards))
        self.__dict__["_starts"] = np.concatenate([[0], np.cumsum(rows.counts)])
        self.__dict__["_segments"] = rows.segments


@dataclass
class RowShape:
    """How rows are laid out as arrays. `document_mask`: the documents of a row do not see each other."""

    seq_len: int
    pad_id: int
    document_mask: bool

    def empty(self, count: int) -> RowArrays:
        """Rows of padding alone."""
        shape = (count, self.seq_len)
        return RowArrays(
            np.full(shape, self.pad_id, np.int64),
            np.full(shape, IGNORED, np.int64),
            np.zeros(shape, np.int64) if self.document_mask else np.tile(np.arange(self.seq_len), (count, 1)),
            np.full(shape, -1, np.int32) if self.document_mask else None,
        )

    def gather(self, sources: Sequence[PackedSource], rows: Sequence[int]) -> RowArrays:
        """Row rows[b] of sources[b] for each b: arrays [B, S]. All of them are read together, without a loop over
        documents, so short documents cost no more than long ones."""
        per_row = [source.segments(row) for source, row in zip(sources, rows, strict=True)]
        counts = np.array([len(segments) for segments in per_row])
        segments = np.concatenate(per_row)
        lengths = segments["length"].astype(np.int64)
        ends = np.cumsum(lengths)
        begins = ends - lengths  # of each segment among all tokens read
        first = np.cumsum(counts) - counts  # segment of each row
        row_lengths = np.add.reduceat(lengths, first)

        token = np.arange(ends[-1])
        row = np.repeat(np.arange(len(rows)), row_lengths)
        column = token - np.repeat(begins[first], row_lengths)
        tokens, targets = _read_segments(
            sources, counts, segments, token + np.repeat(segments["start"] - begins, lengths)
        )

        arrays = self.empty(len(rows))
        if arrays.document_ids is not None:
            targets[begins] = IGNORED  # a document's first token is not predicted from the document before
        # A row of a stream brings the token that follows: it is a target only.
        kept = slice(None) if row_lengths.max() <= self.seq_len else column < self.seq_len
        arrays.input_ids[row[kept], column[kept]] = tokens[kept]
        follows = column > 0
        arrays.labels[row[follows], column[follows] - 1] = targets[follows]
        if arrays.document_ids is not None:
            number = np.arange(len(segments), dtype=np.int32) - np.repeat(first, counts).astype(np.int32)
            arrays.document_ids[row[kept], column[kept]] = np.repeat(number, lengths)[kept]
            arrays.position_ids[row[kept], column[kept]] = (token - np.repeat(begins, lengths))[kept]
        return arrays


def _read_segments(
    sources: Sequence[PackedSource], counts: NDArray[np.int64], segments: NDArray, places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and targets at `places` [sum of lengths]: counts[b] of the segments are in shards of sources[b]."""
    distinct = list(dict.fromkeys(sources))
    of_row = np.array([distinct.index(source) for source in sources])
    files = np.repeat(of_row, counts) << 32 | segments["shard"]
    if (files == files[0]).all():
        return sources[0].shard(int(segments["shard"][0])).read(places)
    tokens, targets = np.empty_like(places), np.empty_like(places)
    of_token = np.repeat(files, segments["length"])
    for file in np.unique(files):
        mine = of_token == file
        tokens[mine], targets[mine] = distinct[int(file >> 32)].shard(int(file & 0xFFFFFFFF)).read(places[mine])
    return tokens, targets


@dataclass
class RowSet(RowShape):
    """Rows of several sources, all on disk, and how they are mixed.

    `fingerprint` is of all that decides the rows, so a checkpoint can tell whether it goes on with the same data.
    `figures` has documents, tokens, trained tokens and so on of one pass, as `arrange` counted them.
    """

    sources: list[PackedSource]
    epochs: list[float]
    weights: list[float] | None
    fingerprint: str
    figures: dict[str, int] = field(default_factory=dict)

    def order(self, seed: int, shuffle: bool) -> Order:
        return Order([len(source) for source in self.sources], self.epochs, self.weights, seed, shuffle)

    def __len__(self) -> int:
        """Rows in one epoch."""
        return self.order(0, False).rows_per_epoch

    def cursor(self, seed: int, shuffle: bool, state: dict[str, Any] | None = None) -> RowCursor:
        """Rows by position in the endless order of `seed`. There is no state to go on from: it is given as none."""
        return RowCursor(self, self.order(seed, shuffle))

    def read(self, sources: NDArray[np.int64], rows: NDArray[np.int64]) -> RowArrays:
        """Rows by source and number in it: arrays [B, S]."""
        return self.gather([self.sources[source] for source in sources.tolist()], rows.tolist())


class RowCursor:
    """Reads rows at positions of one order. It has no state of its own: any position is reached at once."""

    def __init__(self, rows: RowSet, order: Order) -> None:
        self._rows = rows
        self._order = order
        self._block = lru_cache(maxsize=4)(self._locate)

    def read(self, positions: NDArray[np.int64]) -> RowArrays:
        """The rows at `positions` [B]."""
        blocks, places = np.divmod(positions, LOCATED)
        found = np.empty((2, len(positions)), np.int64)
        for block in np.unique(blocks):
            mine = blocks == block
            found[:, mine] = self._block(int(block))[:, places[mine]]
        return self._rows.read(found[0], found[1])

    def state(self, position: int) -> dict[str, Any]:
        """What has to be known to go on at `position`, besides the number: nothing."""
        return {}

    def close(self) -> None:
        """Nothing runs in the background."""

    def _locate(self, block: int) -> NDArray[np.int64]:
        return np.stack(self._order.locate(np.arange(block * LOCATED, (block + 1) * LOCATED)))
