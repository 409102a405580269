"""Peak memory of every pipeline stage, by part and by moment. No torch.

Walks one optimizer step of a rank: forward of every micro batch in flight, the loss, backward layer by layer while kept
tensors go and gradients come, the optimizer, and what stands outside of steps (evaluation, saving, exporting). The peak
is the largest of these moments. Bytes of a layer are `activations.py`'s, of states `states.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from trainwright.planner.activations import LayerActivations, layer_activations
from trainwright.planner.hardware import GIB
from trainwright.planner.job import Job, Stage
from trainwright.planner.program import chunk_tokens
from trainwright.planner.states import States, group_elements, stage_parameters, stage_states

Parts = dict[str, int]


@dataclass(frozen=True)
class Moment:
    """Bytes that torch counts as allocated, by part."""

    name: str
    parts: Parts

    @property
    def total(self) -> int:
        return sum(self.parts.values())


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
    """

    stages: tuple[StageMemory, ...]
    reserved_share: float
    slack: float
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
        return max(self.allocated, min(int(self.allocated * self.reserved_share), self.capacity - outside))

    @property
    def needed(self) -> int:
        return int(self.allocated * self.slack) + self.context + self.communicators

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
    return MemoryPlan(
        tuple(_Walk(job, stage).run() for stage in job.stages),
        job.program.reserved,
        job.program.slack,
        int((job.program.context_gib or calibration.context_gib) * GIB),
        int(calibration.communicator_gib * GIB) * groups,
        int(job.cluster.card.memory_gib * GIB),
    )


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


class _Walk:
    """One optimizer step of one stage's rank."""

    def __init__(self, job: Job, stage: Stage) -> None:
        self.job, self.stage, self.program = job, stage, job.program
        self.items = stage_parameters(job, stage)
        self.states = stage_states(job, stage)
        self.by_layer = {layer: [item for item in self.items if item.layer == layer] for layer in stage.layers}
        self.outer = [item for item in self.items if item.layer is None]
        self.activations = self._activations()
        self.device = "cpu" if job.cluster.card.name == "CPU" else "gpu"

    def _activations(self) -> dict[int, LayerActivations]:
        """Of every layer; equal layers are counted once."""
        made: dict[tuple[object, ...], LayerActivations] = {}
        found = {}
        for layer in self.stage.layers:
            trained = tuple(item.trained for item in self.by_layer[layer])
            key = (id(self.job.block(layer)), trained)
            if key not in made:
                made[key] = layer_activations(self.job, layer)
            found[layer] = made[key]
        return found

    def run(self) -> StageMemory:
        moments = [*self._step(), self._optimizer(), self._evaluation(), self._save()]
        return StageMemory(self.stage, self.states, tuple(moments))

    # ---- what stands through a whole step

    def _base(self, *, gradients: bool) -> Parts:
        states = self.states
        parts = {
            "weights": states.weights,
            "quantized weights": states.quantized,
            "adapters": states.adapters,
            "optimizer": 0 if self._offloads("optimizer") else states.optimizer,
            "gradients": states.gradients if gradients else 0,
            "workspaces": int(self.program.workspace_gib * GIB),
            "communication": int(self.program.bucket_gib * GIB) if self.job.layout.world_size > 1 else 0,
        }
        return {name: size for name, size in parts.items() if size}

    def _offloads(self, what: str) -> bool:
        return self.job.recipe.parallel.offload in (what, "all")

    def _gathered(self) -> Parts:
        """Whole weights of a running layer and its neighbours, and what stays whole through the step."""
        program, layout = self.program, self.job.layout
        if self.job.shards == 1:
            cast = program.cast * group_elements(self.job, [item for item in self.items if item.quantization is None])
            return {"weights in compute type": cast} if cast else {}
        outer = group_elements(self.job, self.outer) * program.compute if program.outer_gathered else 0
        layer = max((group_elements(self.job, items) for items in self.by_layer.values()), default=0)
        if layout.zero >= 3:
            return {"gathered weights": outer + int(program.gathered_layers * layer * program.compute)}
        if layout.zero >= program.weights_sharded_from:
            return {"gathered weights": group_elements(self.job, self.items) * program.compute}
        return {}

    def _reducing(self) -> int:
        """Whole gradients of a layer before they are summed and sharded."""
        if self.job.shards == 1:
            return 0
        sizes = [group_elements(self.job, items, trained=True) for items in self.by_layer.values()]
        layer = max(sizes, default=0)
        return int(layer * (self.program.compute + self.program.reducing_layers * self.program.reduce))

    # ---- moments

    def _step(self) -> list[Moment]:
        """The loss, where everything is kept, and the fullest point of the backward pass."""
        job = self.job
        again = job.accumulation > 1
        kept = {layer: self._held(layer) for layer in self.stage.layers}
        in_flight = self.stage.in_flight
        standing = self._base(gradients=again) | self._gathered()
        everything = int(in_flight * sum(kept.values())) + self._outer_kept()
        loss = self._loss() if self.stage.head else {}
        at_loss = Moment("loss", standing | {"activations": everything} | loss)
        if not any(item.trained for item in self.items):
            return [at_loss]
        moments = [at_loss]
        layers = list(reversed(self.stage.layers))
        own = self._own_gradients()
        waiting = everything
        come = own["outer"] if not again else 0
        loss_kept = self._loss_kept() if self.stage.head else 0
        best: Moment | None = None
        for layer in layers:
            activations = self.activations[layer]
            running = activations.work + max(0, activations.total - kept[layer])
            parts = standing | {
                "activations": waiting,
                "recomputed and gradients of a layer": running + loss_kept,
                "gradients": standing.get("gradients", 0) + come,
                "reduction buffers": self._reducing(),
            }
            here = Moment("backward", {name: size for name, size in parts.items() if size})
            best = here if best is None or here.total > best.total else best
            waiting -= kept[layer]
            come += own[layer] if not again else 0
            loss_kept = 0
        if best is not None:
            moments.append(best)
        return moments

    def _own_gradients(self) -> dict[object, int]:
        """Gradients that each layer's backward pass leaves on this rank."""
        from trainwright.planner.states import sum_states

        found: dict[object, int] = {}
        made: dict[object, int] = {}
        for layer, items in self.by_layer.items():
            key = (id(self.job.block(layer)), tuple(item.trained for item in items))
            if key not in made:
                made[key] = sum_states(self.job, items).gradients
            found[layer] = made[key]
        found["outer"] = sum_states(self.job, self.outer).gradients if self.stage.head else 0
        return found

    def _held(self, layer: int) -> int:
        activations = self.activations[layer]
        held = activations.held(self.job.recompute)
        return held if not self._offloads("activations") else 0

    def _outer_kept(self) -> int:
        """Token ids, labels, positions, rotary tables, and the stream before the head."""
        job = self.job
        rows = job.micro_batch * job.seq_len // job.layout.cp
        rope = next((block.self_attn.rope for block in job.config.layers[:1] if block.self_attn.rope), None)
        tables = rows * rope.rotary_dim * rope.channels * 4 if rope else 0
        ids = rows * (8 + 8 + 8 + 4)
        stream = job.stream_tokens * job.config.hidden_size * self.program.stream if self.stage.head else 0
        return tables + ids + stream

    def _head_elements(self) -> int:
        head = self.job.config.lm_head
        return -(-head.out_features // self.job.layout.tp) * head.in_features

    def _head_trained(self) -> bool:
        name = "embed_tokens.weight" if self.job.config.lm_head.tied else "lm_head.weight"
        return self.job.is_trained(name)

    def _loss(self) -> Parts:
        """One chunk of logits with its copies, the gradient of the stream, and what the head's gradient needs."""
        job, program = self.job, self.program
        vocab = -(-job.config.lm_head.out_features // job.layout.tp)
        chunk = chunk_tokens(program, job.tokens, vocab, self.device)
        parts = {"logits": int(chunk * vocab * program.logits), "loss": self._loss_kept()}
        if self._head_trained():
            parts["head's gradient"] = self._head_elements() * program.head_work
        return parts

    def _loss_kept(self) -> int:
        """The gradient of the stream that the loss hands to the last layer, and its norm's."""
        return 2 * self.job.tokens * self.job.config.lm_head.in_features * self.program.compute

    def _optimizer(self) -> Moment:
        parts = self._base(gradients=True)
        updated = self.states.gradients // max(1, self.program.gradient)
        work = updated * self.program.optimizer_work
        if self._offloads("optimizer"):
            work += updated * 2 * self.program.moment
        return Moment("optimizer", parts | ({"optimizer's copies": work} if work else {}))

    def _evaluation(self) -> Moment:
        """A forward pass that keeps nothing: one layer at work, and a chunk of logits."""
        works = [self.activations[layer].forward_work for layer in self.stage.layers]
        stream = 2 * self.job.stream_tokens * self.job.config.hidden_size * self.program.stream
        parts = self._base(gradients=False) | self._gathered()
        parts["activations"] = max(works, default=0) + stream + self._outer_kept()
        if self.stage.head:
            parts |= {"logits": self._loss()["logits"]}
        return Moment("evaluation", parts)

    def _save(self) -> Moment:
        """Checkpoints go from the shards to files; an export gathers one whole tensor at a time."""
        from math import prod

        whole = max((prod(item.shape) for item in self.items), default=0) * self.program.trained
        parts = self._base(gradients=False)
        if self.job.layout.world_size > 1:
            parts["gathered weights"] = whole
        return Moment("save", parts)
