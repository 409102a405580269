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

    def values(self) -> tuple[int, ...]:
        return self.weights, self.quantized, self.adapters, self.gradients, self.optimizer

    @property
    def total(self) -> int:
        return sum(self.values())


def in_stage(item: Parameter, stage: Stage, tied: bool) -> bool:
    """Whether a pipeline rank holds a parameter. A tied head's stage holds the token table too."""
    if item.layer is not None:
        return item.layer in stage.layers
    if item.name.startswith(("norm.", "project_out.", "lm_head.")):
        return stage.head
    return stage.embedding or (tied and stage.head and item.name.startswith("embed_tokens."))


def stage_parameters(job: Job, stage: Stage) -> list[Parameter]:
    """What a pipeline rank holds, before tensor, expert and data parallelism."""
    tied = job.config.lm_head.tied
    return [item for item in job.parameters if in_stage(item, stage, tied)]


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
    return sum_states(job, stage_parameters(job, stage))


def sum_states(job: Job, items: Iterable[Parameter]) -> States:
    """Summed over parameters; equal layers are counted once and multiplied."""
    total = States()
    for item in items:
        total += parameter_states(job, item)
    return total


def group_elements(job: Job, items: Iterable[Parameter], *, trained: bool = False) -> int:
    """Elements of whole weights after tensor and expert parallelism: what a gather makes, or a gradient before it is
    summed."""
    return sum(math.prod(local_shape(job, item)) for item in items if not trained or item.trained)
