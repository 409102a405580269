"""Activations computed again in the backward pass instead of kept: per layer, all of it, or what is cheap.

    full        a layer keeps its input and nothing else
    selective   it keeps the results of matrix products, attention and token exchanges too, and computes the rest again;
                with a memory budget, those results that save the most arithmetic per byte

Owns the choice of what is kept. What waits in host memory instead is `offload.py`'s, where this stands in the order of
application `apply.py`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainwright.adapt import joint
from trainwright.parallel import overlap

GIB = 2**30
Recompute = Literal["none", "selective", "full"]
Key = tuple[Any, int]
"""An operation and the number of its call in one forward pass of a layer."""


def _existing(*names: str) -> frozenset[Any]:
    """Operators by name; those that this torch does not have are left out."""
    found = set()
    for name in names:
        space, _, rest = name.partition(".")
        packet = getattr(getattr(torch.ops, space), rest, None)
        found.add(getattr(packet, "default", packet))
    return frozenset(found - {None})


LINEAR = _existing("mkldnn._linear_pointwise")  # `model/kernels/product.py`
BATCHED = _existing("aten.bmm", "aten.baddbmm")
PRODUCTS = (
    _existing("aten.mm", "aten.addmm", "aten._scaled_mm", "aten._grouped_mm")
    | LINEAR
    | BATCHED
    | joint.KEPT
    | overlap.KEPT
)
ATTENTION = _existing(
    "aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention", "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_attention_math", "torch_attn._varlen_attn", "higher_order.flex_attention",
    "trainwright.flash4",
)  # fmt: skip
EXCHANGES = _existing("_c10d_functional.reduce_scatter_tensor", "_c10d_functional.all_to_all_single")
KEPT = PRODUCTS | ATTENTION | EXCHANGES


def apply_recompute(layers: Iterable[nn.Module], mode: Recompute, *, memory_gib: float | None = None) -> None:
    """Sets every layer to keep its input only (full), or the results that are dear too (selective).

    The layer's own `forward` is replaced on the instance, so names, weights and hooks stay as they are. memory_gib:
    what the kept results of all these layers may take together.
    """
    layers = list(layers)
    if mode == "none":
        return
    budget = Budget(memory_gib * GIB) if memory_gib is not None else None
    for number, layer in enumerate(layers):
        extra: dict[str, Any] = {}
        if mode == "selective":
            contexts = partial(create_selective_checkpoint_contexts, keep_all)
            extra["context_fn"] = contexts if budget is None else partial(budget.contexts, number)
        layer.forward = checkpointed(layer.forward, extra)


def checkpointed(inner: Callable[..., Any], extra: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """`inner`, keeping its arguments only. A function and no partial: torch.compile passes over a module whose forward
    is a partial, without a word."""
    settings = dict(extra or {})

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=True, **settings, **kwargs)

    return forward


def hide_gathering(layers: Iterable[nn.Module]) -> None:
    """Selective recompute counts a layer's operations and expects the same ones again. What FSDP does to gather a part
    inside a layer (experts) is not the same the second time, so it is not shown. Call it after sharding."""
    for layer in layers:
        for part in layer.modules():
            if part is not layer and isinstance(part, FSDPModule):
                for hooks in (part._forward_pre_hooks, part._forward_hooks):
                    for key, hook in hooks.items():
                        hooks[key] = partial(_unseen, hook)


def _unseen(hook: Callable[..., Any], *args: Any) -> Any:
    with _disable_current_modes():
        return hook(*args)


def keep_all(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy without a budget."""
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@dataclass(frozen=True)
class Result:
    """What keeping one result costs and saves."""

    layer: int
    key: Key
    bytes: int
    flops: float


class Budget:
    """Chooses which results to keep. The first pass keeps none and looks; every later one keeps the best that fit."""

    def __init__(self, bytes_: float) -> None:
        self.bytes = bytes_
        self.seen: dict[int, list[Result]] = {}
        self.kept: dict[int, frozenset[Key]] | None = None

    def contexts(self, layer: int) -> Any:
        """The pair of contexts that `checkpoint` asks for at every forward pass."""
        if self.kept is None and self.seen.get(layer):
            self.kept = self._choose()
        if self.kept is not None:
            return create_selective_checkpoint_contexts(_Keep(self.kept.get(layer, frozenset())))
        return create_selective_checkpoint_contexts(_Look(layer, self.seen.setdefault(layer, [])))

    def _choose(self) -> dict[int, frozenset[Key]]:
        """The most arithmetic per byte first, as long as it fits."""
        every = [result for results in self.seen.values() for result in results]
        free = self.bytes
        kept: dict[int, set[Key]] = {layer: set() for layer in self.seen}
        for result in sorted(every, key=lambda r: (-r.flops / max(r.bytes, 1), r.layer)):
            if result.bytes <= free:
                free -= result.bytes
                kept[result.layer].add(result.key)
        return {layer: frozenset(keys) for layer, keys in kept.items()}


class Numbered:
    """Counts the calls of each operation, in the forward pass and in its repetition apart."""

    def __init__(self) -> None:
        self._calls: dict[bool, Counter[Any]] = {False: Counter(), True: Counter()}

    def number(self, context: Any, operation: Any) -> Key:
        calls = self._calls[bool(context.is_recompute)]
        calls[operation] += 1
        return operation, calls[operation]


class _Look(Numbered):
    def __init__(self, layer: int, seen: list[Result]) -> None:
        super().__init__()
        self.layer, self.seen = layer, seen

    def __call__(self, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operation in KEPT and not context.is_recompute:
            key = self.number(context, operation)
            self.seen.append(Result(self.layer, key, *_cost(operation, args)))
        return CheckpointPolicy.PREFER_RECOMPUTE


class _Keep(Numbered):
    def __init__(self, keys: frozenset[Key]) -> None:
        super().__init__()
        self.keys = keys

    def __call__(self, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operation in KEPT and self.number(context, operation) in self.keys:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


def _cost(operation: Any, args: tuple[Any, ...]) -> tuple[int, float]:
    """(bytes of the result, FLOPs to make it again). An exchange counts as a product with a 1024-wide matrix: about
    what a card computes while it sends as many bytes over a fast link."""
    if operation in joint.KEPT:
        return joint.kept_cost(args)
    if operation in overlap.KEPT:
        return overlap.kept_cost(args)
    if operation in LINEAR:
        x, weight = args[:2]
        size = x.numel() // x.shape[-1] * weight.shape[0]
        return size * x.element_size(), 2.0 * size * x.shape[-1]
    tensors = [argument for argument in args if isinstance(argument, Tensor)]
    if operation in PRODUCTS:
        a, b = tensors[-2:]
        size = prod(a.shape[:-1]) * b.shape[-1] if a.dim() == b.dim() else a.shape[0] * b.shape[-1]
        return size * a.element_size(), 2.0 * size * a.shape[-1]
    first = tensors[0]
    size = first.numel()
    if operation in EXCHANGES:
        return size * first.element_size(), 2048.0 * size
    keys = tensors[1].shape[-2] if first.dim() == 4 else first.shape[0]
    return size * first.element_size(), 2.0 * size * keys  # causal: half of the 4 x size x keys
