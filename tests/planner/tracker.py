"""The bytes of tensors that are alive, at any moment of a program, on a CPU: what torch counts as allocated on a GPU.

Every operation's results are watched through the dispatcher; a storage counts from the operation that made it until it
is freed. Memory that a kernel takes and gives back inside one operation is not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """`peak` bytes at once since the start; `mark(name)` notes the present ones."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.where = ""
        self.peak_at = ""
        self._known: set[int] = set()

    def count(self, tensors: Any) -> None:
        """Adds what exists already."""
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or storage.device.type == "meta":
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        weakref.finalize(storage, self._gone, key, size)
        if self.now > self.peak:
            self.peak, self.peak_at = self.now, self.where

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return out
