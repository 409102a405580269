"""How a model becomes pipeline stages: where it is cut, what each stage holds, what its parts cost by the clock.

A stage is the Transformer with parts removed. Where to cut, given what parts cost, is `split.py`'s choice; sending
micro batches through stages is `pipeline.py`'s work.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainwright.device import synchronize
from trainwright.model.config import BlockConfig, ModelConfig
from trainwright.model.transformer import LossOutput, Transformer
from trainwright.parallel.split import PartCosts, Schedule, split_layers, stages_of_rank


@dataclass(frozen=True)
class Cut:
    """Which layers each stage has, and which stages this rank has."""

    schedule: Schedule
    stages: tuple[range, ...]
    own: tuple[int, ...]

    @classmethod
    def of(
        cls,
        costs: PartCosts,
        *,
        rank: int,
        pp: int,
        schedule: Schedule,
        per_rank: int = 2,
        counts: Sequence[int] | None = None,
    ) -> Cut:
        own = stages_of_rank(rank, pp, schedule, per_rank)
        return cls(schedule, split_layers(costs, pp * len(own), counts, len(own)), own)

    @property
    def last(self) -> int:
        return len(self.stages) - 1

    def __str__(self) -> str:
        sizes = ", ".join(str(len(layers)) for layers in self.stages)
        return f"{self.schedule} over {len(self.stages)} stages of {sizes} layers, with the embedding and the head"


def cut_model(model: Transformer, cut: Cut) -> list[Transformer]:
    """Removes from `model`, in place, what other ranks have; -> one model a stage of this rank, which share its parts.

    Shard and wrap the stages; parameters and their names are `model`'s.
    """
    layers = [layer for stage in cut.own for layer in cut.stages[stage]]
    model.keep(layers, embedding=0 in cut.own, head=cut.last in cut.own)
    if len(cut.own) == 1:
        return [model]
    if 0 in cut.own and cut.last in cut.own and model.config.lm_head.tied:
        _untie(model)
    return [_view(model, cut.stages[stage], embedding=stage == 0, head=stage == cut.last) for stage in cut.own]


def _untie(model: Transformer) -> None:
    """Two stages of this rank need the table and are sharded apart: the head gets a table of its own."""
    model.tied = False
    head: Any = model.lm_head
    head.weight = nn.Parameter(torch.empty_like(head.weight))


def without_twins(
    model: Transformer, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Named weights and states without the head's copy of a tied table, and (original, copy) pairs of what was left
    out: a checkpoint holds what any layout has."""
    if model.tied or not model.config.lm_head.tied:
        return dict(tensors), []
    originals = {name: name.replace("lm_head.weight", "embed_tokens.weight") for name in tensors}
    kept = {name: tensor for name, tensor in tensors.items() if originals[name] == name}
    return kept, [(tensors[originals[name]], tensors[name]) for name in tensors if name not in kept]


def _view(model: Transformer, layers: range, *, embedding: bool, head: bool) -> Transformer:
    """A Transformer with some of `model`'s own modules."""
    with torch.device("meta"):
        view = Transformer(model.config).keep((), embedding=False, head=False)
    for name, child in model.named_children():
        first = name in ("embed_tokens", "embed_positions", "embed_norm", "project_in")
        if name != "layers" and (embedding if first else head):
            setattr(view, name, child)
    if head and model.tied:
        view.embed_tokens = model.embed_tokens
    assert model.layers is not None
    view.layers = nn.ModuleDict({str(layer): model.layers[str(layer)] for layer in layers})
    view.attention_backend, view.compute_dtype = model.attention_backend, model.compute_dtype
    return view


def measure_costs(
    config: ModelConfig, *, device: torch.device, dtype: torch.dtype, length: int, full: bool
) -> PartCosts:
    """Seconds of forward and backward of one row through each part, on this device; full: layers run forward twice.

    Parts that are alike are measured once. Every process gets the first one's figures, so all cut alike.
    """

    def seconds(layers: tuple[BlockConfig, ...], *, embedding: bool = False, head: bool = False) -> float:
        with torch.device("meta"):
            part = Transformer(replace(config, layers=layers)).keep(range(len(layers)), embedding=embedding, head=head)
        part.to(dtype).to_empty(device=device).init_weights()
        ids = torch.zeros(1, length, dtype=torch.int64, device=device)
        stream = torch.randn(1, length, config.hidden_size, dtype=dtype, device=device, requires_grad=True)
        times = []
        for _ in range(4):
            synchronize(device)
            start = time.perf_counter()
            out = part(ids if embedding else stream, position_ids=ids, labels=ids)
            (out.loss_sum if isinstance(out, LossOutput) else out.float().sum()).backward()
            if full and layers:
                with torch.no_grad():
                    part(stream, position_ids=ids, labels=ids)
            synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    found: list[Any] = [None]
    if dist.get_rank() == 0:
        kinds = {block: seconds((block,)) for block in dict.fromkeys(config.layers)}
        layers = tuple(kinds[block] for block in config.layers)
        found = [PartCosts(layers, seconds((), embedding=True), seconds((), head=True))]
    dist.broadcast_object_list(found, 0)
    return found[0]
