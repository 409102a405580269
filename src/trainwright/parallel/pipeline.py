"""Pipeline parallel: the layers in stages over ranks, micro batches passing through them on torch's schedules.

    1f1b          one stage a rank (Narayanan et al. 2019)
    interleaved   several stages a rank, smaller bubbles, more messages (Narayanan et al. 2021)
    zbv           two stages a rank in a V, weight gradients fill the bubbles (Qi et al. 2023, section 6)

The loss is computed inside the last stage by the model's own labels path, so no logits are held, and each micro batch's
share of the step's loss is differentiated as on one process. Owns the schedule, the messages, the copies of a tied
table, and passes without gradients. Cutting the model into stages is `stages.py`'s work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

from trainwright.model.config import ModelConfig, MoeConfig
from trainwright.model.transformer import LossOutput, Transformer
from trainwright.parallel.sequence import whole_row_facts
from trainwright.parallel.split import stages_of_rank
from trainwright.parallel.stages import Cut

Inputs = Mapping[str, Any]
"""Keyword arguments of one pass of the model: tensors on the device."""


class Pipeline:
    """Sends micro batches through the stages of all pipeline ranks."""

    def __init__(
        self,
        model: Transformer,
        stages: Sequence[Transformer],
        cut: Cut,
        mesh: DeviceMesh,
        *,
        device: torch.device,
        stream_dtype: torch.dtype,
        stream_shape: Callable[[int, int], tuple[int, int]],
        split_backward: bool = True,
    ) -> None:
        """`stream_shape(rows, length)`: what of a micro batch's [rows, length] stream this rank passes on.

        split_backward: zbv may take weight gradients later than input gradients. Not with recomputed or compiled
        layers, which would run their forward twice: then both come at once, and the bubbles stay.
        """
        self.model, self.cut, self.mesh, self.device = model, cut, mesh, device
        self.stream_dtype, self.stream_shape, self.split_backward = stream_dtype, stream_shape, split_backward
        self.stages = dict(zip(cut.own, stages, strict=True))
        self.config = model.config
        self._calls = {index: _StageCall(index, stage, self) for index, stage in self.stages.items()}
        self._schedules: dict[tuple[int, int, int], Any] = {}
        self._in_flight: list[tuple[Any, Tensor]] = []
        self._share: Callable[[LossOutput], Tensor] | None = None
        self._ends = _end_group(cut, mesh) if self.config.lm_head.tied else None

    def __str__(self) -> str:
        whole = self.cut.schedule == "zbv" and not self.split_backward
        bubbles = "; recomputed or compiled layers take both gradients at once, so no bubble is filled" if whole else ""
        return f"pipeline: {self.cut}{bubbles}"

    # ---- training ----

    def forward_backward(self, batches: Sequence[Inputs], share: Callable[[LossOutput], Tensor]) -> Tensor:
        """Gradients of the sum of `share(output)` over the micro batches; -> the sum of their token losses, float32.

        Only ranks with the last stage see a loss, the others return zero. Every rank gives the same micro batches, all
        of one shape.
        """
        self._prepare(batches)
        rows, length = batches[0]["input_ids"].shape
        schedule = self._schedule(len(batches), rows, length)
        self._share = share
        numbers = torch.arange(len(batches))
        first = (numbers,) if 0 in self.stages else ()
        target = numbers if self.cut.last in self.stages else None
        schedule.step(*first, target=target, return_outputs=False, micro_batch=numbers)
        self._share_tied_gradient()
        return self._collect()

    def _prepare(self, batches: Sequence[Inputs]) -> None:
        """What stages that do not see the tokens need to know of them."""
        inputs = []
        for batch in batches:
            rest = {name: value for name, value in batch.items() if name != "input_ids"}
            inputs.append({"input_ids": batch["input_ids"], **whole_row_facts(self.model, batch["input_ids"], **rest)})
        for call in self._calls.values():
            call.inputs, call.outputs = inputs, []
            call.stage.alibi_slopes = self.model.alibi_slopes

    def _collect(self) -> Tensor:
        """The sum of the token losses of the last passes."""
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for call in self._calls.values():
            for output in call.outputs:
                total += output.loss_sum.detach()
            call.inputs, call.outputs = [], []
        return total

    def _loss(self, output: tuple[Tensor, ...], target: Tensor) -> Tensor:
        """What a schedule differentiates for one micro batch."""
        assert self._share is not None
        return self._share(LossOutput(*output))

    def _schedule(self, count: int, rows: int, length: int) -> Any:
        """The schedule for `count` micro batches of this shape, made once."""
        key = (count, rows, length)
        if key not in self._schedules:
            stages = [self._stage(index, rows, length) for index in self.cut.own]
            self._schedules[key] = self._make(stages, count)
        return self._schedules[key]

    def _make(self, stages: list[Any], count: int) -> Any:
        options: dict[str, Any] = {"loss_fn": self._loss, "scale_grads": False}
        if self.cut.schedule == "zbv":
            return ScheduleZBVZeroBubble(stages, count, **options)
        if self.cut.schedule == "interleaved":
            return _gather_once(ScheduleInterleaved1F1B(stages, count, **options))
        # 1F1B is defined from as many micro batches as stages on; with fewer, all forwards come before all backwards.
        kind = Schedule1F1B if count >= len(self.cut.stages) else ScheduleGPipe
        return kind(stages[0], count, **options)

    def _stage(self, index: int, rows: int, length: int) -> PipelineStage:
        """torch's view of one stage, with its shapes said, so that nothing is run to find them."""
        stream = self._stream((*self.stream_shape(rows, length), self.config.hidden_size))
        number = torch.empty(1, dtype=torch.int64, device="meta")
        scalars = (
            torch.empty((), device="meta", requires_grad=True),
            torch.empty((), dtype=torch.int64, device="meta"),
        )
        return _Stage(
            self.stages[index],
            index,
            len(self.cut.stages),
            self.device,
            input_args=(number,) if index == 0 else stream,
            output_args=(*scalars, scalars[0]) if index == self.cut.last else stream,
            group=self.mesh.get_group(),
            # The head makes both its gradients at once, and cannot be differentiated twice.
            dw_builder=None if self.split_backward and index != self.cut.last else _nothing_later,
        )

    def _stream(self, shape: tuple[int, ...], device: torch.device | str = "meta") -> tuple[Tensor, ...]:
        """Tensors like those that pass between stages: the stream, and with experts the router's statistics."""
        options: dict[str, Any] = {"device": device, "requires_grad": device == "meta"}
        stream = torch.empty(shape, dtype=self.stream_dtype, **options)
        experts = router_size(self.config)
        return (stream, torch.empty(2, experts, dtype=torch.float32, **options)) if experts else (stream,)

    # ---- a tied table ----

    def _share_tied_gradient(self) -> None:
        """The first stage's lookup and the last stage's head are one weight: both get the sum of both gradients."""
        ends = self._tied()
        grads = [weight.grad for weight in ends if weight.grad is not None]
        if not grads:
            return
        local = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads]
        if len(local) == 2:
            total = local[0] + local[1]
            for grad in local:
                grad.copy_(total)
        elif self._ends is not None:
            dist.all_reduce(local[0], group=self._ends)

    def _tied(self) -> list[nn.Parameter]:
        """This rank's copies of a tied table: the first stage's and the last stage's."""
        if not self.config.lm_head.tied:
            return []
        ends = []
        if 0 in self.stages:
            ends.append(self.stages[0].embed_tokens)
        if self.cut.last in self.stages:
            ends.append(self.stages[self.cut.last].lm_head)
        return [module.weight for module in ends if module is not None]  # type: ignore[misc]

    @property
    def copies(self) -> list[nn.Parameter]:
        """Parameters that another stage has too and counts: left out of a global norm here."""
        return self._tied()[-1:] if self.cut.last in self.stages else []

    # ---- passes without gradients ----

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Any:
        """One pass. With labels a LossOutput, zero on ranks without the last stage; else the logits, on every rank.

        No rank waits for a later one unless logits are asked for, so passes one after another overlap.
        """
        self._prepare([{"input_ids": input_ids, "attention_mask": attention_mask, **inputs}])
        output: Any = None
        number = torch.zeros(1, dtype=torch.int64)
        for index, stage in self.stages.items():
            if index == 0:
                given: tuple[Tensor, ...] = (number,)
            elif index - 1 not in self.stages:
                given = self._receive(index - 1)
            output = stage(*given, micro_batch=number)
            given = _as_tuple(output)
            if index < self.cut.last and index + 1 not in self.stages:
                self._send(given, index + 1)
        self._collect()
        if inputs.get("labels") is None:
            return self._broadcast(output)
        if self.cut.last not in self.stages:
            zero = torch.zeros((), device=self.device)
            return LossOutput(zero, zero.long(), zero)
        return LossOutput(*output)

    def _rank_of(self, stage: int) -> int:
        """The global rank that has a stage."""
        pp = self.mesh.size()
        per_rank = len(self.cut.own)
        owner = next(r for r in range(pp) if stage in stages_of_rank(r, pp, self.cut.schedule, per_rank))
        return dist.get_global_rank(self.mesh.get_group(), owner)

    def _send(self, tensors: tuple[Tensor, ...], stage: int) -> None:
        """Shapes first, so that the receiver needs to know nothing; returns before they have arrived."""
        rank, group = self._rank_of(stage), self.mesh.get_group()
        self._in_flight = [work for work in self._in_flight if not work[0].is_completed()]
        for tensor in (torch.tensor(tensors[0].shape, device=self.device), *tensors):
            kept = tensor.contiguous()
            self._in_flight.append((dist.isend(kept, rank, group=group), kept))

    def _receive(self, stage: int) -> tuple[Tensor, ...]:
        rank, group = self._rank_of(stage), self.mesh.get_group()
        shape = torch.empty(3, dtype=torch.int64, device=self.device)
        dist.recv(shape, rank, group=group)
        tensors = self._stream(tuple(shape.tolist()), self.device)
        for tensor in tensors:
            dist.recv(tensor, rank, group=group)
        return tensors

    def _broadcast(self, logits: Tensor) -> Tensor:
        """The last stage's logits on every rank."""
        rank, group = self._rank_of(self.cut.last), self.mesh.get_group()
        has = self.cut.last in self.stages
        shape = torch.tensor(logits.shape if has else (0, 0, 0), device=self.device)
        dist.broadcast(shape, rank, group=group)
        whole = logits.float().contiguous() if has else torch.empty(shape.tolist(), device=self.device)
        dist.broadcast(whole, rank, group=group)
        return whole

    # ---- what a model has ----

    @property
    def training(self) -> bool:
        return self.model.training

    def train(self, mode: bool = True) -> Pipeline:
        for stage in (self.model, *self.stages.values()):
            stage.train(mode)
        return self

    def eval(self) -> Pipeline:
        return self.train(False)

    def positions(self, *args: Any) -> Tensor:
        return self.model.positions(*args)


class _Stage(PipelineStage):
    """Before the first step every stage greets its neighbours, so that connections exist. A V has neighbours on one
    rank, and torch 2.11 would send to itself, for which gloo has no connection."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


class _StageCall:
    """Turns a schedule's call of a stage (a stream and the number of a micro batch) into a pass of the Transformer."""

    def __init__(self, index: int, stage: Transformer, pipeline: Pipeline) -> None:
        self.index, self.stage = index, stage
        self.experts = router_size(pipeline.config)
        self.inputs: list[dict[str, Any]] = []
        self.outputs: list[LossOutput] = []
        stage.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True)
        stage.register_forward_hook(self.after)

    def before(self, stage: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        """The stream from the stage before, or the tokens; everything else from the micro batch itself."""
        given = dict(self.inputs[int(kwargs["micro_batch"])])
        tokens = given.pop("input_ids")
        if self.experts:
            zero = torch.zeros(2, self.experts, device=tokens.device)
            given["router_statistics"] = zero if self.index == 0 else args[1]
        return (tokens if self.index == 0 else args[0],), given

    def after(self, stage: nn.Module, args: Any, output: Any) -> Any:
        """Schedules take plain tuples."""
        if isinstance(output, LossOutput):
            self.outputs.append(output)
            return tuple(output)
        return None


def _gather_once(schedule: Any) -> Any:
    """The same schedule with each stage's weights gathered once a step. torch lets go of all but three stages of a rank
    and gathers the others again in every round."""

    def again(stage: int, actions: Sequence[Any]) -> bool:
        return any(action.computation_type.name == "UNSHARD" and action.stage_index == stage for action in actions)

    for rank, actions in schedule.pipeline_order_with_comms.items():
        kept: list[Any] = []
        for place, action in enumerate(actions):
            kind, stage = action.computation_type.name, action.stage_index
            gathered = kind == "UNSHARD" and again(stage, kept)
            if not gathered and not (kind == "RESHARD" and again(stage, actions[place:])):
                kept.append(action)
        schedule.pipeline_order_with_comms[rank] = kept
    return schedule


def _nothing_later() -> Callable[[], None]:
    """torch's hook for weight gradients of one's own: with it, input and weight gradients come in one backward pass."""
    return lambda: None


def router_size(config: ModelConfig) -> int:
    """Experts whose statistics pass from stage to stage; 0 where no load-balancing loss asks for them."""
    sizes = [block.mlp.experts.num_experts for block in config.layers if isinstance(block.mlp, MoeConfig)]
    return max(sizes, default=0) if config.aux_loss_coef else 0


def _as_tuple(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _end_group(cut: Cut, mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The two ranks that hold the first and the last stage, where they are two. Every process calls this."""
    pp = mesh.size()
    ends = [
        next(r for r in range(pp) if end in stages_of_rank(r, pp, cut.schedule, len(cut.own))) for end in (0, cut.last)
    ]
    if ends[0] == ends[1]:
        return None
    everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    own = dist.get_process_group_ranks(mesh.get_group())
    dist.all_gather_object(everyone, own)
    lines = sorted({tuple(line) for line in everyone})
    group, _ = dist.new_subgroups_by_enumeration([[line[end] for end in ends] for line in lines])
    return group
