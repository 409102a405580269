"""What training does to a model with adapters besides building it: what is trained, and how adapters begin."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from trainwright.adapt.linear import LoraLinear
from trainwright.adapt.peft import adapters_of, read_adapter
from trainwright.errors import UserError
from trainwright.model.init import copy_whole, generator

ADAPTER_PARAMETERS = ("lora_a", "lora_b", "magnitude")


def freeze_base(model: nn.Module) -> None:
    """Only adapters take gradients. Works on the meta device."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] in ADAPTER_PARAMETERS)


def begin_again(model: nn.Module, folder: Path) -> None:
    """Adapters that begin as a part of the base take it from `folder`, where their run kept it, instead of finding it
    again, which another card or torch may do otherwise. Call before the base's weights come."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: it holds the adapters as the run began, and its checkpoints need it")
    modules = adapters_of(model)
    for path, tensors in read_adapter(folder, model.config, modules.keys()):  # type: ignore[arg-type]
        found, wanted = tensors["lora_a"].shape, modules[path].lora_a.shape
        if found != wanted:
            raise UserError(f"{folder}: {path} began with rank {found[-2]}, adapter.rank says {wanted[-2]}")
        modules[path].began = tensors["lora_a"], tensors["lora_b"]


@torch.no_grad()
def start_adapters(model: nn.Module, seed: int) -> None:
    """A random, B zero, DoRA's lengths those of the base's rows: the adapted model begins as its base.

    kaiming: A uniform within 1/sqrt(in), torch's linear layer and PEFT's default; gaussian: standard deviation 1/rank.
    Each tensor depends on `seed` and its own name only, so any layout starts alike. Adapters that begin as a part of
    the base have A and B since the base came (`starts.py`). Call when the base's weights are in; every rank of a
    sharded model calls it.
    """
    for path, module in adapters_of(model).items():
        a = module.lora_a
        if a.device.type == "meta":
            continue
        if module.lora.from_base:
            if isinstance(module, LoraLinear):
                module.start_magnitude()
            continue
        whole = torch.empty(a.shape, device=a.device)
        source = generator(f"{seed}/{path}.lora_a", a.device)
        if module.lora.init == "gaussian":
            whole.normal_(0.0, 1 / module.lora.rank, generator=source)
        else:
            bound = 1 / math.sqrt(module.weight_shape[-1])
            whole.uniform_(-bound, bound, generator=source)
        copy_whole(a, whole)
        module.lora_b.zero_()
        if isinstance(module, LoraLinear):
            module.start_magnitude()
