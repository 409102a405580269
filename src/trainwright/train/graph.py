"""A micro batch's forward and backward pass as one recorded graph, replayed with new numbers.

For rows so short that the host needs longer to start the kernels than the device to run them. Everything a pass reads
and writes lies at fixed places then: inputs are copied into them, gradients are found in them. Owns recording and
replay; what a pass computes is `step.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.errors import UserError
from trainwright.model.transformer import LossOutput

EAGER_PASSES = 3
"""Passes that run as usual before one is recorded: they compile, and let libraries set up what they need."""
TOKENS_A_DOCUMENT = 32
"""Packed rows have at most one document in so many tokens, or their pass is not recorded."""

Key = tuple[Any, ...]


def check_graph(device: torch.device, alone: bool) -> None:
    """Raises UserError where passes cannot be recorded."""
    if device.type != "cuda" or not alone:
        where = f"this is {device.type}" if alone else "this run has several"
        raise UserError(f"train.cuda_graph=true needs one process on a CUDA device, and {where}: leave it out")


class GraphedPasses:
    """Records a pass once for each shape of its inputs, after some that ran as usual."""

    def __init__(self, trained: Sequence[Tensor]) -> None:
        self.trained = list(trained)
        self.seen: dict[Key, int] = {}
        self.recorded: dict[Key, _Recorded] = {}

    def __call__(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        count: Tensor,
        share: Callable[[LossOutput, Tensor], Tensor],
        *,
        alone: bool,
    ) -> Tensor:
        """Adds the pass's gradients to those that are there and returns its loss sum.

        alone: it is the step's only micro batch, so gradients may stay where the graph writes them.
        """
        inputs = with_room(inputs)
        key = tuple((name, tuple(v.shape) if isinstance(v, Tensor) else v) for name, v in inputs.items())
        if key not in self.recorded and self.seen.get(key, 0) >= EAGER_PASSES:
            self.recorded[key] = self._record(model, inputs, count, share)
        if key in self.recorded:
            return self.recorded[key].replay(inputs, count, alone)
        self.seen[key] = self.seen.get(key, 0) + 1
        output = model(**inputs)
        share(output, count).backward()
        return output.loss_sum.detach()

    def _record(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        count: Tensor,
        share: Callable[[LossOutput, Tensor], Tensor],
    ) -> _Recorded:
        module = torch.get_device_module(count.device)
        fixed = {name: v.clone() if isinstance(v, Tensor) else v for name, v in inputs.items()}
        own_count = count.clone()
        held = [parameter.grad for parameter in self.trained]
        for parameter in self.trained:
            parameter.grad = None  # so that the graph writes gradients and adds to none
        graph = module.CUDAGraph()
        with module.graph(graph, capture_error_mode="thread_local"):  # the loader's thread pins memory meanwhile
            output = model(**fixed)
            share(output, own_count).backward()
            loss_sum = output.loss_sum.detach()
        grads = {parameter: parameter.grad for parameter in self.trained if parameter.grad is not None}
        for parameter, grad in zip(self.trained, held, strict=True):
            parameter.grad = grad
        return _Recorded(graph, fixed, own_count, loss_sum, grads)


class _Recorded:
    """One graph and its fixed places."""

    def __init__(
        self, graph: Any, inputs: dict[str, Any], count: Tensor, loss_sum: Tensor, grads: dict[Tensor, Tensor]
    ) -> None:
        self.graph, self.inputs, self.count, self.loss_sum, self.grads = graph, inputs, count, loss_sum, grads

    def replay(self, inputs: dict[str, Any], count: Tensor, alone: bool) -> Tensor:
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self.inputs[name].copy_(value, non_blocking=True)
        self.count.copy_(count)
        self.graph.replay()
        if alone:
            for parameter, grad in self.grads.items():
                parameter.grad = grad
            return self.loss_sum
        for parameter, grad in self.grads.items():
            parameter.grad = grad.clone() if parameter.grad is None else parameter.grad.add_(grad)
        return self.loss_sum.clone()


def with_room(inputs: dict[str, Any]) -> dict[str, Any]:
    """Packed rows have another number of documents each: their offsets are filled up with documents of no length, and
    the longest is as long as a row, so that all of them have one shape."""
    offsets = inputs.get("cu_seqlens")
    if offsets is None:
        return inputs
    rows, length = inputs["input_ids"].shape
    most = rows * max(1, length // TOKENS_A_DOCUMENT) + 1
    if offsets.numel() > most:
        return inputs
    room = offsets[-1:].expand(most - offsets.numel())
    return {**inputs, "cu_seqlens": torch.cat([offsets, room]), "max_seqlen": length}
