"""Seconds of an optimizer step, and what follows from them. No torch.

Joins computation (`work.py`) and communication (`collectives.py`): what hides behind what, recomputation, the
pipeline's bubble, accumulation, the optimizer. Owns tokens/s and MFU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial

from trainwright.model.config import MoeConfig
from trainwright.planner.activations import kept_levels, mean_held
from trainwright.planner.collectives import Wires
from trainwright.planner.hardware import GIGA, TERA
from trainwright.planner.job import Job, LayerGroup, Stage
from trainwright.planner.states import (
    alone_elements,
    group_bytes,
    group_elements,
    stage_states,
    whole_bytes,
    whole_elements,
)
from trainwright.planner.work import Work, head_work, kind_work, kv_width

EARLIER_UPDATES = {"adamw8bit": 0.0167, "adamw": 0.003}
"""Seconds for 1e9 parameters that kernels took more, which are no longer ours: some rows were measured with them."""
EXPERTS_COUNTED, EXPERTS_UNEVEN = 5e-3, 0.15
"""Seconds of a layer in which the device stands, since the host asks how many rows come; and what the rank with the
fullest experts takes longer than the mean, as a share. Both from the row moe2 of `benchmarks/speed_gpu.py`. The first
is the host's work, 1.7 ms on one machine and 8 to 10 on two others: here stands the middle."""
MEETING = 1.6e-4
"""Seconds by which tensor parallel ranks are late for each other at each exchange, besides a collective's start. It is
the host's too: nothing to 0.33 ms on four machines (layers of 7B and 13B, rows of 4,096); here stands the middle."""
COPIED = 0.3
"""What is left of collectives' contention where copy engines move shards: 33 ms less of 46 (docs/decisions.md)."""


@dataclass(frozen=True)
class SpeedPlan:
    """One optimizer step. `parts`: seconds by what they are spent on; they sum to `step_seconds`."""

    step_seconds: float
    parts: dict[str, float]
    tokens_per_step: int
    world_size: int
    flops_per_token: float
    flops_per_token_causal: float
    computed_flops_per_token: float
    peak: float
    rows_per_step: int
    repeated: float
    """Share of the layers' forward products that is computed again."""
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens_per_step / self.step_seconds / self.world_size

    @property
    def samples_per_second(self) -> float:
        return self.rows_per_step / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs (PaLM) over the card's dense peak."""
        return self.tokens_per_second_per_gpu * self.flops_per_token / self.peak

    @property
    def mfu_causal(self) -> float:
        return self.tokens_per_second_per_gpu * self.flops_per_token_causal / self.peak

    @property
    def hfu(self) -> float:
        """What is really computed, recomputation too, over the peak."""
        return self.tokens_per_second_per_gpu * self.computed_flops_per_token / self.peak

    @property
    def tflops(self) -> float:
        return self.tokens_per_second_per_gpu * self.flops_per_token / TERA


def plan_speed(job: Job) -> SpeedPlan:
    """The slowest stage sets the pace of all."""
    stages = [job.once(("time", job.alike(stage)), partial(_StageTime, job, stage)) for stage in job.stages]
    slowest = max(stages, key=lambda stage: stage.micro_batch)
    parts = slowest.step_parts()
    bubble = _bubble(job, slowest)
    if bubble:
        parts["pipeline bubble"] = bubble
    trained = sum(item.numel for item in job.parameters if item.trained)
    whole = trained == sum(item.numel for item in job.parameters)
    model, causal = (
        job.config.flops_per_token(job.seq_len, convention, None if whole else trained)
        for convention in ("palm", "causal")
    )
    computed = sum(stage.computed_flops for stage in stages) * job.layout.tp * job.layout.cp
    repeated = sum(stage.repeated * len(stage.stage.layers) for stage in stages) / job.config.num_layers
    return SpeedPlan(
        sum(parts.values()),
        {name: seconds for name, seconds in parts.items() if seconds > 0},
        job.global_batch * job.seq_len,
        job.layout.world_size,
        model,
        causal,
        computed / (job.micro_batch * job.seq_len),
        job.cluster.card.rate(job.recipe.train.precision),
        job.global_batch,
        repeated,
        _notes(job),
    )


def _notes(job: Job) -> list[str]:
    """What a user should know of the speed that no figure says."""
    card, precision = job.cluster.card, job.recipe.train.precision
    if card.peak(precision) is not None:
        return []
    other = f"; set train.precision=fp16 for {card.fp16:g}" if card.fp16 and precision == "bf16" else ""
    return [
        f"{card.name} has no unit for {precision}: products run at its float32 peak of {card.fp32:g} TFLOP/s{other}"
    ]


def _bubble(job: Job, slowest: _StageTime) -> float:
    """Time that a stage waits for others to begin and end (Narayanan et al. 2021; Qi et al. 2024 for ZBV)."""
    pp, parallel = job.layout.pp, job.recipe.parallel
    if pp == 1:
        return 0.0
    share = 1.0
    if parallel.pp_schedule == "interleaved":
        share = 1 / parallel.pp_stages
    elif parallel.pp_schedule == "zbv":  # weight gradients fill the gaps where they are computed apart
        share = 1 / 6 if parallel.recompute == "none" and not job.program.compiled else 1 / 2
    return (pp - 1) * slowest.micro_batch * share


class _StageTime:
    """One rank of one pipeline stage."""

    def __init__(self, job: Job, stage: Stage) -> None:
        self.job, self.stage, self.program = job, stage, job.program
        self.wires = Wires(job.cluster, job.calibration, job.layout, job.shards)
        self.works = [(group, kind_work(job, group.layer)) for group in job.groups(stage)]
        self.head = head_work(job) if stage.head else Work()

    @cached_property
    def micro_batch(self) -> float:
        """Seconds of one micro batch, forward and backward, communication that is not hidden included."""
        return sum(self.parts.values())

    @property
    def computed_flops(self) -> float:
        """Of one micro batch on this rank, recomputation included."""
        layers = sum(group.count * (work.flops + self.repeated * work.forward_flops) for group, work in self.works)
        return layers + self.head.flops

    @cached_property
    def repeated(self) -> float:
        """Share of the layers' forward products that is computed again: the MLP's of a layer that keeps attention."""
        total = again = 0.0
        for group, work in self.works:
            _, of_attention, of_input = self._levels(group.layer)
            block = self.job.block(group.layer)
            inner = block.mlp.num_active_parameters() / block.num_active_parameters()
            total += group.count * work.forward_flops
            again += group.count * work.forward_flops * (of_input + of_attention * inner)
        return again / total if total else 0.0

    def _levels(self, layer: int) -> tuple[float, float, float]:
        """Shares of layers that keep all results, those of attention, and their input; the others keep everything."""
        levels, recompute = kept_levels(self.job, self.stage, layer), self.job.recompute
        if levels is None:
            return float(recompute == "selective"), 0.0, float(recompute == "full")
        whole, several = levels
        layers = len(self.stage.layers)
        return whole / layers, (several - whole) / layers, 1 - several / layers

    @cached_property
    def parts(self) -> dict[str, float]:
        """Seconds of one micro batch by part."""
        parts: dict[str, float] = {}
        for group, work in self.works:
            for name, seconds in self._layer(work, group).items():
                parts[name] = parts.get(name, 0.0) + group.count * seconds
        for name, (forward, backward) in self.head.parts.items():
            parts[name] = parts.get(name, 0.0) + forward + backward
        hidden = self.job.config.hidden_size * self.job.stream_tokens * self.program.compute
        parts["pipeline sends"] = 2 * self.wires.send("pp", hidden) if self.job.layout.pp > 1 else 0.0
        return parts

    def _layer(self, work: Work, group: LayerGroup) -> dict[str, float]:
        """One layer: its computation, what is computed again, and the communication that shows."""
        parts = {name: forward + backward for name, (forward, backward) in work.parts.items()}
        again = self._again(work, group.layer)
        if again:
            parts["recompute"] = again
        parts["activations to host"] = self._host_travel(work, group.layer)
        trained = group_elements(self.job, group, trained=True)
        parts["gradients added up"] = self._adding_up(trained, sum(alone_elements(self.job, group)))
        inner_forward, inner_backward = self._activations_travel()
        size = group_bytes(self.job, group)
        out, back = self._buffered(size, trained)
        # The host starts kernels while the device computes and sends; where it takes longer, the device waits for it.
        forward, backward = work.device
        started_again = work.host[0] * again / forward if forward else 0.0
        waits = max(0.0, work.host[0] - forward - inner_forward - out)
        device = backward + again + inner_backward + parts["gradients added up"] + back
        parts["host"] = waits + max(0.0, work.host[1] + started_again - device)
        parts["activations' travel"] = inner_forward + inner_backward
        if self.job.layout.ep > 1 and "experts" in parts:
            uneven = parts["experts"] + parts["activation"] + inner_forward + inner_backward
            parts["waiting for experts"] = EXPERTS_COUNTED + EXPERTS_UNEVEN * uneven
        forward, backward = self._weights_travel(size, trained)
        shown, slowed = 0.0, 0.0
        for travel, compute in ((forward, work.forward), (backward, work.backward + again)):
            hidden = min(travel, compute) * self.job.calibration.overlap * self.program.overlap
            shown += travel - hidden
            slowed += hidden * self.job.calibration.contention * (COPIED if self.job.copies else 1.0)
        parts["weights' travel"] = shown + slowed + out + back
        return parts

    def _host_travel(self, work: Work, layer: int) -> float:
        """Kept tensors on their way to host memory and back, as far as computation does not hide it."""
        job = self.job
        if not job.activations_in_host:
            return 0.0
        one = job.away * mean_held(job, self.stage, layer) / (job.cluster.card.host_link * GIGA)
        return max(0.0, one - work.forward) + max(0.0, one - work.backward)

    def _again(self, work: Work, layer: int) -> float:
        """Seconds of recomputation, the mean of the stage's layers; pieces of an MLP (`mlp_tokens`) once more in it."""
        job, tile = self.job, self.job.recipe.parallel.mlp_tokens
        attention, mlp = work.forward_of("attention"), work.forward_of("mlp")
        beside = work.forward_of("adapters", "unpacking", "rounding") * mlp / max(attention + mlp, 1e-12)
        inner = mlp + beside + work.forward_of("activation")
        least = work.forward_of("norms", "activation")
        results, of_attention, of_input = self._levels(layer)
        again = results * least + of_attention * (least - work.forward_of("activation") + inner)
        again += of_input * work.device[0]
        return (again + (inner if tile is not None and tile < job.tokens else 0.0)) * self.program.recompute

    def _adding_up(self, trained: int, alone: int) -> float:
        """Seconds in which a micro batch's gradients are added to those that wait: both are read, the sum is written.
        The step's first micro batch finds none. alone: of those, what no rank shares."""
        job, program = self.job, self.program
        moved = trained * (2 * program.reduce + program.compute)  # a whole gradient comes as the backward pass left it
        if not job.summed_once:
            shared = job.layout.zero >= program.gradients_sharded_from
            moved = 3 * program.gradient * (-(-trained // job.shards) + alone if shared else trained)
        bandwidth = job.cluster.card.bandwidth * GIGA * job.calibration.bandwidth
        return moved / bandwidth * (job.accumulation - 1) / job.accumulation

    def _weights_travel(self, size: int, trained: int) -> tuple[float, float]:
        """Collectives on one layer's weights (bytes; those in fewer bits travel packed) and gradients (elements),
        forward and backward."""
        job, wires, program = self.job, self.wires, self.program
        gather = wires.all_gather("shard", size)
        sums = wires.reduce_scatter("shard", trained * program.reduce)
        sums += wires.all_reduce("replicate", trained * program.reduce / max(1, job.shards))
        # A pipeline keeps weights gathered and sums gradients once a step, as ZeRO 0 and 1 do.
        if job.layout.zero >= 3 and not (job.fsdp and job.layout.pp > 1):
            return gather, gather + sums
        once = job.layout.zero <= 1 or job.layout.pp > 1
        sums = sums / job.accumulation if once else sums
        return (gather / job.accumulation if job.fsdp else 0.0), sums

    def _buffered(self, size: int, trained: int) -> tuple[float, float]:
        """Seconds in which one layer's weights are copied out of what was gathered, and its gradients into what is
        reduced and out of it, forward and backward: bytes that FSDP reads and writes, which no link bounds."""
        job, program = self.job, self.program
        if not job.fsdp or job.shards == 1:
            return 0.0, 0.0
        bandwidth = job.cluster.card.bandwidth * GIGA * job.calibration.bandwidth
        each_pass = job.layout.zero >= 3 and job.layout.pp == 1
        gather = 2 * size / bandwidth / (1 if each_pass else job.accumulation)
        sums = trained * (program.compute + 2 * self._wire) / bandwidth
        sums /= job.accumulation if job.summed_once else 1
        return gather, sums + (gather if each_pass else 0.0)

    @property
    def _wire(self) -> int:
        """Bytes of a gradient's element on its way to its shard."""
        return self.program.compute if self.job.copies_reduce else self.program.reduce

    def _activations_travel(self) -> tuple[float, float]:
        """Collectives on one layer's activations, which hide behind nothing."""
        job, wires, program = self.job, self.wires, self.program
        layout, split = job.layout, job.row_split
        stream = job.tokens * job.config.hidden_size * program.compute
        once = 4 * wires.all_gather("tp", stream)  # two gathers and two scatters, or two sums
        once += 4 * MEETING if layout.tp > 1 and program.name == "trainwright" else 0.0
        queries, keys = kv_width(job)
        if split.ulysses > 1:
            exchanged = job.tokens * (2 * queries + 2 * keys) * program.compute
            once += wires.all_to_all("cp", exchanged)
        ring = 0.0
        if split.ring > 1:
            ring = wires.all_gather("cp", 2 * job.tokens * keys * split.ring * program.compute)
        if layout.ep > 1:
            part = max((b.mlp for b in job.config.layers if isinstance(b.mlp, MoeConfig)), key=lambda part: part.top_k)
            # With a row go its weights and numbers of experts, in one of both directions, right behind it.
            row = job.config.hidden_size * program.compute + (4 * part.top_k if program.rows_once else 0)
            once += 2 * wires.all_to_all("ep", job.rows_sent(part) * row)
        forward = once + ring
        again = forward if job.recompute == "full" else 0.0
        return forward, once + ring + again

    def step_parts(self) -> dict[str, float]:
        """The whole step of this rank, bubble left out."""
        job = self.job
        parts = {name: seconds * job.accumulation for name, seconds in self.parts.items()}
        parts["first and last weights' travel"] = self._ends()
        parts["optimizer"] = self._optimizer()
        return parts

    def _ends(self) -> float:
        """Gathers and sums at the ends of a step, behind which nothing runs: embedding, head, and the ZeRO stages
        that talk once a step."""
        job, wires, program = self.job, self.wires, self.program
        if job.layout.world_size == 1:
            return 0.0
        outer = job.outer(self.stage)
        trained = whole_elements(job, outer, trained=True)
        ends = wires.all_gather("shard", whole_bytes(job, outer))
        ends += wires.reduce_scatter("shard", trained * self._wire)
        ends += wires.all_reduce("replicate", trained * program.reduce / max(1, job.shards))
        if 0 < job.layout.zero < program.weights_sharded_from:  # updated shards go back to all (ZeRO 1 and 2)
            layers = sum(group.count * group_elements(job, group, trained=True) for group, _ in self.works)
            ends += wires.all_gather("shard", (layers + trained) * program.compute)
        return ends

    def _optimizer(self) -> float:
        """Reads and writes weights, gradients and states once; the norm reads gradients before."""
        job, program = self.job, self.program
        states = stage_states(job, self.stage)
        bandwidth = job.cluster.card.bandwidth * GIGA * job.calibration.bandwidth
        trained = states.gradients / max(1, program.gradient)
        if job.states_in_host:
            return self._host_update(trained, states.weights + states.quantized + states.adapters)
        moved = 2 * states.optimizer + 2 * states.gradients + 2 * trained * program.trained
        each = program.optimizer_seconds
        if program.earlier_updates:
            each += EARLIER_UPDATES.get(job.recipe.train.optimizer, 0.0)
        return moved / bandwidth + program.step_seconds + trained / 1e9 * each

    def _host_update(self, trained: float, weights: int) -> float:
        """All weights (bytes) up for every gather, frozen ones too, gradients of `trained` ones down, and an update
        that the host's memory bounds (about 100 GB/s for all processes of a machine)."""
        job, program = self.job, self.program
        gathers = job.accumulation * 2 if job.layout.zero >= 3 else 1
        travel = (gathers * weights + trained * program.gradient) / (job.cluster.card.host_link * GIGA)
        here = min(job.cluster.gpus, job.cluster.gpus_per_node)
        return travel + trained * 28 * here / (100 * GIGA)
