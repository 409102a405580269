"""AdamW with both moments in 8 bits: 2 bytes a parameter instead of 8 (Dettmers et al. 2022, "8-bit optimizers").

Moments are kept in blocks of 256 along a parameter's last dim, as codes of the dynamic tree type and one float32 scale
a block. Blocks do not cross rows, so the states of a sharded parameter are sharded like it and a checkpoint resumes on
any number of ranks. Small parameters keep float32 moments.

Why not a library's: bitsandbytes' and torchao's cannot be refused a step by the device (NaN), so the host would wait in
every step, and bitsandbytes' knows no sharded tensors. On a GPU one Triton kernel for all, `triton_adamw8bit.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainwright.parallel.local import own_part
from trainwright.train.adamw import count_step

BLOCK = 256
MIN_NUMEL = 4096
"""Smaller parameters keep float32 moments."""


@cache
def code(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of the dynamic tree type, float32, ascending: decades, each with twice the values of the one below
    (Dettmers et al. 2022, section 1.3); unsigned, there are twice as many of each."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float32)
        means = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += means + [-mean for mean in means if signed]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def borders(signed: bool, device: torch.device) -> Tensor:
    """[255]: between which values of `code` a number's nearest one changes."""
    values = code(signed, device)
    return (values[:-1] + values[1:]) / 2


def compress(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """float32 [..., C] -> (codes uint8 [..., C], scales float32 [..., ceil(C / 256)])."""
    columns = values.shape[-1]
    blocks = F.pad(values, (0, -columns % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1)
    share = blocks / scale.clamp(min=1e-37)[..., None]
    codes = torch.bucketize(share, borders(signed, values.device), out_int32=True).to(torch.uint8)
    return codes.flatten(-2)[..., :columns].contiguous(), scale


def decompress(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The float32 values [..., C] again."""
    columns = codes.shape[-1]
    values = code(signed, codes.device)[F.pad(codes, (0, -columns % BLOCK)).int()].unflatten(-1, (-1, BLOCK))
    return (values * scale[..., None]).flatten(-2)[..., :columns]


class AdamW8bit(Optimizer):
    """Decoupled weight decay (Loshchilov & Hutter 2019). Takes `grad_scale` and `found_inf` as torch's fused optimizers
    do: gradients are divided by the first, and where the second is 1 nothing changes."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self, params: Iterable[Any], lr: float = 0.0, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in trained:
                if not self.state[parameter]:
                    self.state[parameter] = _new_state(parameter)
            if not trained:
                continue
            steps = [self.state[parameter]["step"] for parameter in trained]
            count_step(steps, self.found_inf)
            self._update(trained, group)

    def _update(self, trained: list[Tensor], group: dict[str, Any]) -> None:
        settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        together = []
        for parameter in trained:
            weight, grad = own_part(parameter), own_part(parameter.grad)  # type: ignore[arg-type]
            state = {key: own_part(value) for key, value in self.state[parameter].items()}
            if weight.numel() == 0:  # this rank's shard has no row
                continue
            if weight.is_cuda and "exp_avg_scale" in state:
                together.append((weight, grad, state))
            else:
                _update_plain(weight, grad, state, settings, self.grad_scale, self.found_inf)
        if together:
            from trainwright.train.triton_adamw8bit import update

            update(together, settings, self.grad_scale, self.found_inf)


def _new_state(parameter: Tensor) -> dict[str, Tensor]:
    """Moments of zero, laid out over ranks like the parameter."""
    device = own_part(parameter).device
    state = {"step": torch.zeros((), device=device)}
    if parameter.numel() < MIN_NUMEL:
        return state | {key: torch.zeros_like(parameter, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq")}
    blocks = -(-own_part(parameter).shape[-1] // BLOCK)
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        zero = int((code(signed, torch.device("cpu")) == 0).nonzero())
        state[key] = _like(parameter, own_part(parameter).shape, torch.uint8).fill_(zero)
        state[f"{key}_scale"] = _like(parameter, (*own_part(parameter).shape[:-1], blocks), torch.float32).zero_()
    return state


def _like(parameter: Tensor, local_shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor of which this rank holds `local_shape`, sharded as `parameter` is."""
    local = torch.empty(local_shape, dtype=dtype, device=own_part(parameter).device)
    if not isinstance(parameter, DTensor):
        return local
    shape = list(parameter.shape)
    for dim in range(len(shape)):
        whole, part = parameter.shape[dim], parameter.to_local().shape[dim]
        shape[dim] = whole if part == local_shape[dim] else local_shape[dim] * (whole // max(part, 1))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _update_plain(
    weight: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    settings: tuple[float, ...],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The arithmetic, written out: the reference of the kernel, and small parameters everywhere."""
    rate, beta1, beta2, eps, decay = settings
    small = "exp_avg_scale" not in state
    wide = grad.float() if grad_scale is None else grad.float() / grad_scale
    first, second = (
        state[key] if small else decompress(state[key], state[f"{key}_scale"], key == "exp_avg")
        for key in ("exp_avg", "exp_avg_sq")
    )
    first = first * beta1 + wide * (1 - beta1)
    second = second * beta2 + wide * wide * (1 - beta2)
    step = state["step"]
    denominator = (second / (1 - beta2**step)).sqrt_().add_(eps)
    new = weight.float() * (1 - rate * decay) - rate / (1 - beta1**step) * first / denominator
    results = [(weight, new.to(weight.dtype))]
    for key, moment in (("exp_avg", first), ("exp_avg_sq", second)):
        if small:
            results.append((state[key], moment))
        else:
            codes, scale = compress(moment, key == "exp_avg")
            results += [(state[key], codes), (state[f"{key}_scale"], scale)]
    for place, value in results:
        place.copy_(value if found_inf is None else torch.where(found_inf > 0, place, value))
