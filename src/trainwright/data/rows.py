"""Rows of `seq_len` tokens out of memory-mapped shards, as arrays.

Owns reading: a row's segments gathered, targets shifted, padding, and the boundaries between documents. Which segments
make a row was decided by packing.py; which row comes when is in order.py; tensors are made in loader.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainwright.data.indexed import map_file
from trainwright.data.order import Order
from trainwright.data.packing import SEGMENT, Rows
from trainwright.data.shards import IGNORED, Shard

OFFSET = np.dtype("<i8")


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
    """The rows of one source: `prefix` is what RowWriter wrote, `shards` the prefixes of its shards."""

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

    def read(self, segments: NDArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens of segments and what is to be predicted at their places."""
        lengths = segments["length"].astype(np.int64)
        ends = np.cumsum(lengths)
        places = np.arange(ends[-1]) + np.repeat(segments["start"] - ends + lengths, lengths)
        numbers = segments["shard"]
        if (numbers == numbers[0]).all():
            return self.shard(int(numbers[0])).read(places)
        tokens, targets = np.empty_like(places), np.empty_like(places)
        of_token = np.repeat(numbers, lengths)
        for number in np.unique(numbers):
            mine = of_token == number
            tokens[mine], targets[mine] = self.shard(int(number)).read(places[mine])
        return tokens, targets


@dataclass
class RowSet:
    """Rows of several sources, and how they are mixed.

    `fingerprint` is of all that decides the rows, so a checkpoint can tell whether it goes on with the same data.
    `figures` has documents, tokens, trained tokens and so on of one pass, as `prepare` counted them.
    """

    sources: list[PackedSource]
    seq_len: int
    pad_id: int
    document_mask: bool
    epochs: list[float]
    weights: list[float] | None
    fingerprint: str
    figures: dict[str, int] = field(default_factory=dict)

    def order(self, seed: int, shuffle: bool) -> Order:
        return Order([len(source) for source in self.sources], self.epochs, self.weights, seed, shuffle)

    def __len__(self) -> int:
        """Rows in one epoch."""
        return self.order(0, False).rows_per_epoch

    def cursor(self, seed: int, shuffle: bool) -> RowCursor:
        """Rows by position in the endless order of `seed`."""
        return RowCursor(self, self.order(seed, shuffle))

    def read(self, sources: NDArray[np.int64], rows: NDArray[np.int64]) -> RowArrays:
        """Rows by source and number in it: arrays [B, S]."""
        arrays = self.empty(len(rows))
        for place, (source, row) in enumerate(zip(sources.tolist(), rows.tolist(), strict=True)):
            self._fill(arrays, place, source, row)
        return arrays

    def empty(self, count: int) -> RowArrays:
        """Rows of padding alone."""
        shape = (count, self.seq_len)
        return RowArrays(
            np.full(shape, self.pad_id, np.int64),
            np.full(shape, IGNORED, np.int64),
            np.zeros(shape, np.int64) if self.document_mask else np.tile(np.arange(self.seq_len), (count, 1)),
            np.full(shape, -1, np.int32) if self.document_mask else None,
        )

    def _fill(self, arrays: RowArrays, place: int, source: int, row: int) -> None:
        segments = self.sources[source].segments(row)
        tokens, targets = self.sources[source].read(segments)
        # A row of a stream brings the token that follows: it is a target only.
        inputs, labels = min(len(tokens), self.seq_len), min(len(tokens) - 1, self.seq_len)
        arrays.input_ids[place, :inputs] = tokens[:inputs]
        arrays.labels[place, :labels] = targets[1 : labels + 1]
        if arrays.document_ids is None:
            return
        lengths = segments["length"]
        ends = np.cumsum(lengths)
        arrays.document_ids[place, :inputs] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[:inputs]
        arrays.position_ids[place, :inputs] = (np.arange(ends[-1]) - np.repeat(ends - lengths, lengths))[:inputs]
        borders = ends[:-1] - 1  # the last token of a document does not predict the next document
        arrays.labels[place, borders[borders < self.seq_len]] = IGNORED


class RowCursor:
    """Reads rows at positions of one order. It has no state of its own: any position is reached at once."""

    def __init__(self, rows: RowSet, order: Order) -> None:
        self._rows = rows
        self._order = order

    def read(self, positions: NDArray[np.int64]) -> RowArrays:
        """The rows at `positions` [B]."""
        return self._rows.read(*self._order.locate(positions))
