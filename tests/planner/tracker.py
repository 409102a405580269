"""The bytes of tensors that are alive, at any moment of a program, on a CPU: what torch counts as allocated on a GPU.

Every operation's results are watched through the dispatcher. A storage counts with the size that it has at the moment,
because FSDP frees the weights that it gathered by shrinking their storage to nothing. Memory that a kernel takes and
gives back inside one operation is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """`peak`: most bytes at once since the start."""

    def __init__(self, existing: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        for tensor in existing:
            self._add(tensor)
        self._look()

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages and storage.device.type != "meta":
            self._storages[key] = weakref.ref(storage, lambda _: self._storages.pop(key, None))

    def _look(self) -> None:
        held = [storage for reference in list(self._storages.values()) if (storage := reference()) is not None]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in held))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for tensor in made:
            self._add(tensor)
        if made:
            self._look()
        return out
