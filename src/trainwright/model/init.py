"""Random weights that do not depend on the layout. Owns the distribution and the drawing; checkpoint.py loads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from trainwright.model.norm import Norm


@torch.no_grad()
def init_weights(model: nn.Module, std: float, num_layers: int, seed: int, tied: bool = False) -> None:
    """Normal weights, those that write to the stream smaller by sqrt(2 L) (Radford et al. 2019, section 2.3), biases
    zero, norms one. Each tensor's numbers depend on `seed` and its own name only, so any layout starts alike; a tied
    head is the token table, also in a pipeline stage that holds it alone.
    """
    depth = (2 * max(1, num_layers)) ** -0.5
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, Norm) or name == "bias":
                parameter.fill_(1.0 if name == "weight" else 0.0)
            elif name == "weight":
                small = path.endswith(("o_proj", "down_proj"))
                whose = "embed_tokens" if tied and path == "lm_head" else path
                take = getattr(module, "take_weight", partial(copy_whole, parameter))
                shape = getattr(module, "weight_shape", parameter.shape)
                if parameter.device.type != "meta":
                    take(normal(shape, std * depth if small else std, f"{seed}/{whose}.{name}", parameter.device))


def normal(shape: Sequence[int], std: float, name: str, device: torch.device) -> Tensor:
    """Normal float32 numbers that depend on `name` alone: the same whole tensor on every rank, of which a sharded
    parameter takes its own part."""
    return torch.empty(tuple(shape), device=device).normal_(0.0, std, generator=generator(name, device))


def generator(name: str, device: torch.device) -> torch.Generator:
    """Random numbers that depend on `name` alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(seed)


def copy_whole(parameter: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor into a parameter that may hold a part of it (DTensor). No rank talks to another."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor):
        whole = whole.to(device=parameter.device_mesh.device_type, dtype=parameter.dtype)
        own = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(own.to_local())
    else:
        parameter.copy_(whole)
