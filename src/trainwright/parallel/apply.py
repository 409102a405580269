"""Spreads a model over processes and makes it fast: the order of application, on one screen.

    recompute -> compile -> shard

Recompute comes first so that compilation sees it; sharding last, so that a layer is gathered once for its forward and
once for its backward with recomputation. The model knows nothing of it. Owns the order and data parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from trainwright.parallel.mesh import World
from trainwright.parallel.recompute import apply_recompute

Precision = Literal["bf16", "fp16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parallelize(
    model: nn.Module,
    world: World,
    *,
    precision: Precision,
    recompute: Literal["none", "selective", "full"],
    compile_layers: bool,
) -> Callable[[], AbstractContextManager[Any]]:
    """Changes `model`, which may still be on the meta device, in place; its weights' dtype stays as it is.

    Returns what each forward pass has to run inside of: the compute type of one process that shards nothing. With
    shards, FSDP casts weights to the compute type as it gathers them and reduces gradients in float32.
    """
    apply_recompute(model, recompute)
    if compile_layers:
        for layer in model.layers.values():  # type: ignore[operator]
            layer.compile()
    if world.size > 1:
        shard(model, world, precision)
        return nullcontext
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(world.device.type, DTYPES[precision])


def shard(model: nn.Module, world: World, precision: Precision) -> None:
    """ZeRO-3 (weights gathered for each use) or ZeRO-2 (kept until the step's end) with FSDP2, layer by layer."""
    mesh = world.fsdp_mesh()
    policy = MixedPrecisionPolicy(
        param_dtype=None if precision == "fp32" else DTYPES[precision], reduce_dtype=torch.float32
    )
    keep = world.layout.zero == 2
    for layer in model.layers.values():  # type: ignore[operator]
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the global count already
