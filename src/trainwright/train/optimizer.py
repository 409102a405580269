"""The optimizers: which one, over which parameters, with what decay; stepped and saved as one.

Owns parameter groups and the choice of kernels. The learning rate comes from `schedule.py`, clipping and the check for
NaN from `step.py`, files from `checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainwright.errors import UserError
from trainwright.train.adafactor import Adafactor
from trainwright.train.adamw import AdamW
from trainwright.train.adamw8bit import AdamW8bit
from trainwright.train.lion import Lion
from trainwright.train.muon import Muon

# Devices whose torch has fused AdamW and SGD kernels.
FUSED_DEVICES = ("cuda", "cpu", "xpu", "mps", "mtia")


class Optimizers:
    """One or several torch optimizers over disjoint parameters, used as one.

    `guards_itself`: every part's kernel takes the gradient's scale and a flag "leave everything as it is" from the
    device, so a step with NaN is refused without the host waiting to look.
    """

    def __init__(self, parts: list[Optimizer], names: Mapping[Tensor, str]) -> None:
        self.parts = parts
        self.names = names
        self.guards_itself = all(group.get("fused") for part in parts for group in part.param_groups)

    @property
    def parameters(self) -> list[Tensor]:
        """Everything that is trained, in a fixed order."""
        return [tensor for part in self.parts for group in part.param_groups for tensor in group["params"]]

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the next step, in every group."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate

    def step(self, coefficient: Tensor, bad: Tensor) -> None:
        """One update with gradients times `coefficient`; both arguments are float32 scalars on the device.

        Where `guards_itself`, `bad` = 1 leaves weights and states untouched. Elsewhere the caller has looked already.
        """
        home = self.parameters[0].device  # host memory, with parallel.offload
        coefficient, bad = coefficient.to(home), bad.to(home)
        if self.guards_itself:
            for part in self.parts:
                # What torch.amp.GradScaler hands to fused optimizers: gradients are divided by the first.
                part.grad_scale, part.found_inf = coefficient.reciprocal(), bad  # type: ignore[attr-defined]
        else:
            grads = [tensor.grad for tensor in self.parameters if tensor.grad is not None]
            torch._foreach_mul_(grads, coefficient)
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Frees the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """The states by parameter name: "layers.0.mlp.up_proj.weight.exp_avg"."""
        return {
            f"{self.names[tensor]}.{key}": value
            for part in self.parts
            for tensor, state in part.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def create_states(self) -> None:
        """Makes every state exist, so that a checkpoint has somewhere to go. Changes weights by nothing (rate 0)."""
        self.set_learning_rate(0.0)
        for tensor in self.parameters:
            tensor.grad = torch.zeros_like(tensor)
        device = self.parameters[0].device
        self.step(torch.ones((), device=device), torch.zeros((), device=device))
        self.zero_grad()


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    fused: bool | None = None,
    by_layer: bool = False,
) -> Optimizers:
    """The optimizer `name` over what `model` trains; weight decay on matrices, never on norms and biases.

    `fused=None` takes the fused kernel where the device has one. by_layer: parts of their own for each layer, and for
    each weight outside of layers.
    """
    trained = {key: tensor for key, tensor in model.named_parameters() if tensor.requires_grad}
    if not trained:
        raise UserError("nothing is trained: model.frozen holds every parameter; free some, or add an adapter")
    if fused is None:
        fused = all(tensor.device.type in FUSED_DEVICES and tensor.is_floating_point() for tensor in trained.values())
    adamw: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": eps, "fused": fused}
    taken: dict[str, dict[str, Tensor]] = {}
    for key, tensor in trained.items():
        place = ".".join(key.split(".")[:2]) if key.startswith("layers.") else key
        taken.setdefault(place if by_layer else "", {})[key] = tensor
    parts = [part for some in taken.values() for part in _parts(some, name, adamw, weight_decay)]
    return Optimizers(parts, {tensor: key for key, tensor in trained.items()})


def _parts(trained: Mapping[str, Tensor], name: str, adamw: dict[str, Any], weight_decay: float) -> list[Optimizer]:
    """Torch's optimizers over these weights, each by its name in the model; adamw: the settings of torch's AdamW."""
    groups, betas = _groups(trained, weight_decay), adamw["betas"]
    if name == "adamw":
        return [AdamW(groups, **adamw)]
    if name == "sgd":
        sharded = any(hasattr(tensor, "device_mesh") for tensor in trained.values())  # DTensor has no fused SGD
        return [torch.optim.SGD(groups, lr=0.0, fused=adamw["fused"] and not sharded)]
    if name == "adafactor":
        return [Adafactor(groups)]
    if name == "adamw8bit":
        return [AdamW8bit(groups, betas=betas, eps=adamw["eps"])]
    if name == "lion":
        return [Lion(groups, betas=betas)]
    return _muon(trained, betas[0], weight_decay, adamw)


def _groups(trained: Mapping[str, Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which decay, and vectors, which do not; those on one mesh together, as one fused kernel takes them."""
    groups: dict[tuple[bool, Any], list[Tensor]] = {}
    for tensor in trained.values():
        groups.setdefault((tensor.ndim >= 2, getattr(tensor, "device_mesh", None)), []).append(tensor)
    ordered = sorted(groups.items(), key=lambda item: not item[0][0])
    return [{"params": held, "weight_decay": weight_decay if decays else 0.0} for (decays, _), held in ordered]


def _muon(
    trained: Mapping[str, Tensor], momentum: float, weight_decay: float, adamw: dict[str, Any]
) -> list[Optimizer]:
    """Muon on the matrices of the layers, AdamW on embeddings, head, experts, norms and biases; one rate for both."""
    inside = {key for key, tensor in trained.items() if key.startswith("layers.") and tensor.ndim == 2}
    hidden = [trained[key] for key in trained if key in inside]
    rest = {key: tensor for key, tensor in trained.items() if key not in inside}
    parts: list[Optimizer] = []
    if hidden:
        parts.append(Muon(hidden, momentum, weight_decay))
    if rest:
        parts.append(AdamW(_groups(rest, weight_decay), **adamw))
    return parts
