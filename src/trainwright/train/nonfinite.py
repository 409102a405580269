"""NaN and infinity: finds the rows and the first layer that made them, and stops the run or lets it skip the step.

The step was refused before anything changed (`step.py`), so its batches can be run once more with every module watched.
Owns the search, the words, and the patience.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainwright.device import uncompiled
from trainwright.errors import UserError

PATIENCE = 20  # refused steps in a row after which skipping is not helping


class NonFiniteError(UserError):
    """Training met a NaN or an infinity. Nothing was updated by the step that met it."""


class NonFinite:
    """What to do about refused steps: `stop` at the first, or `skip` them as long as they are few."""

    def __init__(self, policy: Literal["stop", "skip"]) -> None:
        self.policy = policy
        self.in_a_row = 0

    def judge(self, account: str) -> None:
        """Counts a refused step that `account` describes. Raises NonFiniteError when the run has to end."""
        self.in_a_row += 1
        if self.policy == "stop":
            raise NonFiniteError(account)
        if self.in_a_row >= PATIENCE:
            raise NonFiniteError(f"{account}; {self.in_a_row} steps in a row were refused, so skipping does not help")


@dataclass
class Finding:
    """Where a NaN or infinity came from, and the numbers of the rows that had it.

    `stage`: 0 in a weight, 1 in a layer's output, 2 in the loss, 3 on the way back, 4 in a weight's gradient. What one
    rank made reaches the others later, so of all ranks the finding of the earliest stage is the first.
    """

    where: str
    rows: list[int] = field(default_factory=list)
    stage: int = 1


def account(step: int, what: str, findings: Sequence[Finding | None], kept: str) -> str:
    """One line: the step, the first layer, the rows of the global batch, what is left, what to try.

    `findings` are of all ranks, their rows numbered in the global batch; `kept` names the last good checkpoint.
    """
    first = min((finding for finding in findings if finding), key=lambda finding: finding.stage, default=None)
    if first is None:
        where = "it did not come again when the step's rows were run once more, which hints at the hardware"
    else:
        rows = sorted({row for other in findings if other and other.where == first.where for row in other.rows})
        shown = ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        where = f"it came first from {first.where}, in row {shown} of the global batch (counted from 0)"
    return (
        f"step {step}: {what}; {where}; nothing was updated; {kept}: look at those rows, lower train.learning_rate or "
        "train.max_grad_norm, or set train.on_nonfinite=skip"
    )


def find_nonfinite(
    model: nn.Module,
    batches: Sequence[Any],
    loss_of: Callable[[Any], Tensor],
    row_number: Callable[[int, int], int],
) -> Finding | None:
    """Runs forward and backward of each micro batch again, watching every module. None when nothing bad comes up.

    `row_number(micro batch, row in it)` is the row's number in the global batch. Leaves no gradients. None means that
    the fault did not repeat. Every rank runs everything, whatever it has found: the others wait for it on the way.
    """
    numbers = [[row_number(at, row) for row in range(len(batch.input_ids))] for at, batch in enumerate(batches)]
    first = _bad_weight(model, [row for of_batch in numbers for row in of_batch])
    with uncompiled():  # compiled layers would not run the hooks of the modules inside them
        for batch, rows in zip(batches, numbers, strict=True):
            found = _search(model, loss_of, batch, rows)
            if found and first and found.where == first.where:
                first.rows += found.rows
            first = first or found
            model.zero_grad(set_to_none=True)
    return first


def _bad_weight(model: nn.Module, rows: list[int]) -> Finding | None:
    for name, tensor in model.named_parameters():
        if not bool(_local(tensor).isfinite().all()):
            return Finding(f"the weight {name}, which held NaN or infinity before this step", rows, stage=0)
    return None


def _search(model: nn.Module, loss_of: Callable[[Any], Tensor], batch: Any, rows: list[int]) -> Finding | None:
    """The first fault in one micro batch: forward, loss, backward, weight gradients, in that order."""
    watch = _Watch(rows)
    with watch.on(model):
        loss = loss_of(batch)
        if not watch.found and not bool(loss.isfinite()):
            watch.found = Finding("the loss", rows, stage=2)
        watch.forward = False
        if loss.requires_grad:
            loss.backward()
    if watch.found:
        return watch.found
    for name, tensor in model.named_parameters():
        if tensor.grad is not None and not bool(_local(tensor.grad).isfinite().all()):
            return Finding(f"the gradient of {name}", rows, stage=4)
    return None


class _Watch:
    """Hooks on every module: its output going forward, that output's gradient going back."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows
        self.forward = True
        self.found: Finding | None = None
        self.last_good = "the loss"

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        handles = [self._hook(name, module) for name, module in model.named_modules() if name]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, module: nn.Module) -> RemovableHandle:
        return module.register_forward_hook(lambda _, __, output: self._saw_output(name, output))

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
            self.last_good = f"the output of {name}"
        else:
            where = f"the backward pass between {self.last_good} and the output of {name}"
            self.found = Finding(where, self._bad_rows(grad), stage=3)

    def _bad_rows(self, tensor: Tensor) -> list[int]:
        """The rows with a fault; all of them where the tensor is not one value a row and position."""
        values = _local(tensor)
        if values.ndim < 2 or values.shape[0] != len(self.rows):
            return self.rows
        bad = ~values.isfinite().flatten(1).all(dim=1)
        return [self.rows[row] for row in bad.nonzero().flatten().tolist()]


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
