"""The proof of a layout: three optimizer steps in it and on one process, losses and each parameter's gradient compared.

    expect(Case("llama", Layout(world_size=4, tp=2, pp=2)))

A step has accumulation, packed documents, padding and uneven numbers of supervised tokens. The model, the step and the
optimizer are the trainer's own. Gradients are compared as the optimizer sees them, one number a parameter:
|g - g'| / |g'|, where g' below a ten thousandth of the largest is taken as that (a key's bias has gradient 0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.parallel import models
from tests.parallel.worlds import run, world_of
from trainwright.data.loader import Batch
from trainwright.model.transformer import Transformer
from trainwright.parallel.apply import parallelize
from trainwright.parallel.layout import Layout
from trainwright.recipe.parallel import ParallelRecipe
from trainwright.train.optimizer import Optimizers, build_optimizer
from trainwright.train.step import LossScale, TrainStep

STEPS, LENGTH, MICRO_BATCH = 3, 32, 2
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One model in one layout. `options`: other keys of the recipe's `parallel` section."""

    model: str
    layout: Layout
    options: tuple[tuple[str, Any], ...] = ()
    accumulation: int = 2
    length: int = LENGTH
    layers: int = 3

    @property
    def recipe(self) -> ParallelRecipe:
        names = ("pp", "dp_replicate", "cp", "tp", "ep", "zero")
        return ParallelRecipe(**{name: getattr(self.layout, name) for name in names}, **dict(self.options))

    def __str__(self) -> str:
        extra = "".join(f" {key}={value}" for key, value in self.options)
        copies = f" replicate {self.layout.dp_replicate}" if self.layout.dp_replicate > 1 else ""
        return f"{self.model} {self.layout} zero {self.layout.zero}{copies}{extra}"


@dataclass
class Trace:
    """What three steps gave: losses, global gradient norms, and gradients by parameter name for each step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)


class _Recorded(Optimizers):
    """Notes every whole gradient before the update."""

    def __init__(self, inner: Optimizers, trace: Trace) -> None:
        super().__init__(inner.parts, dict(inner.names))
        self.trace = trace

    def step(self, coefficient: Tensor, bad: Tensor) -> None:
        found = {}
        for tensor, name in self.names.items():
            grad = tensor.grad
            if grad is not None:
                found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).detach().clone()
        self.trace.gradients.append(found)
        super().step(coefficient, bad)


def trace_of(case: Case, change: Callable[[], None] | None = None) -> Trace:
    """Runs the case in this process's place of its layout. `change` breaks something first (mutants)."""
    if change is not None:
        change()
    world = world_of(case.layout)
    with torch.device("meta"):
        model = Transformer(models.build(case.model, case.layers))
    spread = parallelize(model, world, case.recipe, precision="fp32", compile_layers=False, seq_len=case.length)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.reset_buffers(torch.device("cpu"))
    model.init_weights(3).train()
    trace = Trace()
    optimizers = build_optimizer(model, "adamw", betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1)
    take = TrainStep(
        spread.pipeline or model,
        _Recorded(optimizers, trace),
        world,
        max_grad_norm=1.0,
        loss_scale=LossScale(False),
    )
    for step in range(STEPS):
        result = take(micro_batches(case, step, world.data_rank), 1e-2)
        trace.losses.append(result.loss)
        trace.norms.append(result.grad_norm)
    return trace


def micro_batches(case: Case, step: int, data_rank: int) -> list[Batch]:
    """Micro batch i of rank r is number i x ranks + r of the step, whatever the layout."""
    ranks = case.layout.data_ranks
    count = case.accumulation * ranks
    every = models.batches(count, MICRO_BATCH, case.length, seed=100 + step, prompts=case.model == "glm")
    return [Batch(**vars(batch)) for batch in every[data_rank::ranks]]


@cache
def reference(model: str, micro_batches_in_a_step: int, length: int, layers: int) -> Trace:
    """The same steps on one process without anything."""
    plain = Case(model, Layout(), accumulation=micro_batches_in_a_step, length=length, layers=layers)
    return trace_of(plain)


def differences(case: Case, traces: Sequence[Trace]) -> dict[str, float]:
    """The largest relative differences of losses, norms and gradients, by name; missing ones are infinite."""
    plain = reference(case.model, case.accumulation * case.layout.data_ranks, case.length, case.layers)
    worst: dict[str, float] = {}
    for trace in traces:
        for name, ours, theirs in (("loss", trace.losses, plain.losses), ("grad_norm", trace.norms, plain.norms)):
            found = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
            worst[name] = max(worst.get(name, 0.0), found)
    for step, expected in enumerate(plain.gradients):
        floor = 1e-4 * max(float(grad.norm()) for grad in expected.values())
        for name, grad in expected.items():
            held = [trace.gradients[step][name] for trace in traces if name in trace.gradients[step]]
            apart = [float((ours - grad).norm()) / max(float(grad.norm()), floor) for ours in held] or [float("inf")]
            worst[name] = max(worst.get(name, 0.0), *apart)
    return worst


def expect(case: Case) -> None:
    """Fails with the worst parameters where the layout is not the single process."""
    worst = differences(case, run(case.layout.world_size, trace_of, case))
    wrong = {name: value for name, value in worst.items() if not value <= TOLERANCE}
    assert not wrong, f"{case}: {dict(sorted(wrong.items(), key=lambda item: -item[1])[:8])}"
