"""Compiled layers within a memory budget: each keeps all dear results, or those of its attention, or its input only.

`recompute.py` chooses operation by operation, looking at each as it runs; compiled layers do not show theirs. Here the
choice is by layer, from what two layers were seen to keep in the first pass. Owns the levels and who gets which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from trainwright.parallel.recompute import ATTENTION, BATCHED, GIB, KEPT, PRODUCTS, checkpointed, keep_all
from trainwright.parallel.split import rich_layers

Level = Literal["all", "attention", "input"]
"""all: what selective recompute keeps, products and attention. Left to itself the compiler would keep norms and
activations too, 17 tensors of the stream's size in a Llama-3-8B layer where these are 10.5. attention: of the products
only those of the projections, up to the one that follows attention; the MLP's (over half of a layer's arithmetic, two
thirds of these bytes) are computed again."""
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def apply_budget(layers: Iterable[nn.Module], memory_gib: float, *, compile_: Compile) -> Budget:
    """Sets and compiles every layer, in place. memory_gib: what all layers together may keep beyond their inputs."""
    layers = list(layers)
    budget = Budget(memory_gib * GIB, len(layers))
    for number, layer in enumerate(layers):
        layer.forward = _Chosen(layer, number, budget, compile_)
    return budget


class Budget:
    """The levels of all layers. The first pass looks at one layer of each level; every later one follows the choice."""

    def __init__(self, bytes_: float, layers: int) -> None:
        self.bytes = bytes_
        self.layers = layers
        self.kept: dict[Level, int] = {}
        self.levels: list[Level] | None = None

    def level(self, number: int) -> Level:
        """What layer `number` does in the coming pass."""
        if self.levels is None and number == 0 and len(self.kept) == 2:
            self.levels = self.choose()
        if self.levels is not None:
            return self.levels[number]
        # The first layer may keep less than others (a frozen embedding gives no gradient to its input).
        look: dict[int, Level] = {min(1, self.layers - 1): "attention", self.layers - 1: "all"}
        return look.get(number, "input")

    def choose(self) -> list[Level]:
        """By the rule of `split.py`, the last layers richest: their backward pass comes first and frees most before
        others compute again."""
        whole, several = rich_layers(self.bytes, self.layers, self.kept["attention"], self.kept["all"])
        counts: dict[Level, int] = {"input": self.layers - several, "attention": several - whole, "all": whole}
        return [level for level, count in counts.items() for _ in range(count)]


class _Chosen:
    """A layer's forward at the level that the budget gives it."""

    def __init__(self, layer: nn.Module, number: int, budget: Budget, compile_: Compile) -> None:
        self.layer, self.number, self.budget = layer, number, budget
        inner = layer.forward

        self.forwards: dict[Level, Callable[..., Any]] = {
            "all": compile_(
                checkpointed(inner, {"context_fn": partial(create_selective_checkpoint_contexts, keep_all)})
            ),
            "attention": compile_(checkpointed(inner, {"context_fn": _attention_contexts})),
            "input": compile_(checkpointed(inner)),
        }
        self.level: Level | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forwards[self.level or "all"](*args, **kwargs)
        self.level = level = self.budget.level(self.number)
        if self.budget.levels is not None or level == "input":
            return self.forwards[level](*args, **kwargs)
        seen = _Seen(self.layer, args[0])
        with torch.autograd.graph.saved_tensors_hooks(seen.note, lambda tensor: tensor):
            result = self.forwards[level](*args, **kwargs)
        self.budget.kept[level] = sum(seen.bytes.values())
        if self.budget.layers == 1:
            self.budget.kept.setdefault("attention", self.budget.kept["all"])
        return result


def _attention_contexts() -> Any:
    return create_selective_checkpoint_contexts(_KeepAttention())


class _KeepAttention:
    """Keeps attention, the products before it, and the first one after it; what an adapter makes of an input is narrow,
    and kept wherever it is. Attention that is written out is a product of batches of matrices, the first such."""

    def __init__(self) -> None:
        self._after: dict[bool, int | None] = {False: None, True: None}  # products since attention, forward and again

    def __call__(self, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        again, kept = bool(context.is_recompute), operation in KEPT
        if operation in ATTENTION or (operation in BATCHED and not self._after[again]):
            self._after[again] = 0
        elif operation in PRODUCTS and not _narrows(operation, args) and (after := self._after[again]) is not None:
            self._after[again], kept = after + 1, after == 0
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _narrows(operation: Any, args: tuple[Any, ...]) -> bool:
    """Whether a plain product leaves little of what enters."""
    return operation == torch.ops.aten.mm.default and args[0].shape[-1] >= 8 * args[1].shape[-1]


class _Seen:
    """Bytes that a layer keeps: each storage once, weights and the layer's input left out."""

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        known = [*layer.parameters(), *layer.buffers(), x]
        self.known = {_storage(tensor) for tensor in known}
        self.bytes: dict[int, int] = {}

    def note(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self.known:
            self.bytes[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor


def _storage(tensor: Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.untyped_storage().data_ptr()
