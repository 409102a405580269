"""Megatron-LM's indexed data set: a .bin of tokens and an .idx of lengths, read and written byte for byte.

Owns the format alone. This project's own shards are such files too (shards.py), so what is prepared here trains there
and the other way round. The layout of .idx, all little-endian: magic, version 1 (u64), type code (u8), number of
sequences (u64), number of document marks (u64); then per sequence its length (i32), per sequence its byte offset in
.bin (i64), and the sequence number at which each document starts, with the end (i64). From `IndexedDataset` in
Megatron-LM's megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trainwright.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
CODES = {np.dtype(name): code for code, name in TYPES.items()}


def token_type(vocab_size: int) -> np.dtype:
    """The type Megatron-LM stores ids of such a vocabulary in."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


class IndexedWriter:
    """Writes PREFIX.bin as documents come, and PREFIX.idx at the end. Each document is one sequence."""

    def __init__(self, prefix: str | Path, dtype: DTypeLike) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self._tokens = open(f"{prefix}.bin", "wb")  # noqa: SIM115  (closed by close)
        self._lengths: list[NDArray[np.int32]] = []

    def add(self, tokens: NDArray[np.integer], lengths: NDArray[np.integer]) -> None:
        """Adds documents that lie one after another in `tokens` [sum of lengths]."""
        self._tokens.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.append(np.asarray(lengths, dtype="<i4"))

    def close(self) -> None:
        self._tokens.close()
        lengths = np.concatenate([np.zeros(0, "<i4"), *self._lengths])
        write_index(f"{self.prefix}.idx", self.dtype, lengths, np.arange(len(lengths) + 1, dtype="<i8"))

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_index(path: str, dtype: np.dtype, lengths: NDArray[np.int32], documents: NDArray[np.int64]) -> None:
    """Writes an .idx: `lengths` of sequences in tokens, `documents` the sequence number of each start, and the end."""
    offsets = np.zeros(len(lengths), "<i8")
    np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    with open(path, "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, CODES[dtype], len(lengths), len(documents)))
        stream.write(np.ascontiguousarray(lengths, dtype="<i4").data)
        stream.write((offsets * dtype.itemsize).data)
        stream.write(np.ascontiguousarray(documents, dtype="<i8").data)


class IndexedFile:
    """An indexed data set, memory-mapped: `tokens` [all], and each document's start and length in it.

    Raises:
        UserError: the pair is no indexed data set, or .bin and .idx do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        path = Path(f"{prefix}.idx")
        header = path.open("rb").read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise UserError(f"{path} is no index of a Megatron data set: it does not start with MMIDIDX")
        _, version, code, sequences, marks = HEADER.unpack(header)
        if version != 1 or code not in TYPES or TYPES[code][-2] == "f":
            raise UserError(f"{path} has version {version} and token type {code}: version 1 of whole numbers is read")
        self.dtype = np.dtype(TYPES[code])
        if path.stat().st_size < HEADER.size + 12 * sequences + 8 * marks:
            raise UserError(f"{path} is cut short: {sequences} sequences do not fit into {path.stat().st_size} bytes")
        self._lengths = map_file(path, "<i4", HEADER.size, sequences)
        self._offsets = map_file(path, "<i8", HEADER.size + 4 * sequences, sequences)
        self._documents = map_file(path, "<i8", HEADER.size + 12 * sequences, marks)
        if (self._lengths < 0).any() or (self._offsets < 0).any() or (np.diff(self._documents, prepend=0) < 0).any():
            raise UserError(f"{path} is damaged: it holds lengths or places below zero")
        if marks > 1 and self._documents[-1] > sequences:
            raise UserError(f"{path} is damaged: it marks document {self._documents[-1]} of {sequences} sequences")
        size = Path(f"{prefix}.bin").stat().st_size
        end = int((self._offsets + self._lengths * self.dtype.itemsize).max()) if sequences else 0
        if end > size:
            raise UserError(f"{prefix}.bin has {size} bytes where its index needs {end}: it is cut short")

    @cached_property
    def tokens(self) -> NDArray[np.integer]:
        """Every token, in the stored type."""
        path = Path(f"{self.prefix}.bin")
        return map_file(path, self.dtype, 0, path.stat().st_size // self.dtype.itemsize)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each document starts in `tokens`."""
        first = self._first_sequences[:-1]
        offsets = np.append(self._offsets, len(self.tokens) * self.dtype.itemsize)
        return offsets[first] // self.dtype.itemsize

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        total = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])
        return np.diff(total[self._first_sequences])

    @property
    def _first_sequences(self) -> NDArray[np.int64]:
        """The sequence number of each document's start, and the end. Old files mark none: each sequence is one."""
        return self._documents if len(self._documents) > 1 else np.arange(len(self._lengths) + 1)

    def __len__(self) -> int:
        return len(self._first_sequences) - 1

    def __getitem__(self, document: int) -> NDArray[np.integer]:
        start = int(self.starts[document])
        return self.tokens[start : start + int(self.lengths[document])]


def join_indexed(prefixes: Sequence[str | Path], prefix: str | Path) -> None:
    """Writes the documents of several data sets as one: what `prepare` made as a single pair for Megatron-LM.

    Raises:
        UserError: they store tokens in different types.
    """
    files = [IndexedFile(each) for each in prefixes]
    kinds = {file.dtype for file in files}
    if len(kinds) != 1:
        raise UserError(
            f"{len(files)} data sets store tokens as {sorted(map(str, kinds))}: only one type can be joined"
        )
    with IndexedWriter(prefix, kinds.pop()) as writer:
        for file in files:
            writer.add(file.tokens, file.lengths)


def map_file(path: Path, dtype: DTypeLike, offset: int, count: int) -> NDArray:
    """Part of a file as an array that the system loads as it is read."""
    if count == 0:  # nothing cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r", offset, (count,))
