"""Data parallelism and ZeRO (Rajbhandari et al. 2020) by FSDP2, layer by layer.

    zero 0   weights, gradients and optimizer states whole on every rank; gradients summed once a step
    zero 1   optimizer states (the master weights among them) sharded; weights in the compute type and gradients whole
             on every rank until the step's last backward pass has summed and cut them
    zero 2   gradients are summed and cut after every micro batch
    zero 3   weights are gathered layer by layer, for the forward and again for the backward pass
    hybrid   dp_replicate copies of such a group of dp_shard x cp ranks

Owns these, mixed precision (compute in bf16, masters and reduction in float32), weights in host memory, prefetching
and the global gradient norm. Gradients are sums: the loss has been divided by the global token count already.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from trainwright.errors import UserError
from trainwright.model.moe import Experts, Moe, StackedLinear
from trainwright.model.transformer import Transformer
from trainwright.parallel.accumulate import accumulate_fast
from trainwright.parallel.local import own_part
from trainwright.parallel.mesh import World
from trainwright.parallel.reduce import Reduce


def apply_fsdp(
    model: Transformer, world: World, dtype: torch.dtype | None, *, offload: bool = False, keep_gathered: bool = False
) -> None:
    """Shards a model that may be on the meta device and may have DTensor parameters, in place.

    dtype: that of the computation; None: that of the weights. offload: masters, gradients and optimizer states live in
    host memory and the update runs there. keep_gathered: weights stay gathered between forward and backward (pipelines)
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    place = CPUOffloadPolicy(pin_memory=world.device.type != "cpu") if offload else OffloadPolicy()
    regather = world.layout.zero == 3 and not keep_gathered
    # Where they would be gathered once for many micro batches, that is one cast for all of them; in host memory FSDP
    # brings them.
    alone = _leave_alone(model) if regather and not offload and experts_alone(world) else set()

    def cut(modules: Any, *, experts: bool = False, regather: bool = regather) -> None:
        mesh = world.fsdp_mesh(experts)
        fully_shard(
            modules,
            mesh=mesh,
            reshard_after_forward=regather,
            shard_placement_fn=lambda parameter: _other_dim(parameter, mesh.size(-1)),
            # Experts take their rows as they are, and the weights of their sums in float32.
            mp_policy=replace(policy, cast_forward_inputs=False) if experts else policy,
            offload_policy=place,
            ignored_params=alone,
        )

    layers = list((model.layers or {}).values())
    for layer in layers:
        if world.layout.ep > 1 and isinstance(layer.mlp, Moe) and not alone:
            cut(layer.mlp.experts, experts=True)
        cut(layer)
    if model.embed_tokens is not None and not model.config.lm_head.tied:
        cut(model.embed_tokens)
        table: Any = model.embed_tokens
        table.set_unshard_in_backward(False)  # the gradient of a lookup needs no weights: one gather less a pass
    if model.lm_head is not None and not model.config.lm_head.tied:
        last = [part for part in (model.norm, model.project_out, model.lm_head) if part is not None]
        cut(last, regather=False)  # its backward comes at once
    cut(model, regather=False)
    _tune(model, layers, world)


def experts_alone(world: World) -> bool:
    """Whether no other rank holds the experts of this one."""
    return world.layout.ep > 1 and world.fsdp_mesh(experts=True).size() == 1


def _leave_alone(model: Transformer) -> set[nn.Parameter]:
    """The weights of this rank's experts, which FSDP would gather from itself, layer by layer, and whose gradients it
    would sum over one rank: copies and host time. They are cast where they are used instead, forward and backward."""
    stacks = [experts for experts in model.modules() if isinstance(experts, Experts)]
    for part in (part for experts in stacks for part in experts.modules()):
        if isinstance(part, StackedLinear):
            part.cast_again = True
    return {parameter for experts in stacks for parameter in experts.parameters()}


def _other_dim(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """Where tp cuts dim 0 unevenly, FSDP takes dim 1: two cuts of one dim have a common order only if both are even."""
    if not isinstance(parameter, DTensor) or parameter.ndim < 2:
        return None
    uneven = any(
        placement.is_shard(0) and parameter.shape[0] % size
        for placement, size in zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    )
    if not uneven:
        return None
    if parameter.shape[1] % ranks:
        tp = parameter.device_mesh.size()
        raise UserError(
            f"a vocabulary of {parameter.shape[0]} over parallel.tp={tp} leaves width {parameter.shape[1]} to {ranks} "
            f"shards, which do not divide it: use a vocabulary that is a multiple of {tp}, or other degrees"
        )
    return Shard(1)


def _tune(model: nn.Module, layers: list[nn.Module], world: World) -> None:
    """Sums instead of means; the next layer's weights are gathered while this one computes, both ways."""
    accumulate_fast()
    reduce, apart = Reduce(), world.layout.ep > 1
    for module in fsdp_modules(model):
        module.set_custom_reduce_scatter(reduce)
        if world.fsdp_mesh(apart and isinstance(module, Experts)).size() == 1:
            continue  # a sum over one rank is its mean, and torch would read and write it once more to divide it by 1
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # else a factor becomes an operation that only NCCL has
    for before, after in pairwise(module for module in layers if isinstance(module, FSDPModule)):
        before.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([before])
    model.register_forward_hook(_settle)


def _settle(model: nn.Module, _: Any, __: Any) -> None:
    """After a pass without gradients no backward pass puts the weights back into shards, which everyone else reads."""
    if not torch.is_grad_enabled():
        for module in fsdp_modules(model):
            module.reshard()


def ends(model: Transformer) -> list[nn.Module]:
    """Where FSDP holds what no layer has: embedding and head, or the whole model where both are one table."""
    parts = [part for part in (model.embed_tokens, model.lm_head, model) if part is not None]
    return [part for part in parts if isinstance(part, FSDPModule)]


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def begin_micro_batch(model: nn.Module, world: World, *, last: bool) -> None:
    """Says what the coming backward pass does with gradients and weights, before each micro batch of a step."""
    if world.size == 1 or not isinstance(model, FSDPModule):
        return
    if world.layout.zero <= 1:
        model.set_requires_gradient_sync(last)
    else:
        model.set_requires_all_reduce(last)  # hybrid: copies of the group agree once a step
    if world.layout.zero in (1, 2):
        model.set_reshard_after_backward(last)


def grad_norm(parameters: Iterable[Tensor], world: World) -> Tensor:
    """Global L2 norm of the gradients, float32 [] on the device: each value counted once, in whatever layout."""
    total = torch.zeros((), dtype=torch.float32, device=world.device)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local: dict[int, list[Tensor]] = {}
    for grad in grads:
        local.setdefault(_shards(grad), []).append(own_part(grad))
    stage = world.size // world.layout.pp
    for shards, parts in sorted(local.items()):
        norms = torch.stack([norm.to(world.device) for norm in torch._foreach_norm(parts, 2, dtype=torch.float32)])
        total += norms.square().sum() * (shards / stage)
    if world.size > 1:
        dist.all_reduce(total)
    return total.sqrt()


def _shards(grad: Tensor) -> int:
    """Ranks among which a tensor is cut; the others of its pipeline stage hold copies."""
    count = 1
    if isinstance(grad, DTensor):
        for placement, size in zip(grad.placements, grad.device_mesh.shape, strict=True):
            count *= 1 if placement.is_replicate() else size
    return count
