"""Peak memory of every pipeline stage, and what the driver and the allocator take beside it. No torch.

The peak is the fullest of the moments that `moments.py` walks through.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from trainwright.planner.hardware import GIB
from trainwright.planner.job import Job, Stage
from trainwright.planner.moments import Moment, Walk, wait_whole
from trainwright.planner.states import States, stage_states


@dataclass(frozen=True)
class StageMemory:
    """One rank of a pipeline stage."""

    stage: Stage
    states: States
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)


@dataclass(frozen=True)
class MemoryPlan:
    """All stages, and what the driver, the collectives and the allocator take beside the tensors.

    allocated: what `max_memory_allocated` will say, of the fullest stage. needed: what has to be free on the card.
    idle: memory of gradients that nothing else can use.
    """

    stages: tuple[StageMemory, ...]
    reserved_share: float
    slack: float
    idle: int
    context: int
    communicators: int
    capacity: int

    @cached_property
    def fullest(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.peak.total)

    @property
    def allocated(self) -> int:
        return self.fullest.peak.total

    @property
    def reserved(self) -> int:
        """What `max_memory_reserved` will say: the allocator keeps more than it needs while there is room."""
        outside = self.context + self.communicators
        return max(self.allocated, min(int(self.allocated * self.reserved_share) + self.idle, self.capacity - outside))

    @property
    def needed(self) -> int:
        return int(self.allocated * self.slack) + self.idle + self.context + self.communicators

    @property
    def free(self) -> int:
        """What is left; below 0 it does not fit."""
        return self.capacity - self.needed

    @property
    def fits(self) -> bool:
        return self.free >= 0


def plan_memory(job: Job) -> MemoryPlan:
    """The peak of every stage."""
    groups = communicator_count(job)
    calibration = job.calibration
    stages = tuple(_stage_memory(job, stage) for stage in job.stages)
    return MemoryPlan(
        stages,
        job.program.reserved,
        job.program.slack,
        int(job.program.idle_gradients * max(_idle(job, stage) for stage in stages)),
        int((job.program.context_gib or calibration.context_gib) * GIB),
        int(calibration.communicator_gib * GIB) * groups,
        int(job.cluster.card.memory_gib * GIB),
    )


def _idle(job: Job, stage: StageMemory) -> int:
    """Sharded gradients that are not there at the peak."""
    if job.recipe.train.optimizer_in_backward:
        return 0
    here = 0 if wait_whole(job) else stage.peak.parts.get("gradients", 0)
    return max(0, stage.states.gradients - here)


def _stage_memory(job: Job, stage: Stage) -> StageMemory:
    def walk() -> StageMemory:
        states = stage_states(job, stage)
        return StageMemory(stage, states, tuple(Walk(job, stage, states).moments()))

    like = job.once(("memory", job.alike(stage)), walk)
    return like if like.stage == stage else StageMemory(stage, like.states, like.moments)


def communicator_count(job: Job) -> int:
    """Groups of processes that a rank is in; axes of the same ranks share one."""
    layout = job.layout
    if layout.world_size == 1:
        return 0
    sizes = {"pp": layout.pp, "replicate": layout.dp_replicate, "shard": job.shards, "tp": layout.tp}
    own = {axis: size for axis, size in sizes.items() if size > 1}
    inner = [size for size in (layout.cp, layout.ep) if 1 < size < job.shards]
    whole = 0 if layout.world_size in own.values() else 1  # the group of all processes is there anyway
    return len(own) + len(inner) + whole
