"""The endless order in which rows are trained: a pure function from position to row.

Owns shuffling, epochs of a source and weighted mixing. Because any position is computed directly, the state of a run's
data is one number, resuming replays nothing, and the order knows nothing of ranks: rank r of any number takes its
positions. No list of rows is ever held, whatever their number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
ROUNDS = 6
BLOCK = 1024  # positions of a weighted mix that are laid out together


class Permutation:
    """A seeded bijection of range(count), computed index by index.

    A Feistel network over the next power of four, walked until it falls inside the range (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains", section 4: cycle walking). The range is at least a quarter of the domain,
    so a walk takes 4 steps at most on average.
    """

    def __init__(self, count: int, *key: object) -> None:
        self.count = count
        self._half = np.uint64(max(1, (max(0, count - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8")

    def __call__(self, indices: Indices) -> Indices:
        """The images of `indices`, each in range(count)."""
        values = self._mixed(indices.astype(np.uint64))
        while (outside := values >= self.count).any():
            values[outside] = self._mixed(values[outside])
        return values.astype(np.int64)

    def _mixed(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            # the finalizer of splitmix64 (Steele, Lea, Flood 2014) as round function
            mixed = right + key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & self._mask)
        return left << self._half | right


class Mix:
    """An endless mix of sources by weight: every stretch of positions has each source's share of it.

    Source i has had floor(W_i n) - floor(W_(i-1) n) draws in the first n positions at each block's border, W being
    cumulative shares: its share to within one. Inside a block, the order is a seeded shuffle.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.seed = seed
        self._shares = _cumulative_shares(weights)
        # long enough that no source's count in a block falls below zero by rounding
        self.block = max(BLOCK, int(4 * sum(weights) / min(weights)) + 1)
        self._pattern = lru_cache(maxsize=4)(self._lay_out)

    def locate(self, positions: Indices) -> tuple[Indices, Indices]:
        """For each position its source, and which draw from that source it is."""
        blocks, places = np.divmod(positions, self.block)
        sources, draws = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks):
            mine = blocks == block
            of_place, draw_of_place = self._pattern(int(block))
            sources[mine], draws[mine] = of_place[places[mine]], draw_of_place[places[mine]]
        return sources, draws

    def drawn(self, position: int) -> Indices:
        """How often each source was drawn before `position`."""
        block, place = divmod(position, self.block)
        return self._drawn(block * self.block) + np.bincount(
            self._pattern(block)[0][:place], minlength=len(self._shares)
        )

    def _lay_out(self, block: int) -> tuple[Indices, Indices]:
        before, after = self._drawn(block * self.block), self._drawn((block + 1) * self.block)
        of_slot = np.repeat(np.arange(len(before)), after - before)
        draw_of_slot = np.concatenate([np.arange(start, end) for start, end in zip(before, after, strict=True)])
        shuffled = of_slot[Permutation(self.block, self.seed, "mix", block)(np.arange(self.block))]
        ranked = np.empty_like(draw_of_slot)
        ranked[np.argsort(shuffled, kind="stable")] = draw_of_slot  # each source's draws stay in order
        return shuffled, ranked

    def _drawn(self, positions: int) -> Indices:
        """`drawn` at the border of a block."""
        return np.diff([0, *(int(share * positions) for share in self._shares)])


class Order:
    """Positions 0, 1, 2, ... without end to rows of several sources.

    Without weights, an epoch has `epochs[i] * counts[i]` rows of source i, all mixed; source i goes through its rows
    once before any comes again. With weights, source i has its share of every stretch of positions, and each source
    goes round at its own pace. The order is another one in each pass.

    Args:
        counts: rows of each source.
        epochs: passes over each source in one epoch; not used with weights.
        weights: shares of rows, in any unit, or None.
        seed, shuffle: without shuffle, rows come in order; a weighted mix interleaves them all the same.
    """

    def __init__(
        self, counts: Sequence[int], epochs: Sequence[float], weights: Sequence[float] | None, seed: int, shuffle: bool
    ) -> None:
        self.counts = list(counts)
        self.seed = seed
        self.shuffle = shuffle
        self._quotas = np.array([max(1, round(count * passes)) for count, passes in zip(counts, epochs, strict=True)])
        self._ends = np.cumsum(self._quotas)
        self._mix = Mix(weights, seed) if weights else None
        self.rows_per_epoch = sum(counts) if weights else int(self._ends[-1])

    def locate(self, positions: Indices) -> tuple[Indices, Indices]:
        """Source number and row number in that source, for each position."""
        sources, draws = self._mix.locate(positions) if self._mix else self._epochs(positions)
        rows = np.empty_like(draws)
        for source in np.unique(sources):
            mine = sources == source
            rows[mine] = self._row(int(source), draws[mine])
        return sources, rows

    def _row(self, source: int, draws: Indices) -> Indices:
        """The row that the n-th draw from a source is."""
        passes, places = np.divmod(draws, self.counts[source])
        if self.shuffle:
            for each in np.unique(passes):
                mine = passes == each
                places[mine] = Permutation(self.counts[source], self.seed, "rows", source, int(each))(places[mine])
        return places

    def _epochs(self, positions: Indices) -> tuple[Indices, Indices]:
        """Sources one behind the other in each epoch, shuffled as a whole."""
        epochs, places = np.divmod(positions, self.rows_per_epoch)
        if self.shuffle:
            for each in np.unique(epochs):
                mine = epochs == each
                places[mine] = Permutation(self.rows_per_epoch, self.seed, "epoch", int(each))(places[mine])
        sources = np.searchsorted(self._ends, places, side="right")
        quotas = self._quotas[sources]
        return sources, epochs * quotas + places - (self._ends[sources] - quotas)


def _cumulative_shares(weights: Sequence[float]) -> list[Fraction]:
    """Exact cumulative shares, so that every machine mixes alike; the last is 1."""
    exact = [Fraction(weight) for weight in weights]
    return [sum(exact[: at + 1], Fraction(0)) / sum(exact) for at in range(len(exact))]
