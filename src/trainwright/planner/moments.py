"""What is allocated at each moment of one optimizer step of a rank, by part. No torch.

Walks the step: forward of every micro batch in flight, the loss, backward layer by layer while kept tensors go and
gradients come, the optimizer, and what stands outside of steps (evaluation, saving, building). Bytes of a layer are
`activations.py`'s, of states `states.py`'s; which moment is the fullest is `memory.py`'s to say.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainwright.model.config import Quantization
from trainwright.parallel.layout import shared_bytes
from trainwright.planner.activations import kept_levels, kind_activations, mean_held
from trainwright.planner.hardware import GIB
from trainwright.planner.job import Job, Stage
from trainwright.planner.program import HEAD_SLICE, HEAD_TILE, ROUNDED_AT_ONCE, chunk_tokens
from trainwright.planner.states import (
    States,
    alone_elements,
    group_bytes,
    group_elements,
    group_states,
    sum_states,
    whole_bytes,
    whole_elements,
)

Parts = dict[str, int]


@dataclass(frozen=True)
class Moment:
    """Bytes that torch counts as allocated, by part."""

    name: str
    parts: Parts

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def wait_whole(job: Job) -> bool:
    """Whether gradients wait whole for the step's last micro batch, which sums them over ranks."""
    return job.summed_once and job.accumulation > 1


def _rounding(numel: int, format_: Quantization | None) -> int:
    """Bytes beside a whole float32 tensor while it is rounded."""
    if format_ is None:
        return 0
    result, work = {"nf4": (0.5625, 8.5), "int8": (1.0, 7.0), "fp8": (1.0, 4.0)}[format_.kind]
    return int(result * numel + max(result * numel, work * min(numel, ROUNDED_AT_ONCE)))


class Walk:
    """One optimizer step of one stage's rank."""

    def __init__(self, job: Job, stage: Stage, states: States) -> None:
        self.job, self.stage, self.program, self.states = job, stage, job.program, states
        self.groups = job.groups(stage)
        self.outer = job.outer(stage)
        self.activations = {group.layer: kind_activations(job, group.layer) for group in self.groups}
        self.device = "cpu" if job.cluster.card.name == "CPU" else "gpu"

    def moments(self) -> list[Moment]:
        return [*self._step(), *self._gather(), self._optimizer(), self._evaluation(), self._save(), *self._build()]

    def _whole(self, *, trained: bool = False) -> int:
        """Elements of all of the stage's weights after tensor and expert parallelism."""
        layers = sum(group.count * group_elements(self.job, group, trained=trained) for group in self.groups)
        return layers + whole_elements(self.job, self.outer, trained=trained)

    def _largest_layer(self, *, trained: bool = False) -> int:
        sizes = [group_elements(self.job, group, trained=trained) for group in self.groups]
        return max(sizes, default=0)

    # ---- what stands through a whole step

    def _base(self, *, gradients: bool) -> Parts:
        states, here = self.states, 0 if self.job.states_in_host else 1
        parts = {
            "weights": here * states.weights,
            "quantized weights": here * states.quantized,
            "adapters": here * states.adapters,
            "optimizer": here * states.optimizer,
            "gradients": here * states.gradients if gradients else 0,
            "workspaces": int(self.program.workspace_gib * GIB),
            "communication": int(self.program.bucket_gib * GIB) if self.job.layout.world_size > 1 else 0,
            "copies' buffers": self._copies() + self._exchanges(),
        }
        return {name: size for name, size in parts.items() if size}

    def _copies(self) -> int:
        """What peers read, kept from the first pass on: two layers' weights, one's gradients, and one buffer for both
        of an embedding and a head of one size."""
        if not self.job.copies:
            return 0
        weights = max((group_bytes(self.job, group) for group in self.groups), default=0)
        gradients = self._largest_layer(trained=True) * self.program.compute if self.job.copies_reduce else 0
        first, last = ([item for item in self.outer if (item.kind == "head") == head] for head in (False, True))
        parts = [self.outer] if self.job.config.lm_head.tied else [first, last]
        ends = {shared_bytes(whole_bytes(self.job, part)) for part in parts if part}
        return 2 * shared_bytes(weights) + shared_bytes(gradients) + sum(ends)

    def _exchanges(self) -> int:
        """The two buffers of `parallel/overlap.py`: what is gathered, and what is summed over the ranks."""
        if not self.program.gathers_again:
            return 0
        size = self.job.tokens * self.job.config.hidden_size * self.program.compute
        return 2 * (size if self.device == "cpu" else shared_bytes(size))

    def _gathered(self, *, backward: bool) -> Parts:
        """Whole weights that exist beside the shards: those of running layers, or of all where they stay gathered."""
        job, program, zero = self.job, self.program, self.job.layout.zero
        if not job.fsdp and (zero < program.weights_sharded_from or job.shards == 1):
            return {}
        layer = max((group_bytes(job, group) for group in self.groups), default=0)
        layers = int(program.gathered_layers * layer)
        if not job.fsdp:
            return {"gathered weights": layers + (whole_bytes(job, self.outer) if program.outer_gathered else 0)}
        if zero < 3 or job.layout.pp > 1:
            everything = sum(group.count * group_bytes(job, group) for group in self.groups)
            return {"gathered weights": everything + whole_bytes(job, self.outer)}
        tied = job.config.lm_head.tied
        head = [item for item in self.outer if tied or item.kind == "head"]
        outer = whole_bytes(job, head) if tied or not backward else 0
        return {"gathered weights": outer + (layers if backward or not self.stage.head else 0)}

    def _accumulated(self) -> Parts:
        """Gradients of earlier micro batches."""
        whole = self._whole(trained=True) * self.program.reduce
        if wait_whole(self.job):
            return {"gradients": whole}
        return {} if self.job.states_in_host else {"gradients": self.states.gradients}

    def _reducing(self) -> int:
        """Whole gradients of a layer before they are summed and sharded."""
        if not self.job.fsdp and self.job.shards == 1:
            return 0
        reduced = 0 if wait_whole(self.job) else self.program.reducing_layers * self.program.reduce
        # Experts that no other rank holds: one matrix's gradient, as the product leaves it and as it is kept.
        alone = max((size for group in self.groups for size in alone_elements(self.job, group)), default=0)
        made = alone * (self.program.cast + self.program.gradient)
        return int(self._largest_layer(trained=True) * (self.program.compute + reduced)) + made

    # ---- moments

    def _step(self) -> list[Moment]:
        """The loss, where everything is kept, and the fullest point of the backward pass.

        With no more micro batches than are in flight, the first one comes back before any has left a gradient; those
        after it find gradients and one micro batch less.
        """
        job, in_flight = self.job, self.stage.in_flight
        if job.accumulation > in_flight:
            return self._pass(in_flight, self._accumulated())
        later = self._pass(in_flight - 1, self._accumulated()) if in_flight > 1 else []
        return self._pass(in_flight, {}) + later

    def _pass(self, in_flight: float, gradients: Parts) -> list[Moment]:
        """The moments of a micro batch that comes back while `in_flight` are kept."""
        held = {group.layer: mean_held(self.job, self.stage, group.layer) for group in self.groups}
        kept = sum(group.count * held[group.layer] for group in self.groups)
        if self.job.activations_in_host:  # the last layer's stay, or one layer's are there and the next one's come
            kept = min(kept, int(kept * (1 - self.job.away)) + 2 * max(held.values(), default=0))
        base = self._base(gradients=False) | gradients
        everything = int(in_flight * kept) + self._outer_kept()
        loss = self._loss() if self.stage.head else {}
        at_loss = base | self._gathered(backward=False) | {"activations": everything} | loss
        moments = [Moment("loss" if self.stage.head else "forward", at_loss)]
        if self.job.trained:
            moments.append(self._backward(base | self._gathered(backward=True), everything, held))
        return moments

    def _backward(self, standing: Parts, everything: int, held: dict[int, int]) -> Moment:
        """Layer by layer from the last: kept tensors go, gradients come (from the second micro batch on they are there
        already), and the running layer has its gradients and what it computes again."""
        device = 0 if self.job.states_in_host else 1
        own = {group.layer: device * group_states(self.job, group).gradients for group in self.groups}
        waiting, at_once = everything, self.job.recipe.train.optimizer_in_backward
        come = device * sum_states(self.job, self.outer).gradients if self.stage.head else 0
        best: Moment | None = None
        kinds = [self.job.kinds[layer] for layer in sorted(self.stage.layers, reverse=True)]
        reducing = self._reducing()
        for at, kind in enumerate(kinds):
            come_now, waiting_now = 0 if at_once else come, waiting
            waiting, come = waiting - int(held[kind] * (1 - self.job.away)), come + own[kind]
            if 0 < at < len(kinds) - 1 and kinds[at - 1] == kind == kinds[at + 1]:
                continue  # between equal layers both change evenly: the most is at an end
            activations = self.activations[kind]
            # Where compiled layers keep more or less, the last ones keep most.
            running = activations.work + max(0, activations.total - (held[kind] if at else self._richest(kind)))
            parts = standing | {
                "activations": waiting_now,
                "a layer's backward pass": running,
                "gradients": standing.get("gradients", come_now),
                "reduction buffers": reducing,
            }
            here = Moment("backward", {name: size for name, size in parts.items() if size})
            best = here if best is None or here.total > best.total else best
        return best or Moment("backward", standing)

    def _richest(self, layer: int) -> int:
        """What the layer that comes back first keeps: the one of the highest level."""
        kept, levels = self.activations[layer], kept_levels(self.job, self.stage, layer)
        if levels is None:
            return mean_held(self.job, self.stage, layer)
        whole, several = levels
        return kept.entry + (kept.results if whole else kept.attention_results if several else 0)

    def _outer_kept(self) -> int:
        """Token ids, labels, positions, rotary tables."""
        job = self.job
        rows = job.micro_batch * job.seq_len // job.layout.cp
        rope = next((block.self_attn.rope for block in job.config.layers[:1] if block.self_attn.rope), None)
        tables = rows * rope.rotary_dim * rope.channels * 4 if rope else 0
        ids = rows * (8 + 8 + 8 + 4)
        return tables + ids

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
        if program.name == "trainwright" and job.config.lm_head.quantization is not None:
            return {"logits": self._sliced_logits(vocab), "loss": self._loss_kept()}
        chunk = chunk_tokens(program, job.tokens, vocab, self.device, self._head_trained())
        each = program.logits
        if program.name == "trainwright" and job.layout.tp > 1:
            each = 4 if program.compute == 4 else 6  # over a split vocabulary, softmax is taken in place
        logits = chunk * vocab * each
        if self._head_trained():  # a product for the head's gradient comes when only the logits' gradient is left
            logits = max(logits, chunk * vocab * program.compute + self._head_elements() * program.head_product)
        parts = {"logits": int(logits), "loss": self._loss_kept()}
        if self._head_trained():
            parts["head's gradient"] = self._head_elements() * program.head_work
            if not job.fsdp:
                parts["weights in compute type"] = self._head_elements() * program.cast
        return parts

    def _sliced_logits(self, vocab: int) -> int:
        """A head in fewer bits: one tile of logits and its narrow copy, a slice of the weight and what it is made of,
        and two float32 gradients of the tile's tokens (`adapt/head.py`)."""
        compute, hidden = self.program.compute, self.job.config.lm_head.in_features
        rows = min(HEAD_SLICE, vocab)
        tokens = min(self.job.tokens, HEAD_TILE // rows)
        logits = tokens * rows * (4 if compute == 4 else 4 + compute)
        return logits + 2 * tokens * hidden * 4 + 2 * rows * hidden * compute

    def _loss_kept(self) -> int:
        """The stream as the last norm keeps it, that norm's output, and its gradient that the loss makes."""
        stream = self.job.stream_tokens * self.job.config.hidden_size * self.program.stream
        return stream + 2 * self.job.tokens * self.job.config.lm_head.in_features * self.program.compute

    def _gather(self) -> list[Moment]:
        """The start of a later micro batch: what was gathered stands beside the flat buffer that it came in."""
        job = self.job
        if not job.fsdp:
            return []
        sizes = [group_bytes(job, group) for group in self.groups]
        buffer = max([whole_bytes(job, self.outer), *sizes])
        parts = self._base(gradients=False) | self._accumulated() | self._gathered(backward=True)
        return [Moment("gather", parts | {"gather buffer": buffer})]

    def _build(self) -> list[Moment]:
        """Random weights: each is drawn whole in float32 on every rank (`model/init.py`), and rounded some rows at a
        time, with what that takes, or all rows' results stand beside their parts (`kernels/quantized.py`)."""
        if self.job.recipe.model.path is not None or self.program.name != "trainwright" or self.job.states_in_host:
            return []
        items = [item for group in self.groups for item in group.parameters] + list(self.outer)
        sizes = [4 * item.numel + _rounding(item.numel, item.quantization) for item in items]
        parts = self._base(gradients=False) | {"optimizer": 0, "drawn weights": max(sizes, default=0)}
        return [Moment("build", {name: size for name, size in parts.items() if size})]

    def _optimizer(self) -> Moment:
        """States and gradients, and what an optimizer that is not fused copies."""
        if self.job.recipe.train.optimizer_in_backward:  # the largest update is the first or the last one
            states = [sum_states(self.job, [item]) for item in self.outer]
            gradients = max((state.gradients for state in states), default=0)
            parts = self._base(gradients=False) | {"gradients": gradients}
        else:
            gradients, parts = self.states.gradients, self._base(gradients=True)
        work = gradients // max(1, self.program.gradient) * self.program.optimizer_work
        return Moment("optimizer", parts | ({"optimizer's copies": work} if work else {}))

    def _evaluation(self) -> Moment:
        """A forward pass that keeps nothing: one layer at work, and a chunk of logits."""
        works = [activations.forward_work for activations in self.activations.values()]
        stream = 2 * self.job.stream_tokens * self.job.config.hidden_size * self.program.stream
        parts = self._base(gradients=False) | self._gathered(backward=True)
        parts["activations"] = max(works, default=0) + stream + self._outer_kept()
        if self.stage.head:
            # Without gradients, logits and their log softmax in float32.
            parts["logits"] = int(self._loss()["logits"] * max(1.0, 8 / self.program.logits))
        return Moment("evaluation", parts)

    def _save(self) -> Moment:
        """Checkpoints go from the shards to files; an export gathers one whole tensor at a time."""
        items = [item for group in self.groups for item in group.parameters] + list(self.outer)
        whole = max((item.numel for item in items), default=0) * self.program.trained
        parts = self._base(gradients=False)
        if self.job.layout.world_size > 1:
            parts["gathered weights"] = whole
        return Moment("save", parts)
