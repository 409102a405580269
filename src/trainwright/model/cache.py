"""Keys and values of what was already read, for generation. Grows by doubling; knows nothing of masks or positions."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class LayerCache:
    """One layer's keys and values [B, T, K, D]."""

    def __init__(self) -> None:
        self.length = 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def append(self, k_BSKD: Tensor, v_BSKD: Tensor) -> tuple[Tensor, Tensor]:
        """Adds S positions and returns all: views of [B, T, K, D]."""
        end = self.length + k_BSKD.shape[1]
        self._k, self._v = self._fit(self._k, k_BSKD, end), self._fit(self._v, v_BSKD, end)
        self._k[:, self.length : end] = k_BSKD
        self._v[:, self.length : end] = v_BSKD
        self.length = end
        return self._k[:, :end], self._v[:, :end]

    def _fit(self, held: Tensor | None, new: Tensor, end: int) -> Tensor:
        if held is not None and held.shape[1] >= end:
            return held
        room = max(end, 64) if held is None else max(end, 2 * held.shape[1])
        grown = new.new_empty(new.shape[0], room, *new.shape[2:])
        if held is not None:
            grown[:, : self.length] = held[:, : self.length]
        return grown


class KVCache:
    """A cache for every layer, made on first use."""

    def __init__(self) -> None:
        self._layers: dict[str, LayerCache] = {}

    def clear(self) -> None:
        """Forgets everything: what follows is a first pass."""
        self._layers.clear()

    def layer(self, key: str) -> LayerCache:
        return self._layers.setdefault(key, LayerCache())

    @property
    def length(self) -> int:
        """Positions held."""
        return self.held(self._layers)

    def held(self, keys: Iterable[str]) -> int:
        """Positions that these layers hold; a model in stages fills its layers one stage after another."""
        return max((self.layer(key).length for key in list(keys)), default=0)
