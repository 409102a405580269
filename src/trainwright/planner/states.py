"""Bytes that one rank keeps from step to step: weights, gradients, optimizer states. To the byte, no torch.

Owns what each ZeRO stage shards and the sizes of quantized weights and of each optimizer's states. Tests compare it
with the tensors that training really allocates, on every rank of every layout that runs on CPU processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from trainwright.planner.job import Job, Stage
from trainwright.planner.parameters import Parameter, shard_piece, tensor_piece


@dataclass(frozen=True)
class States:
    """Bytes, by what they are. `adapters` and `quantized` are parts of the weights that are told apart."""

    weights: int = 0
    quantized: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0

    def __add__(self, other: States) -> States:
        return States(*(mine + theirs for mine, theirs in zip(self.values(), other.values(), strict=True)))

    def __mul__(self, count: int) -> States:
        return States(*(size * count for size in self.values()))

    def values(self) -> tuple[int, ...]:
        return self.weights, self.quantized, self.adapters, self.gradients, self.optimizer

    @property
    def total(self) -> int:
        return sum(self.values())


def local_shape(job: Job, item: Parameter) -> tuple[int, ...]:
    """The piece of one tensor and expert parallel rank."""
    shape = tensor_piece(item, job.layout.tp)
    if item.kind == "experts" and job.layout.ep > 1:
        return (-(-shape[0] // job.layout.ep), *shape[1:])
    return shape


def parameter_shards(job: Job, item: Parameter) -> int:
    """Ranks that share one copy of a parameter. Those of one expert parallel group hold different experts already."""
    return max(1, job.shards // job.layout.ep) if item.kind == "experts" else job.shards


def parameter_states(job: Job, item: Parameter) -> States:
    """What one rank keeps of one parameter: the largest piece of any rank, padding included."""
    program, zero = job.program, job.layout.zero
    shape, shards = local_shape(job, item), parameter_shards(job, item)
    whole, piece = math.prod(shape), shard_piece(shape, shards)
    kept = piece if zero >= program.weights_sharded_from else whole
    if not item.trained:
        if item.quantization is not None:
            size = item.quantization.num_bytes(*shape)
            return States(quantized=-(-size // shards) if zero >= program.weights_sharded_from else size)
        size = program.outer if item.kind in ("embedding", "head") and program.outer else program.frozen
        return States(weights=kept * size)
    weights = kept * program.trained
    gradients = (piece if zero >= program.gradients_sharded_from else whole) * program.gradient
    updated = piece if zero >= 1 else whole
    optimizer = updated * program.master + optimizer_bytes(job, item, shape, updated)
    if item.kind == "adapter":
        return States(adapters=weights, gradients=gradients, optimizer=optimizer)
    return States(weights, 0, 0, gradients, optimizer)


def optimizer_bytes(job: Job, item: Parameter, shape: tuple[int, ...], updated: int) -> int:
    """States of one parameter, with each optimizer's counter of steps (a float32 scalar)."""
    name, moment = job.recipe.train.optimizer, job.program.moment
    matrix = len(shape) >= 2
    if name == "adamw":
        return 2 * moment * updated + 4
    if name == "adamw8bit":  # 8-bit moments and a float32 scale for each 256; tensors below 4096 stay float32
        return 2 * updated + 2 * 4 * -(-updated // 256) if updated >= 4096 else 8 * updated
    if name == "adafactor":  # a row and a column of second moments (Shazeer & Stern 2018)
        rows = updated // shape[-1] if matrix else updated
        return moment * (rows + math.prod(shape[:-2]) * shape[-1] if matrix else rows) + 4
    if name == "muon" and not (matrix and item.layer is not None and item.kind != "experts"):
        return 2 * moment * updated + 4  # AdamW on what is no matrix of a layer
    return moment * updated if name in ("muon", "lion") else 0


def stage_states(job: Job, stage: Stage) -> States:
    """What one rank of a pipeline stage keeps from step to step."""
    total = sum_states(job, job.outer(stage))
    for group in job.groups(stage):
        total += sum_states(job, group.parameters) * group.count
    return total


def sum_states(job: Job, items: Iterable[Parameter]) -> States:
    """Summed over parameters."""
    return sum((parameter_states(job, item) for item in items), States())


def whole_elements(job: Job, items: Iterable[Parameter], *, trained: bool = False) -> int:
    """Elements after tensor and expert parallelism: what a gather makes, or a gradient before it is summed."""
    return sum(math.prod(local_shape(job, item)) for item in items if not trained or item.trained)
