"""Made tokens: rows of ids drawn on the spot, for measuring and for runs that must start without anybody's files.

Owns the distribution and its settings. Ids follow Zipf's law, and each odd place follows from the place before it three
times of four, so a loss falls as it does on text: two curves that agree say something, which they do not on even noise.
The same settings always give the same tokens. Reading `made:tokens?rows=64&length=512&vocab=32000` is in sources.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainwright.data.indexed import IndexedWriter, token_type
from trainwright.errors import UserError

FOLLOWS = 0.75  # share of odd places that the place before them decides
BLOCK = 1 << 22  # tokens drawn at once


@dataclass(frozen=True)
class MadeTokens:
    """`rows` documents of `length` tokens, or of `shortest` to `length`; ids below `vocab`. Raises UserError."""

    rows: int = 64
    length: int = 512
    shortest: int = 0
    vocab: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("length", 2), ("vocab", 2), ("shortest", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"made:tokens {name}={getattr(self, name)} is too small: use {least} or more")
        if self.shortest > self.length:
            raise UserError(f"made:tokens shortest={self.shortest} is above length={self.length}: lower it")

    @classmethod
    def parse(cls, settings: Mapping[str, str]) -> MadeTokens:
        """From the words after the question mark. Raises UserError for a name or number that cannot be."""
        known = [field.name for field in fields(cls)]
        for name, word in settings.items():
            if name not in known:
                raise UserError(f"made:tokens has no setting {name!r}: use {', '.join(known)}")
            if not word.isdecimal():
                raise UserError(f"made:tokens {name}={word!r} is no whole number")
        return cls(**{name: int(word) for name, word in settings.items()})

    def write(self, prefix: Path) -> None:
        """Writes them as a .bin/.idx pair."""
        draw = np.random.default_rng(self.seed)
        least = self.shortest or self.length
        with IndexedWriter(prefix, token_type(self.vocab)) as writer:
            left = self.rows
            while left:
                count = min(left, max(1, BLOCK // self.length))
                lengths = draw.integers(least, self.length + 1, count)
                writer.add(self._tokens(draw, int(lengths.sum())), lengths)
                left -= count

    def _tokens(self, draw: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` ids; the density 1/x of exp(u ln V) is Zipf's law."""
        ids = np.exp(draw.random(count) * np.log(self.vocab)).astype(np.int64) - 1
        ids = np.clip(ids, 0, self.vocab - 1)
        odd = ids[1::2]
        follows = draw.random(len(odd)) < FOLLOWS
        odd[follows] = (ids[: 2 * len(odd) : 2][follows] * 31 + 7) % self.vocab
        return ids
