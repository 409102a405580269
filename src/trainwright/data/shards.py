"""Tokenized documents on disk: Megatron's file pair, and beside it what training needs of each token and document.

Owns one shard: PREFIX.bin and PREFIX.idx (indexed.py), PREFIX.docs with a `DOCUMENT` record each, PREFIX.trained with
one bit a token (absent: every token is trained), PREFIX.stops with the places whose target is not their own token
(absent: none). A shard is memory-mapped, so reading costs no memory of its own. Which documents go into which row is in
packing.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainwright.data.indexed import IndexedFile, IndexedWriter, map_file

IGNORED = -100  # the target of a token that is not trained
ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)  # in each byte

# hash: of the text; equal texts are duplicates. first, last: places of the first and last trained token, -1 for none.
# trained: how many tokens are trained.
DOCUMENT = np.dtype([("hash", "<u8"), ("first", "<i4"), ("last", "<i4"), ("trained", "<i4")])
# place: of a token in the shard. target: what is to be predicted there instead of the token.
STOP = np.dtype([("place", "<i8"), ("target", "<i4")])


class Document(NamedTuple):
    """One document as tokens. `trained` None: every token. `stops`: places in it that are to be predicted as `eos`."""

    ids: list[int]
    trained: list[bool] | None
    hash: int
    stops: tuple[int, ...] = ()
    eos: int = IGNORED


class ShardWriter:
    """Writes a shard document by document. Only the records of its documents are held in memory.

    `documents`, `tokens` and `max_id` are figures of what was added.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix = str(prefix)
        self.documents = self.tokens = self.max_id = 0
        self._indexed = IndexedWriter(prefix, dtype)
        self._bits = open(f"{prefix}.trained", "wb")  # noqa: SIM115  (closed by close)
        self._pending = np.zeros(0, bool)
        self._records: list[NDArray] = []
        self._stops: list[tuple[int, int]] = []
        self._all_trained = True

    def add(self, documents: Sequence[Document]) -> None:
        """Adds documents, at least one and none of them empty."""
        lengths = np.fromiter((len(document.ids) for document in documents), np.int64, len(documents))
        ids = chain.from_iterable(document.ids for document in documents)
        tokens = np.fromiter(ids, np.int32, lengths.sum())
        records = np.zeros(len(documents), DOCUMENT)
        records["hash"] = [document.hash for document in documents]
        records["last"], records["trained"] = lengths - 1, lengths
        flags = np.ones(len(tokens), bool)
        start = 0
        for number, (document, length) in enumerate(zip(documents, lengths.tolist(), strict=True)):
            if document.trained is not None:
                self._all_trained = False
                mask = flags[start : start + length]
                mask[:] = np.frombuffer(bytes(document.trained), bool)
                mask[list(document.stops)] = True
                places = np.flatnonzero(mask)
                first, last = (places[0], places[-1]) if len(places) else (-1, -1)
                records[number] = (document.hash, first, last, len(places))
            self._stops += [(self.tokens + start + place, document.eos) for place in document.stops]
            start += length
        self.documents += len(documents)
        self.tokens += len(tokens)
        self.max_id = max(self.max_id, int(tokens.max()))
        self._indexed.add(tokens, lengths)
        self._records.append(records)
        self._write_bits(flags)

    def _write_bits(self, flags: NDArray[np.bool_]) -> None:
        self._pending = np.concatenate([self._pending, flags])
        whole = len(self._pending) // 8 * 8
        self._bits.write(np.packbits(self._pending[:whole]).data)
        self._pending = self._pending[whole:]

    def close(self) -> None:
        """Writes what is left; the shard is whole only then."""
        self._indexed.close()
        self._bits.write(np.packbits(self._pending).data)
        self._bits.close()
        if self._all_trained:
            Path(f"{self.prefix}.trained").unlink(missing_ok=True)
        np.concatenate([np.zeros(0, DOCUMENT), *self._records]).tofile(f"{self.prefix}.docs")
        if self._stops:
            np.array(self._stops, STOP).tofile(f"{self.prefix}.stops")


class Shard(IndexedFile):
    """A shard, or a Megatron data set as it is: then every token is trained and no text has a hash."""

    @cached_property
    def has_hashes(self) -> bool:
        return Path(f"{self.prefix}.docs").exists()

    @cached_property
    def records(self) -> NDArray:
        """A `DOCUMENT` record for each document. Without texts, hashes are spread evenly over the documents."""
        if self.has_hashes:
            return map_file(Path(f"{self.prefix}.docs"), DOCUMENT, 0, len(self))
        records = np.zeros(len(self), DOCUMENT)
        records["hash"] = np.arange(1, len(self) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        records["last"], records["trained"] = self.lengths - 1, self.lengths
        return records

    @cached_property
    def _bits(self) -> NDArray[np.uint8] | None:
        path = Path(f"{self.prefix}.trained")
        return map_file(path, np.uint8, 0, path.stat().st_size) if path.exists() else None

    @cached_property
    def _stops(self) -> NDArray | None:
        path = Path(f"{self.prefix}.stops")
        return map_file(path, STOP, 0, path.stat().st_size // STOP.itemsize) if path.exists() else None

    def trained_in(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens of each stretch [start, start + length) are trained."""
        if self._bits is None:
            return lengths
        whole = np.concatenate([[0], np.cumsum(ONES[self._bits])])
        padded = np.append(self._bits, np.uint8(0))

        def before(places: NDArray[np.int64]) -> NDArray[np.int64]:
            return whole[places >> 3] + ONES[padded[places >> 3] & (0xFF00 >> (places & 7)) & 0xFF]

        return before(starts + lengths) - before(starts)

    def read(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens at `places`, and what is to be predicted there: the token, EOS, or IGNORED."""
        tokens = self.tokens[places].astype(np.int64)
        if self._bits is None:
            return tokens, tokens.copy()
        trained = self._bits[places >> 3] >> (7 - (places & 7)).astype(np.uint8) & 1
        targets = np.where(trained, tokens, IGNORED)
        if self._stops is not None:
            at = np.searchsorted(self._stops["place"], places).clip(max=len(self._stops) - 1)
            stops = self._stops[at]
            targets = np.where(stops["place"] == places, stops["target"], targets)
        return tokens, targets
