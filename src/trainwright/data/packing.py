"""Which tokens stand in which row: documents packed, padded or streamed into rows of `seq_len`.

Owns the arithmetic, on lengths alone; no token is touched. A row is a list of segments, each a stretch of one shard.
Filters on tokens, duplicates, the held-out split and the too-long policy act here, so changing them or `seq_len`
never tokenizes again. Reading rows is in rows.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainwright.data.shards import Shard
from trainwright.errors import UserError

# A stretch of `length` tokens from token `start` of shard number `shard`.
SEGMENT = np.dtype([("shard", "<i4"), ("start", "<i8"), ("length", "<i4")])
WINDOW = 1 << 17  # documents packed together: more fill rows better, fewer need less memory

TooLong = Literal["truncate", "drop", "split", "raise"]


class Rows(NamedTuple):
    """Rows as segments: those of row r are segments[counts[:r].sum() :][: counts[r]]."""

    segments: NDArray
    counts: NDArray[np.int64]


class Selection(NamedTuple):
    """Which documents take part. `held_out`: the share whose hashes are lowest; `side` says which side is wanted."""

    min_tokens: int = 0
    max_tokens: int | None = None
    held_out: float = 0.0
    side: Literal["train", "validation"] = "train"

    def choose(self, shard: Shard, duplicate: NDArray[np.bool_] | None, counts: Counter[str]) -> NDArray[np.int64]:
        """Numbers of the documents of `shard` that take part; `duplicate` marks those whose text came before."""
        lengths = shard.lengths
        keep = (shard.records["hash"] < int(self.held_out * 2**64)) == (self.side == "validation")
        dropped = {
            "dropped_few_tokens": lengths < max(1, self.min_tokens),
            "dropped_many_tokens": lengths > (self.max_tokens or np.iinfo(np.int64).max),
            "dropped_duplicate": np.zeros(len(lengths), bool) if duplicate is None else duplicate,
        }
        for reason, unwanted in dropped.items():
            counts[reason] += int((keep & unwanted).sum())
            keep &= ~unwanted
        return np.flatnonzero(keep)


def find_duplicates(shards: Sequence[Shard]) -> list[NDArray[np.bool_]]:
    """For each shard, which documents have the text of one before. Needs 16 bytes a document while it runs."""
    hashes = np.concatenate(
        [shard.records["hash"] if shard.has_hashes else shard.records["hash"][:0] for shard in shards]
    )
    first = np.zeros(len(hashes), bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    found, at = [], 0
    for shard in shards:
        count = len(shard) if shard.has_hashes else 0
        found.append(~first[at : at + count] if shard.has_hashes else np.zeros(len(shard), bool))
        at += count
    return found


# ---- documents ----


def fit_documents(
    shard: Shard, number: int, chosen: NDArray[np.int64], seq_len: int, too_long: TooLong, counts: Counter[str]
) -> NDArray:
    """Segments of documents `chosen` of one shard, none longer than `seq_len`, none without a trained token.

    A token is trained from the one before it, so the first of a segment is never a target. `counts` gets the targets
    that are left.

    Raises:
        UserError: a document is too long and the policy is to raise.
    """
    starts, lengths, records = shard.starts[chosen], shard.lengths[chosen], shard.records[chosen]
    offsets = np.zeros(len(chosen), np.int64)
    long = lengths > seq_len
    counts["documents"] += len(chosen)
    counts["too_long"] += int(long.sum())
    if long.any() and too_long == "raise":
        raise UserError(
            f"a sample has {int(lengths.max())} tokens, data.seq_len={seq_len} is the limit: raise data.seq_len, "
            "or set data.too_long to truncate, drop or split"
        )
    if too_long == "drop":
        starts, lengths, records, offsets = starts[~long], lengths[~long], records[~long], offsets[~long]
    elif too_long == "split":
        pieces = -(-lengths // seq_len)
        offsets = (np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * seq_len
        starts, lengths, records = (np.repeat(each, pieces) for each in (starts, lengths, records))
    else:
        counts["truncated_answers"] += int((records["last"] >= seq_len).sum())
    fitted = np.minimum(lengths - offsets, seq_len)
    targets = records["trained"].astype(np.int64) - (records["first"] == 0)
    cut = fitted < lengths
    if cut.any():
        targets[cut] = shard.trained_in((starts + offsets)[cut] + 1, fitted[cut] - 1)
    trained = targets > 0
    counts["untrained"] += int((~trained).sum())
    counts["trained"] += int(targets.sum())
    segments = np.zeros(int(trained.sum()), SEGMENT)
    segments["shard"], segments["start"], segments["length"] = number, (starts + offsets)[trained], fitted[trained]
    return segments


def pad_rows(segments: NDArray) -> Rows:
    """One segment a row."""
    return Rows(segments, np.ones(len(segments), np.int64))


def pack_rows(segments: NDArray, seq_len: int) -> Rows:
    """Segments put together so that few rows of `seq_len` hold them all, longest first into the fullest row that fits.

    This is best-fit decreasing, of the first-fit family: never more than 11/9 of the best packing plus 4 rows
    (Johnson 1974), and on real lengths above 99% full.
    """
    rows = best_fit(segments["length"], seq_len)
    order = np.argsort(rows, kind="stable")
    return Rows(segments[order], np.bincount(rows, minlength=0))


def best_fit(lengths: NDArray[np.integer], capacity: int) -> NDArray[np.int64]:
    """The row of each item, such that no row holds more than `capacity`. Lengths are between 1 and capacity."""
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    rows = np.empty(len(lengths), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the space that is left
    spaces = 0  # bit s: some open row has exactly s left
    opened = 0
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces ^= 1 << space
        else:
            space, row, opened = capacity, opened, opened + 1
        rows[item] = row
        if space > length:
            open_rows[space - length].append(row)
            spaces |= 1 << (space - length)
    return rows


# ---- streams ----


class StreamCutter:
    """Cuts documents, one after another as they come, into rows of `seq_len` tokens and the one that follows.

    The token that follows is the target of the row's last token, so each token of the stream is a target once. With
    `document_mask`, a new document starts a new segment; without, segments break only where the shard does.
    """

    def __init__(self, seq_len: int, document_mask: bool) -> None:
        self.seq_len = seq_len
        self.document_mask = document_mask
        self._position = 0  # of the stream's end
        self._pending = np.zeros(0, SEGMENT)
        self._pending_rows = np.zeros(0, np.int64)

    def add(self, number: int, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Rows:
        """Rows that documents of shard `number` complete."""
        ends = self._position + np.cumsum(lengths)
        begins = ends - lengths
        if not len(ends):
            return Rows(np.zeros(0, SEGMENT), np.zeros(0, np.int64))
        first, end = self._position, int(ends[-1])
        borders = np.arange(-(-first // self.seq_len) * self.seq_len, end, self.seq_len)
        cuts = np.union1d(begins, borders)
        document = np.searchsorted(begins, cuts, side="right") - 1
        where = starts[document] + cuts - begins[document]
        rows = cuts // self.seq_len
        # the token at a border also ends the row before it
        ending = np.flatnonzero((cuts % self.seq_len == 0) & (cuts > 0))
        segments = np.zeros(len(cuts) + len(ending), SEGMENT)
        segments["shard"] = number
        segments["start"] = np.concatenate([where[ending], where])
        segments["length"] = np.concatenate([np.ones(len(ending), np.int64), np.diff(np.append(cuts, end))])
        row = np.concatenate([rows[ending] - 1, rows])
        position = np.concatenate([cuts[ending], cuts])
        documents = np.concatenate([document[ending], document])
        order = np.lexsort((position, row))
        segments, row, documents = segments[order], row[order], documents[order]
        self._position = end
        return self._complete(*self._merged(segments, row, documents))

    def _merged(self, segments: NDArray, row: NDArray, documents: NDArray) -> tuple[NDArray, NDArray]:
        """Joins segments of a row that touch in the shard, where nothing keeps them apart."""
        touching = segments["start"][1:] == segments["start"][:-1] + segments["length"][:-1]
        joined = touching & (row[1:] == row[:-1])
        if self.document_mask:
            joined &= documents[1:] == documents[:-1]
        keep = np.flatnonzero(np.append(True, ~joined))
        merged = segments[keep]
        merged["length"] = np.add.reduceat(segments["length"], keep)
        return merged, row[keep]

    def _complete(self, segments: NDArray, row: NDArray) -> Rows:
        """Rows that are complete: all but the one that the stream's last token stands in."""
        segments, row = np.concatenate([self._pending, segments]), np.concatenate([self._pending_rows, row])
        done = row < (self._position - 1) // self.seq_len
        self._pending, self._pending_rows = segments[~done], row[~done]
        return Rows(segments[done], np.bincount(row[done] - row[0]) if done.any() else np.zeros(0, np.int64))

    def finish(self) -> Rows:
        """The last row, which may be shorter. One token alone has no target and is left out."""
        segments, self._pending = self._pending, np.zeros(0, SEGMENT)
        if segments["length"].sum() < 2:
            return Rows(np.zeros(0, SEGMENT), np.zeros(0, np.int64))
        return Rows(segments, np.array([len(segments)]))
