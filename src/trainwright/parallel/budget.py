"""Compiled layers within a memory budget: each keeps everything, or all but its MLP's results, or its input only.

`recompute.py` chooses operation by operation, looking at each as it runs; compiled layers do not show theirs. Here the
choice is by layer, from what two layers were seen to keep in the first pass. Owns the levels and who gets which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainwright.model.ffn import Mlp
from trainwright.parallel.recompute import GIB, checkpointed

Level = Literal["all", "attention", "input"]
"""attention: everything outside the MLP, whose products (over half of a layer's arithmetic and two thirds of its
memory) are computed again."""
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def apply_budget(layers: Iterable[nn.Module], memory_gib: float, *, in_flight: int = 1, compile_: Compile) -> Budget:
    """Sets and compiles every layer, in place. memory_gib: what all layers together may keep beyond their inputs, with
    `in_flight` micro batches between forward and backward."""
    layers = list(layers)
    budget = Budget(memory_gib * GIB / in_flight, len(layers))
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
        """First "attention" for as many layers as fit, then "all"; the last layers first, because their backward pass
        comes first and frees most before others compute again."""
        attention = max(self.kept["attention"], 1)
        several = int(min(self.layers, self.bytes // attention))
        more = max(self.kept["all"] - attention, 1)
        whole = int(min(self.layers, (self.bytes - several * attention) // more)) if several == self.layers else 0
        counts: dict[Level, int] = {"input": self.layers - several, "attention": several - whole, "all": whole}
        return [level for level, count in counts.items() for _ in range(count)]


class _Chosen:
    """A layer's forward at the level that the budget gives it."""

    def __init__(self, layer: nn.Module, number: int, budget: Budget, compile_: Compile) -> None:
        self.layer, self.number, self.budget = layer, number, budget
        inner = layer.forward

        # Two functions, not one: each is compiled for one way of treating the MLP.
        def whole(*args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs)

        def without_mlp(*args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs)

        self.forwards: dict[Level, Callable[..., Any]] = {
            "all": compile_(whole),
            "attention": compile_(without_mlp),
            "input": compile_(checkpointed(inner)),
        }
        self.level: Level | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forwards[self.level or "all"](*args, **kwargs)
        level = self.budget.level(self.number)
        if level != self.level:
            self._set(level)
        if self.budget.levels is not None or level == "input":
            return self.forwards[level](*args, **kwargs)
        seen = _Seen(self.layer, args[0])
        with torch.autograd.graph.saved_tensors_hooks(seen.note, lambda tensor: tensor):
            result = self.forwards[level](*args, **kwargs)
        self.budget.kept[level] = sum(seen.bytes.values())
        if self.budget.layers == 1:
            self.budget.kept.setdefault("attention", self.budget.kept["all"])
        return result

    def _set(self, level: Level) -> None:
        self.level = level
        mlp = self.layer.mlp
        if isinstance(mlp, Mlp):
            mlp.__dict__.pop("forward", None)
            if level == "attention":
                mlp.forward = checkpointed(mlp.forward)  # type: ignore[method-assign]


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
