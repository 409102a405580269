"""Bytes that one rank keeps from step to step: weights, gradients, optimizer states. To the byte, no torch.

Owns what each ZeRO stage shards and the sizes of quantized weights and of each optimizer's states. Tests compare it
with the tensors that training really allocates, on every rank of every layout that runs on CPU processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from trainwright.adapt.quantize import NF4_BLOCK
from trainwright.planner.job import Job, LayerGroup, Stage
from trainwright.planner.parameters import Parameter, piece, tensor_piece

Shape = tuple[int, ...]


@dataclass(frozen=True)
class States:
    """Bytes, by what they are; they add up to all that is kept."""

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


@dataclass(frozen=True)
class Rank:
    """Where a process stands along the axes that cut parameters. The first holds the most."""

    tp: int = 0
    ep: int = 0
    shard: int = 0


FIRST = Rank()


def local_shape(job: Job, item: Parameter, rank: Rank = FIRST) -> Shape:
    """The piece of one tensor and expert parallel rank."""
    shape = tensor_piece(item, job.layout.tp, rank.tp)
    if is_expert(item) and job.layout.ep > 1:
        return (piece(shape[0], job.layout.ep, rank.ep), *shape[1:])
    return shape


def is_expert(item: Parameter) -> bool:
    """Whether it is stacked by expert."""
    return ".experts." in item.name


def parameter_shards(job: Job, item: Parameter) -> int:
    """Ranks that share one copy of a parameter. Those of one expert parallel group hold different experts already."""
    return max(1, job.shards // job.layout.ep) if is_expert(item) else job.shards


def shard_shape(job: Job, item: Parameter, rank: Rank = FIRST) -> Shape:
    """What FSDP leaves a rank: rows of dimension 0; columns where tensor parallel has cut the rows unevenly."""
    shape, shards = local_shape(job, item, rank), parameter_shards(job, item)
    place = rank.shard // job.layout.ep if is_expert(item) else rank.shard
    uneven = item.cut == 0 and job.layout.tp > 1 and item.units is None and item.shape[0] % job.layout.tp
    if uneven and len(shape) > 1:
        return (shape[0], piece(shape[1], shards, place), *shape[2:])
    return (piece(shape[0], shards, place), *shape[1:])


def parameter_states(job: Job, item: Parameter, rank: Rank = FIRST) -> States:
    """What one rank keeps of one parameter. Weights and gradients are padded to the largest piece, states are not."""
    program, zero = job.program, job.layout.zero
    whole = math.prod(local_shape(job, item, rank))
    padded = math.prod(shard_shape(job, item, Rank(rank.tp, rank.ep)))
    own = math.prod(shard_shape(job, item, rank))
    sharded = zero >= program.weights_sharded_from
    if item.quantization is not None:
        return States(quantized=_quantized_bytes(job, item, rank, sharded))
    if not item.trained:
        size = program.outer if item.kind in ("embedding", "head") and program.outer else program.frozen
        return States(weights=(padded if sharded else whole) * size)
    weights = (padded if sharded else whole) * program.trained
    gradients = (padded if zero >= program.gradients_sharded_from or sharded else whole) * program.gradient
    updated = own if zero >= 1 else whole
    shape = shard_shape(job, item, rank) if zero >= 1 else local_shape(job, item, rank)
    optimizer = updated * program.master + optimizer_bytes(job, item, shape)
    if item.kind == "adapter":
        return States(adapters=weights, gradients=gradients, optimizer=optimizer)
    return States(weights, 0, 0, gradients, optimizer)


def _quantized_bytes(job: Job, item: Parameter, rank: Rank, sharded: bool) -> int:
    """Codes and scales are cut by rows; nf4's second level of scales is whole on every rank, and where tensor or expert
    parallelism cuts the weight there is none (`adapt/frozen.py`)."""
    assert item.quantization is not None
    shape = local_shape(job, item, rank)
    levels = 1 if job.layout.tp > 1 or (item.kind == "experts" and job.layout.ep > 1) else 2
    size = item.quantization.num_bytes(*shape, levels=levels)
    if not sharded:
        return size
    *rows, columns = shape
    blocks = math.prod(rows) * -(-columns // NF4_BLOCK)
    nested = 4 * -(-blocks // 256) + 4 if item.quantization.kind == "nf4" and levels == 2 else 0
    one = (size - nested) // max(1, shape[0])
    return piece(shape[0], parameter_shards(job, item)) * one + nested


def optimizer_bytes(job: Job, item: Parameter, shape: Shape) -> int:
    """States of one parameter's piece, with each optimizer's counter of steps (a float32 scalar)."""
    name, moment = job.recipe.train.optimizer, job.program.moment
    matrix, count = len(shape) >= 2, math.prod(shape)
    if name == "adamw":
        return 2 * moment * count + 4
    if name == "adamw8bit":  # 8-bit moments and a float32 scale for 256 of a row; tensors below 4096 stay float32
        blocks = count // shape[-1] * -(-shape[-1] // 256)
        return 2 * count + 2 * 4 * blocks + 4 if math.prod(item.shape) >= 4096 else 8 * count + 4
    if name == "adafactor":  # one number a row and one a column (Shazeer & Stern 2018)
        return moment * (count // shape[-1] + count // shape[-2] if matrix else count) + 4
    if name == "muon" and not (len(item.shape) == 2 and item.layer is not None):
        return 2 * moment * count + 4  # AdamW on what is no matrix of a layer
    return moment * count if name in ("muon", "lion") else 0


def stage_states(job: Job, stage: Stage, rank: Rank = FIRST) -> States:
    """What one rank of a pipeline stage keeps from step to step."""
    total = sum_states(job, job.outer(stage), rank)
    for group in job.groups(stage):
        total += group_states(job, group, rank) * group.count
    return total


def group_states(job: Job, group: LayerGroup, rank: Rank = FIRST) -> States:
    """One layer of a kind."""
    return job.once(("states", group.layer, rank), lambda: sum_states(job, group.parameters, rank))


def group_elements(job: Job, group: LayerGroup, *, trained: bool = False) -> int:
    """`whole_elements` of what FSDP has of one layer of a kind."""
    key = ("elements", group.layer, trained)
    return job.once(key, lambda: whole_elements(job, _shared(job, group), trained=trained))


def group_bytes(job: Job, group: LayerGroup) -> int:
    """`whole_bytes` of what FSDP has of one layer of a kind."""
    return job.once(("bytes", group.layer), lambda: whole_bytes(job, _shared(job, group)))


def _shared(job: Job, group: LayerGroup) -> list[Parameter]:
    return [item for item in group.parameters if not (job.experts_alone and is_expert(item))]


def alone_elements(job: Job, group: LayerGroup) -> list[int]:
    """Of each trained matrix of experts that FSDP leaves out."""
    alone = [item for item in group.parameters if job.experts_alone and is_expert(item) and item.trained]
    return [math.prod(local_shape(job, item)) for item in alone]


def sum_states(job: Job, items: Iterable[Parameter], rank: Rank = FIRST) -> States:
    """Summed over parameters."""
    return sum((parameter_states(job, item, rank) for item in items), States())


def whole_elements(job: Job, items: Iterable[Parameter], *, trained: bool = False) -> int:
    """Elements after tensor and expert parallelism: what a gather makes, or a gradient before it is summed."""
    return sum(math.prod(local_shape(job, item)) for item in items if not trained or item.trained)


def whole_bytes(job: Job, items: Iterable[Parameter]) -> int:
    """Bytes of weights after tensor and expert parallelism in the compute type: what a gather of all shards makes."""
    total = 0
    for item in items:
        shape = local_shape(job, item)
        quantization = item.quantization
        total += math.prod(shape) * job.program.compute if quantization is None else quantization.num_bytes(*shape)
    return total
