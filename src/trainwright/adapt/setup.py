"""What training does to a model with adapters besides building it: what is trained, and how adapters begin."""

from __future__ import annotations

import math

import torch
from torch import nn

from trainwright.adapt.linear import LoraLinear
from trainwright.adapt.peft import adapters_of
from trainwright.model.init import copy_whole, generator

ADAPTER_PARAMETERS = ("lora_a", "lora_b", "magnitude")


def freeze_base(model: nn.Module) -> None:
    """Only adapters take gradients. Works on the meta device."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] in ADAPTER_PARAMETERS)


@torch.no_grad()
def start_adapters(model: nn.Module, seed: int) -> None:
    """A random, B zero, DoRA's lengths those of the base's rows: the adapted model begins as its base.

    kaiming: A uniform within 1/sqrt(in), torch's linear layer and PEFT's default; gaussian: standard deviation 1/rank.
    Each tensor depends on `seed` and its own name only, so any layout starts alike. Call when the base's weights are
    in; every rank of a sharded model calls it.
    """
    for path, module in adapters_of(model).items():
        a = module.lora_a
        if a.device.type == "meta":
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
