"""Spreads a model over processes and makes it fast: the order of application, on one screen.

    pp -> tp -> cp -> ep -> recompute -> compile -> offload -> fsdp

Stages are cut first, so that everything after sees only its own layers. Tensor parallelism comes before whatever needs
to know the number of heads of a rank; recomputation and compilation see the collectives inside a layer; what waits in
host memory is what compiled layers keep, and its hooks would break them up from inside; sharding comes
last, so that a layer is gathered once for its forward and once for its backward pass. The model knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from trainwright.model.config import ModelConfig, linears, without_adapters
from trainwright.model.ffn import Mlp
from trainwright.model.moe import Experts
from trainwright.model.transformer import Transformer
from trainwright.parallel.budget import apply_budget
from trainwright.parallel.copies import apply_copies
from trainwright.parallel.expert import apply_experts
from trainwright.parallel.layout import check_model, kv_heads_of_rank
from trainwright.parallel.mesh import World, in_host_memory
from trainwright.parallel.offload import apply_offload
from trainwright.parallel.overlap import use_exchange
from trainwright.parallel.pipeline import Pipeline
from trainwright.parallel.recompute import apply_recompute, hide_gathering
from trainwright.parallel.sequence import apply_sequence
from trainwright.parallel.shard import apply_fsdp, ends
from trainwright.parallel.split import RowSplit, choose_row_split, estimate_costs, in_flight
from trainwright.parallel.stages import Cut, cut_model, measure_costs
from trainwright.parallel.tensor import apply_tensor
from trainwright.parallel.tiles import apply_tiles
from trainwright.recipe.parallel import ParallelRecipe

Precision = Literal["bf16", "fp16", "fp32"]
PROGRAMS = 64
"""Programs that one layer may be compiled to: what it keeps (three levels), whole or packed rows, training or not. Past
torch's own limit of 8 it would run as it is written from then on, with a warning among others."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Spread:
    """What became of a model.

    pipeline: what runs the passes instead of the model where layers are in stages. rows: how context parallelism shares
    a row. travel, exchanges: what moves shards, and tokens beside tensor parallelism's products, in words.
    """

    pipeline: Pipeline | None = None
    rows: RowSplit | None = None
    travel: str | None = None
    exchanges: str | None = None

    @property
    def notes(self) -> list[str]:
        """What was chosen, in words, one line each."""
        notes = [f"context parallel: {self.rows.why}"] if self.rows is not None else []
        notes += [text for text in (self.travel, self.exchanges) if text is not None]
        return notes + ([str(self.pipeline)] if self.pipeline is not None else [])


def parallelize(
    model: Transformer,
    world: World,
    recipe: ParallelRecipe,
    *,
    precision: Precision,
    compile_layers: bool,
    seq_len: int,
) -> Spread:
    """Changes `model`, which may still be on the meta device, in place; its weights' dtype stays as it is.

    Raises UserError where this model cannot be spread like this. With several processes FSDP casts weights to the
    compute type as it gathers them and reduces gradients in float32; in one process the model's parts cast their own.
    """
    layout, config = world.layout, model.config
    check_model(layout, config, seq_len, kv_replication=recipe.kv_replication)
    pp, tp, cp = world.axis("pp"), world.axis("tp"), world.axis("cp")
    cut, stages, rows, travel, exchanges = None, [model], None, None, None
    if recipe.async_tp and tp is not None:
        exchanges = use_exchange(tp.get_group(), world, recipe.timeout_minutes)
    if pp is not None:
        cut = _cut(model, pp, recipe, world, DTYPES[precision], seq_len)
        stages = cut_model(model, cut)
    for stage in stages:
        if tp is not None:
            apply_tensor(stage, tp, leave=Experts if layout.ep > 1 else (), overlap=recipe.async_tp)
        if cp is not None:
            rows = choose_row_split(*_heads_of_rank(config, layout.tp), cp.size(), recipe.cp_method)
            apply_sequence(stage, cp, rows)
        if layout.ep > 1:
            apply_experts(stage, world.meshes["ep_tp"])
        layers = list((stage.layers or {}).values())
        _recompute_and_compile(layers, recipe, _kept_memory(stage, stages, recipe, pp), compile_layers)
        if recipe.offload in ("activations", "all"):
            apply_offload(layers, world.device, recipe.offload_share)
        if world.meshes:
            # Beside adapters the base is in the compute type or in codes already, and adapters cast themselves.
            adapted = config != without_adapters(config)
            cast = None if precision == "fp32" or adapted else DTYPES[precision]
            apply_fsdp(stage, world, cast, offload=in_host_memory(recipe), keep_gathered=cut is not None)
            travel = apply_copies(layers, ends(stage), world, recipe, cast)
            if recipe.recompute == "selective":
                hide_gathering(layers)
    if cut is None or pp is None:
        return Spread(rows=rows, travel=travel, exchanges=exchanges)
    shape = _stream_shape(rows, layout.cp)
    pipeline = Pipeline(
        model,
        stages,
        cut,
        pp,
        device=world.device,
        stream_dtype=DTYPES[precision],
        stream_shape=shape,
        split_backward=recipe.recompute == "none" and not compile_layers,
    )
    return Spread(pipeline, rows, exchanges=exchanges)


def _kept_memory(
    stage: Transformer, stages: list[Transformer], recipe: ParallelRecipe, pp: DeviceMesh | None
) -> float | None:
    """GiB that one micro batch may keep in this stage: those in flight share `recompute_memory`, all layers alike."""
    if recipe.recompute_memory is None or pp is None:
        return recipe.recompute_memory
    own, layers = len(stage.layers or {}), sum(len(each.layers or {}) for each in stages)
    most = in_flight(pp.get_local_rank(), pp.size(), recipe.pp_schedule, len(stages))
    return recipe.recompute_memory / most * own / max(1, layers)


def _recompute_and_compile(
    layers: list[nn.Module], recipe: ParallelRecipe, memory: float | None, compiled: bool
) -> None:
    """What layers keep for their backward pass, within `memory` GiB, and their compilation, which has to see it."""
    if compiled:
        torch._dynamo.config.recompile_limit = max(PROGRAMS, torch._dynamo.config.recompile_limit)
        for mlp in (layer.mlp for layer in layers if isinstance(layer.mlp, Mlp)):
            mlp.computed_again = recipe.recompute != "none"
    if recipe.mlp_tokens is not None:
        apply_tiles(layers, recipe.mlp_tokens, torch.compile if compiled else None)
        compiled = False  # their parts are
    if compiled and recipe.recompute == "selective" and memory is not None:
        apply_budget(layers, memory, compile_=torch.compile)
        return
    if compiled and recipe.recompute == "full":
        # Compiled inside and computed again outside: the second forward is the very program of the first, with the
        # attention kernel that was asked for, and whatever breaks its graph (an exchange of tokens) may.
        for layer in layers:
            layer.forward = torch.compile(layer.forward)
        compiled = False
    apply_recompute(layers, recipe.recompute, memory_gib=memory)
    if compiled:
        for layer in layers:
            layer.forward = torch.compile(layer.forward)


def _cut(
    model: Transformer, pp: DeviceMesh, recipe: ParallelRecipe, world: World, dtype: torch.dtype, seq_len: int
) -> Cut:
    """Where the pipeline is cut: as asked, else by what the parts cost."""
    config, wish = model.config, recipe.pp_layers
    plain = not any(linear.quantization for _, linear in linears(config))  # codes cannot be made up for a clock
    if plain and (wish == "measured" or (wish == "auto" and world.device.type != "cpu")):
        length, full = seq_len // world.layout.cp, recipe.recompute == "full"
        costs = measure_costs(config, device=world.device, dtype=dtype, length=length, full=full)
    else:
        costs = estimate_costs(config, seq_len, recipe.recompute)
    counts = wish if isinstance(wish, list) else None
    options: dict[str, Any] = {"schedule": recipe.pp_schedule, "per_rank": recipe.pp_stages, "counts": counts}
    return Cut.of(costs, rank=pp.get_local_rank(), pp=pp.size(), **options)


def _stream_shape(rows: RowSplit | None, cp: int) -> Callable[[int, int], tuple[int, int]]:
    """[rows, length] of a micro batch -> what a stage passes on: context parallelism cuts rows, and pads if need be."""
    multiple = rows.multiple if rows is not None else 1
    return lambda count, length: (count, -(-length // multiple) * multiple // cp)


def _heads_of_rank(config: ModelConfig, tp: int) -> tuple[int, int]:
    """(query heads, KV heads) of one tensor-parallel rank, the first layer's."""
    attention = config.layers[0].self_attn
    if attention.num_kv_heads % tp == 0:
        return attention.num_heads // tp, attention.num_kv_heads // tp
    return attention.num_heads // tp, len(kv_heads_of_rank(attention.num_heads, attention.num_kv_heads, tp, 0))
