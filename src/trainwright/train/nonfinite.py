"""Finds what made a NaN or an infinity: the rows, and the first layer, by running the step's batches once more.

Owns the search only. The step that met the NaN was refused before (`step.py`); stopping or skipping is `trainer.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass
class Finding:
    """Where the first NaN or infinity came from; `rows` are (micro batch, row) pairs of this rank."""

    where: str
    rows: list[tuple[int, int]] = field(default_factory=list)


def find_nonfinite(model: nn.Module, batches: Sequence[Any], loss_of: Callable[[Any], Tensor]) -> Finding | None:
    """Runs forward and backward of each micro batch again, watching every module. None when nothing bad comes up.

    Leaves no gradients. A result of None means that the fault did not repeat: look at the hardware.
    """
    for name, tensor in model.named_parameters():
        if not bool(_local(tensor).isfinite().all()):
            return Finding(f"the weight {name}, which held NaN or Inf before this step")
    first: Finding | None = None
    with _uncompiled():
        for number, batch in enumerate(batches):
            found = _search(model, loss_of, number, batch)
            if found and first and found.where == first.where:
                first.rows += found.rows
            first = first or found
            model.zero_grad(set_to_none=True)
    return first


def _search(model: nn.Module, loss_of: Callable[[Any], Tensor], number: int, batch: Any) -> Finding | None:
    """The first fault in one micro batch: forward, loss, backward, weight gradients, in that order."""
    watch = _Watch(number, rows=batch.input_ids.shape[0])
    with watch.on(model):
        loss = loss_of(batch)
        if watch.found:
            return watch.found
        if not bool(loss.isfinite()):
            return Finding("the loss", watch.all_rows())
        watch.forward = False
        loss.backward()
    if watch.found:
        return watch.found
    for name, tensor in model.named_parameters():
        if tensor.grad is not None and not bool(_local(tensor.grad).isfinite().all()):
            return Finding(f"the gradient of {name}", watch.all_rows())
    return None


class _Watch:
    """Hooks on every module: its output going forward, that output's gradient going back."""

    def __init__(self, number: int, rows: int) -> None:
        self.number = number
        self.rows = rows
        self.forward = True
        self.found: Finding | None = None
        self.last_good = "the loss"

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        handles: list[RemovableHandle] = [
            module.register_forward_hook(lambda _, __, output, name=name: self._saw_output(name, output))
            for name, module in model.named_modules()
            if name
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def all_rows(self) -> list[tuple[int, int]]:
        return [(self.number, row) for row in range(self.rows)]

    def _saw_output(self, name: str, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) and output else output
        if not self.forward or self.found or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return  # recomputation runs forward inside backward: seen already
        if not bool(_local(tensor).isfinite().all()):
            self.found = Finding(f"the output of {name}", self._bad_rows(tensor))
        elif tensor.requires_grad:
            tensor.register_hook(lambda grad: self._saw_gradient(name, grad))

    def _saw_gradient(self, name: str, grad: Tensor) -> None:
        if self.found:
            return
        if bool(_local(grad).isfinite().all()):
            self.last_good = name
        else:
            where = f"the backward pass between {self.last_good} and the output of {name}"
            self.found = Finding(where, self._bad_rows(grad))

    def _bad_rows(self, tensor: Tensor) -> list[tuple[int, int]]:
        values = _local(tensor)
        if values.ndim < 2 or values.shape[0] != self.rows:
            return self.all_rows()
        bad = ~values.isfinite().flatten(1).all(dim=1)
        return [(self.number, row) for row in bad.nonzero().flatten().tolist()]


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Compiled blocks would not run the hooks of the modules inside them."""
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")
