"""Tensor parallelism with sequence-parallel norms (Shoeybi et al. 2019; Korthikanti et al. 2022): one table.

The table says, by part type, how each parameter lies on the tp axis; inside a module's forward they are this rank's
plain tensors (`local.py`), so every kernel works as it is. Collectives stand around whole parts:

    tokens whole      embedding, everything before the first and after the last layer; the head's vocabulary is split
    tokens split      the stream between the parts of the layers, and the norms on it
    heads, widths split   inside attention, MLP and experts: gathered before, summed and scattered after

Owns the table and these collectives. Experts on an `ep` axis are `expert.py`'s; refusals are `layout.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from trainwright.adapt.frozen import FrozenEmbedding, FrozenHead, FrozenWeight
from trainwright.adapt.linear import LoraLinear
from trainwright.errors import UserError
from trainwright.model.attention import Attention
from trainwright.model.embed import Head
from trainwright.model.ffn import Mlp
from trainwright.model.kernels.cross_entropy import VocabShard
from trainwright.model.moe import Experts, Moe
from trainwright.model.transformer import Block, Transformer
from trainwright.parallel.collectives import (
    gather,
    gather_partial,
    scale_gradient,
    scatter_sum,
    split,
    spread,
    sum_partial,
)
from trainwright.parallel.layout import kv_heads_of_rank
from trainwright.parallel.local import Place, View, distribute, view_locally
from trainwright.parallel.overlap import overlap_part

Rule = Mapping[str, Place]  # parameter name -> its place; "*" for all others
PART = Place(partial=True)
COLUMN: Rule = {"weight": Place(0), "bias": Place(0), "lora_a": PART, "lora_b": Place(0), "magnitude": Place(0)}
ROW: Rule = {
    "weight": Place(1), "bias": Place(partial=True, once=True), "lora_a": Place(1), "lora_b": PART, "magnitude": PART,
}  # fmt: skip
EXPERT_COLUMN: Rule = {"weight": Place(1), "lora_a": PART, "lora_b": Place(1)}
EXPERT_ROW: Rule = {"weight": Place(2), "lora_a": Place(2), "lora_b": PART}
INSIDE: Rule = {"*": PART}
OUTSIDE: Rule = {"*": Place()}
VOCABULARY: Rule = {"weight": Place(0), "bias": Place(0)}

TABLE: Mapping[type[nn.Module], Mapping[str, Rule]] = {
    Transformer: {
        "embed_tokens": VOCABULARY,
        "embed_positions": OUTSIDE,
        "embed_norm": OUTSIDE,
        "project_in": OUTSIDE,
        "norm": OUTSIDE,
        "project_out": OUTSIDE,
        "lm_head": VOCABULARY,
    },
    Block: {"input_layernorm": INSIDE, "post_attention_layernorm": INSIDE},
    Attention: {
        "q_proj": COLUMN,
        "k_proj": COLUMN,  # or copies of whole heads, where tp does not divide them
        "v_proj": COLUMN,
        "o_proj": ROW,
        "q_norm": INSIDE,
        "k_norm": INSIDE,
    },
    Mlp: {"gate_proj": COLUMN, "up_proj": COLUMN, "down_proj": ROW},
    Moe: {"gate": INSIDE},
    Experts: {"gate_proj": EXPERT_COLUMN, "up_proj": EXPERT_COLUMN, "down_proj": EXPERT_ROW},
}


def apply_tensor(
    model: Transformer, mesh: DeviceMesh, *, leave: type[nn.Module] | tuple[()] = (), overlap: bool = False
) -> None:
    """Splits `model`, which may be on the meta device, over `mesh` (1-D), in place.

    leave: parts placed elsewhere. overlap: products beside the gathers and scatters of plain layers (`overlap.py`).
    """
    vocabulary = model.config.vocab_size
    placed: Placed = {}  # a tied table is one parameter in two places
    for module in list(model.modules()):
        if leave and isinstance(module, leave):
            continue
        for name, rule in TABLE.get(type(module), {}).items():
            child = getattr(module, name)
            if child is not None:
                rule = _own_heads(module, name, rule, mesh) if isinstance(module, Attention) else rule
                _place(child, _even(rule, vocabulary, mesh) if rule is VOCABULARY else rule, mesh, placed)
    if isinstance(model.embed_tokens, nn.Embedding | FrozenEmbedding):
        _split_embedding(model.embed_tokens, vocabulary, mesh)
    if isinstance(model.lm_head, Head | FrozenHead):
        _split_head(model.lm_head, vocabulary, mesh)
    if model.alibi_slopes is not None:
        model.register_forward_pre_hook(_OwnSlopes(model.alibi_slopes.numel(), mesh))
    _split_tokens(model, mesh, overlap)
    # Dynamo sees LocalWeights change a module inside a checkpointed region and, unless told that nothing is left of it
    # afterwards, runs the whole layer uncompiled.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


# ---- parameters ----


Placed = dict[int, tuple[nn.Parameter, nn.Parameter]]
"""id of a parameter -> it (so that no other gets its id) and the DTensor in its place."""


def _place(module: nn.Module, rule: Rule, mesh: DeviceMesh, placed: Placed) -> None:
    """Makes the module's parameters DTensors, and plain tensors inside its forward."""
    rule, views = with_scales(module, rule), {}
    for path, parameter in list(module.named_parameters()):
        owner, name = _owner(module, path)
        if owner is not module:
            raise UserError(f"tensor parallelism knows no place for {type(module).__name__}.{path}: set parallel.tp=1")
        place = rule.get(name) or rule.get("*")
        if place is None:
            raise UserError(f"tensor parallelism knows no place for {type(module).__name__}.{name}: set parallel.tp=1")
        if id(parameter) not in placed:
            placed[id(parameter)] = parameter, distribute(parameter, mesh, (place.placement,))
        module._parameters[name] = placed[id(parameter)][1]
        views[name] = View.of(place, mesh)
    view_locally(module, views)
    if isinstance(module, LoraLinear) and module.magnitude is not None and rule["weight"].dim == 1:
        module.sum_slices = partial(sum_partial, group=mesh.get_group())


def with_scales(module: nn.Module, rule: Rule) -> Rule:
    """The rule of a weight in fewer bits: its scales go with it, but for those of whole rows when columns are cut."""
    if not isinstance(module, FrozenWeight) or module.kind is None:
        return rule
    module.single_level()
    place = rule.get("weight") or rule["*"]
    of_rows = module.kind != "nf4" and place.dim == len(module.weight_shape) - 1
    return {**rule, "weight_absmax": Place() if of_rows else place}


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    prefix, _, name = path.rpartition(".")
    return module.get_submodule(prefix), name


def _own_heads(attention: Attention, name: str, rule: Rule, mesh: DeviceMesh) -> Rule:
    """KV heads that tp does not divide: every rank holds all and uses those of its query heads."""
    if name not in ("k_proj", "v_proj"):
        return rule
    size, D = mesh.size(), attention.head_dim
    rows = {part: attention.get_submodule(part).get_parameter("weight").shape[0] for part in ("q_proj", name)}
    num_heads, num_kv = rows["q_proj"] // D, rows[name] // D
    if num_kv % size == 0:
        return rule
    heads = kv_heads_of_rank(num_heads, num_kv, size, mesh.get_local_rank())
    own = Place(partial=True, spans=tuple((head * D, D) for head in heads))
    return {"weight": own, "bias": own, "lora_a": PART, "lora_b": own, "magnitude": own}


def _even(rule: Rule, vocabulary: int, mesh: DeviceMesh) -> Rule:
    """A bias that tp does not divide stays whole, because FSDP splits its only dim; the table goes along its other."""
    if vocabulary % mesh.size() == 0:
        return rule
    return {**rule, "bias": Place(partial=True, spans=(vocabulary_slice(vocabulary, mesh),))}


def vocabulary_slice(vocabulary: int, mesh: DeviceMesh) -> tuple[int, int]:
    """(first row, rows) of this rank. The last ranks have fewer where tp does not divide the vocabulary."""
    most = -(-vocabulary // mesh.size())
    first = most * mesh.get_local_rank()
    return first, max(0, min(most, vocabulary - first))


# ---- collectives ----


class _VocabularyEmbedding(nn.Module):
    """Mixed into the token table: looks up the ids of its own slice; the ranks' sum is the embedding."""

    slice: tuple[int, int]
    group: dist.ProcessGroup

    def forward(self, ids: Tensor) -> Tensor:
        first, rows = self.slice
        outside = (ids < first) | (ids >= first + rows)
        # Ids of other slices go to any of its rows: at one, their gradients, all 0, would be one long sum.
        x = super().forward((ids - first) % rows)
        return sum_partial(x.masked_fill(outside[..., None], 0), self.group)


@cache
def _vocabulary_class(kind: Any) -> Any:
    return type(f"Vocabulary{kind.__name__}", (_VocabularyEmbedding, kind), {})


def _split_embedding(table: nn.Embedding | FrozenEmbedding, vocabulary: int, mesh: DeviceMesh) -> None:
    first, rows = vocabulary_slice(vocabulary, mesh)
    local: Any = table
    local.__class__ = _vocabulary_class(local.__class__)
    local.slice, local.group = (first, rows), mesh.get_group()
    if isinstance(table, nn.Embedding) and table.padding_idx is not None:
        own = first <= table.padding_idx < first + rows
        table.padding_idx = table.padding_idx - first if own else None


def _split_head(head: Head | FrozenHead, vocabulary: int, mesh: DeviceMesh) -> None:
    """The loss is made of every rank's slice of the logits, which are gathered only when they are asked for."""
    group = mesh.get_group()
    first, rows = vocabulary_slice(vocabulary, mesh)
    most = -(-vocabulary // mesh.size())
    head.shard = VocabShard(
        offset=first,
        size=most,
        reduce_max=lambda values: dist.all_reduce(values, dist.ReduceOp.MAX, group),
        reduce_sum=lambda values: dist.all_reduce(values, dist.ReduceOp.SUM, group),
    )

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return spread(args[0], group), *args[1:]

    def leave(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if len(args) > 1 and args[1] is not None:
            return out  # the loss
        return gather(F.pad(out, (0, most - rows)), out.dim() - 1, group)[..., :vocabulary]

    head.register_forward_pre_hook(enter)
    head.register_forward_hook(leave)


class _OwnSlopes:
    """ALiBi's slopes go with the heads. The buffer is made whole again by `reset_buffers`, so every pass looks."""

    def __init__(self, num_heads: int, mesh: DeviceMesh) -> None:
        self.num_heads, self.ranks, self.rank = num_heads, mesh.size(), mesh.get_local_rank()

    def __call__(self, model: nn.Module, _: Any) -> None:
        slopes = model.alibi_slopes
        if isinstance(slopes, Tensor) and slopes.numel() == self.num_heads:
            model.alibi_slopes = slopes.chunk(self.ranks)[self.rank]


class _Stream:
    """The stream between the layers' parts: the tokens of all rows in one line, [B S / ranks, H], so that what is
    gathered and scattered lies as it is sent, whatever B is. Whole, [B, S, H], where they do not divide (generation).
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group, self.ranks, self.is_split, self.rows = mesh.get_group(), mesh.size(), True, 1

    def begin(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.rows, tokens = args[0].shape[:2]
        self.is_split = self.rows * tokens % self.ranks == 0
        if not self.is_split and torch.is_grad_enabled():
            raise UserError(
                f"{tokens} tokens a rank do not divide by parallel.tp={self.ranks}: choose a data.seq_len that is a "
                "multiple of cp x tp"
            )
        return (split(args[0].flatten(0, 1), 0, self.group), *args[1:]) if self.is_split else args

    def end(self, _: nn.Module, __: Any, out: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return (self.in_rows(gather(out[0], 0, self.group)), *out[1:]) if self.is_split else out

    def enter(self, part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Attention sees rows; for the others a token is a token, and a matmul follows its gather at once."""
        if not self.is_split:
            return args
        whole = gather_partial(args[0], 0, self.group)
        return (self.in_rows(whole) if isinstance(part, Attention) else whole, *args[1:])

    def leave(self, _: nn.Module, __: Any, out: Tensor) -> Tensor:
        return scatter_sum(out.flatten(0, -2), 0, self.group) if self.is_split else sum_partial(out, self.group)

    def leave_experts(self, module: nn.Module, args: Any, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Every rank has the whole router statistics, so the gradient that comes through them is not partial."""
        return self.leave(module, args, out[0]), scale_gradient(out[1], 1 / self.ranks)

    def in_rows(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.rows, -1))


def _split_tokens(model: Transformer, mesh: DeviceMesh, overlap: bool) -> None:
    layers: list[nn.Module] = list((model.layers or {}).values())
    if not layers:
        return
    stream = _Stream(mesh)
    layers[0].register_forward_pre_hook(stream.begin)
    for layer in layers:
        for part in layer.children():
            if isinstance(part, Attention | Mlp | Moe) and not (overlap and overlap_part(part, stream)):
                part.register_forward_pre_hook(stream.enter)
                part.register_forward_hook(stream.leave_experts if isinstance(part, Moe) else stream.leave)
    layers[-1].register_forward_hook(stream.end)
