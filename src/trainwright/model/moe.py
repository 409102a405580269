"""Mixture of experts: a router, experts whose weights are stacked, nothing dropped.

Owns routing, the load-balancing loss, and the way of a token's row to its experts and back. Spreading the experts over
ranks is parallel/'s work: it wraps `experts`, which takes tokens with their choices and gives their weighted sums back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainwright.model.config import ExpertsConfig, LinearConfig, MoeConfig
from trainwright.model.kernels.activation import activate
from trainwright.model.kernels.gated import gated
from trainwright.model.kernels.grouped import cast_grouped_linear, grouped_linear
from trainwright.model.kernels.rows import inverse, mix, spread
from trainwright.model.linear import build_linear


class StackedLinear(nn.Module):
    """E bias-free linear layers, weight [E, O, I]."""

    # Set from outside: a weight that is cast is cast once more in the backward pass, and its copy not kept.
    cast_again = False

    def __init__(self, linear: LinearConfig, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, linear.out_features, linear.in_features))

    def forward(self, x_MI: Tensor, counts_E: Tensor) -> Tensor:
        if self.cast_again and self.weight.dtype != x_MI.dtype:
            return cast_grouped_linear(x_MI, self.weight, counts_E)
        return grouped_linear(x_MI, self.weight.to(x_MI.dtype), counts_E)


def build_stacked_linear(linear: LinearConfig, num_experts: int) -> nn.Module:
    """The experts' module of one leaf, as `build_linear` for one."""
    part = linear.adapter or linear.quantization
    return part.build(linear, num_experts) if part is not None else StackedLinear(linear, num_experts)


class Experts(nn.Module):
    """Tokens, the experts that each has chosen, and their weights -> weighted sums of what those experts give."""

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.num_experts = count = config.num_experts  # of this rank
        self.gate_proj = build_stacked_linear(config.gate_proj, count) if config.gate_proj else None
        self.up_proj = build_stacked_linear(config.up_proj, count)
        self.down_proj = build_stacked_linear(config.down_proj, count)

    def forward(self, x_MH: Tensor, weights_MC: Tensor, chosen_MC: Tensor, choices: int | None = None) -> Tensor:
        """[M, H], [M, C], [M, C] -> [M, H].

        choices: how many of `chosen` are experts, the others being `num_experts`, which is none; all by default.
        """
        expert_R = chosen_MC.flatten()
        order_R = expert_R.to(torch.int16).argsort(stable=True)  # few bits, few passes; what is none comes last
        places_MC = inverse(order_R).view_as(chosen_MC)
        counts_E = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=x_MH.device)
        counts_E = counts_E.scatter_add(0, expert_R, torch.ones_like(expert_R))[: self.num_experts]
        if choices is not None:
            order_R = order_R[:choices]
        out_RH = self._experts(spread(x_MH, order_R, places_MC), counts_E)
        return mix(out_RH, weights_MC, order_R, places_MC)

    def _experts(self, x_RH: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert and how many each has -> rows."""
        up_RI = self.up_proj(x_RH, counts_E)
        if self.gate_proj is None:
            return self.down_proj(activate(self.activation, up_RI), counts_E)
        return self.down_proj(gated(self.activation, self.gate_proj(x_RH, counts_E), up_RI), counts_E)


class Moe(nn.Module):
    """Softmax over all experts in float32, top k, weighted sum of the chosen experts' outputs."""

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.norm_topk = config.norm_topk
        self.gate = build_linear(config.gate)
        self.experts = Experts(config.experts)

    def forward(self, x_BSH: Tensor, real_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> (output [B, S, H], router statistics [2, E]: sum of probabilities, choices; pads left out of both)."""
        x_MH = x_BSH.flatten(0, -2)
        probabilities_ME = self.gate(x_MH).float().softmax(-1)
        weights_MC, chosen_MC = probabilities_ME.topk(self.top_k, dim=-1)
        real_M1 = torch.ones_like(weights_MC[:, :1]) if real_BS is None else real_BS.flatten()[:, None].float()
        choices_E = torch.zeros_like(probabilities_ME[0]).index_add(
            0, chosen_MC.flatten(), real_M1.expand_as(weights_MC).flatten()
        )
        statistics_2E = torch.stack([(probabilities_ME * real_M1).sum(0), choices_E])
        if self.norm_topk:
            weights_MC = weights_MC / weights_MC.sum(-1, keepdim=True)
        return self.experts(x_MH, weights_MC, chosen_MC).view_as(x_BSH), statistics_2E


def load_balancing_loss(statistics: list[Tensor], top_k: int) -> Tensor:
    """E x sum over experts of (share of choices x mean probability), over all sparse layers at once, float32 scalar.

    Fedus et al. 2021, equation 4, with k choices a token, the layers' tokens concatenated (what Mixtral's and
    Qwen3-MoE's published code computes). 1 x k when the load is even.
    """
    probabilities_E, choices_E = torch.stack(statistics).sum(0)
    tokens = (choices_E.sum() / top_k).clamp(min=1)
    return choices_E.numel() * ((choices_E / tokens) * (probabilities_E / tokens)).sum()
