"""Linear layers with a low-rank adapter beside a frozen weight, one or a stack of them. Arithmetic is `ops.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainwright.adapt import ops
from trainwright.adapt.frozen import FrozenExperts, FrozenLinear, FrozenWeight, gathered
from trainwright.adapt.joint import lora_linears
from trainwright.adapt.starts import first_factors
from trainwright.model.config import LinearConfig
from trainwright.model.init import copy_whole
from trainwright.model.kernels.grouped import grouped_linear

if TYPE_CHECKING:
    from trainwright.adapt.lora import Lora


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float, lengths: Tensor | None = None) -> Tensor:
    """W + scale B A in float32, [..., out, in]; with DoRA's trained lengths each row is rescaled to its own."""
    merged = weight.float() + scale * (b.float() @ a.float())
    return merged if lengths is None else merged * (lengths / torch.linalg.vector_norm(merged, dim=-1))[:, None]


class Adapted(FrozenWeight):
    """A fixed weight whose adapter may begin as a part of it (`starts.py`)."""

    lora: Lora
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    began: tuple[Tensor, Tensor] | None = None
    """A and B as they were when the run began, whole: set before the weight of a resumed run arrives."""

    @torch.no_grad()
    def take_weight(self, whole: Tensor) -> None:
        """Fills A, B and what they leave of the weight. Each rank decomposes the whole weight and keeps its part."""
        if self.lora.from_base:
            whole = whole.to(self.weight.device).float()
            theirs = whole - self.rounded(whole) if self.lora.init == "loftq" else whole
            a, b = self.began or first_factors(self.lora.init, theirs, self.lora.rank, self.lora.scale)
            self.began = None
            copy_whole(self.lora_a, a)
            copy_whole(self.lora_b, b)
            if self.lora.init != "loftq":
                whole = whole - self.lora.scale * (b.to(whole.device) @ a.to(whole.device))
        super().take_weight(whole)


class LoraLinear(Adapted, FrozenLinear):
    """W x + b + scale B A x. A [rank, in] is `lora_a`, B [out, rank] is `lora_b`; W and b are frozen.

    With dropout, A and B see their own input; with DoRA each output row is rescaled to a trained length.
    """

    def __init__(self, linear: LinearConfig, lora: Lora) -> None:
        super().__init__(linear)
        self.lora = lora
        self.lora_a = nn.Parameter(torch.empty(lora.rank, linear.in_features))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, lora.rank))
        self.magnitude = nn.Parameter(torch.ones(linear.out_features)) if lora.dora else None
        # Set from outside where the columns are a slice of the layer's: sums the rows' squares over all slices.
        self.sum_slices: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(ops.compute_dtype(x))
        if self.magnitude is not None:
            return self._with_magnitude(x)
        if self.lora.dropout and self.training:
            frozen = ops.frozen_linear(x, self.format, self.pieces, x.shape[-1], self.bias)
            return frozen + self._update(x)
        return ops.lora_linear(x, self.format, self.pieces, self.bias, self.lora_a, self.lora_b, self.lora.scale)

    def together(self, x: Tensor, others: Sequence[nn.Module]) -> list[Tensor] | None:
        """What this layer and others give for one x, in one operation; None where that is not what each would do."""
        layers = [layer for layer in (self, *others) if type(layer) is LoraLinear and layer._joins(self)]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if len(layers) < 1 + len(others) or len(biases) not in (0, len(layers)):
            return None
        x = x.to(ops.compute_dtype(x))
        pieces, a, b = ([getattr(layer, name) for layer in layers] for name in ("pieces", "lora_a", "lora_b"))
        return lora_linears(x, self.format, pieces, biases, a, b, self.lora.scale)

    def _joins(self, first: LoraLinear) -> bool:
        """Slices and watched layers do not: they are of another type, or have hooks."""
        watched = self._forward_hooks or self._forward_pre_hooks
        plain = self.magnitude is None and not (self.lora.dropout and self.training)
        return plain and not watched and (self.format, self.lora.scale) == (first.format, first.lora.scale)

    def _update(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.lora.dropout, self.training)
        return self.lora.scale * F.linear(F.linear(dropped, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))

    def _with_magnitude(self, x: Tensor) -> Tensor:
        """m / |W + scale B A| (W x + scale B A x) + b, lengths of rows (Liu et al. 2024, equation 5)."""
        assert self.magnitude is not None
        y = ops.frozen_linear(x, self.format, self.pieces, x.shape[-1]) + self._update(x)
        y = y * (self.magnitude / self.row_norms()).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """Length of each row of W + scale B A, float32 [out]."""
        merged = self.merged_weight(torch.float32)
        if self.sum_slices is None:
            return torch.linalg.vector_norm(merged, dim=1)
        return self.sum_slices(merged.square().sum(1)).sqrt()

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype) -> Tensor:
        """W + scale B A, [out, in]: what the layer computes, as one matrix, DoRA's lengths left out."""
        frozen = self.whole_weight(dtype)
        return torch.addmm(frozen, self.lora_b.to(dtype), self.lora_a.to(dtype), alpha=self.lora.scale)

    def fixed_types(self) -> list[Tensor]:
        magnitude = [] if self.magnitude is None else [self.magnitude]
        return [*super().fixed_types(), self.lora_a, self.lora_b, *magnitude]

    @torch.no_grad()
    def give_weight(self) -> Tensor:
        """The merged weight: the layer as a plain linear. DoRA's lengths go into its rows."""
        weight = super().give_weight()
        return merge(weight, gathered(self.lora_a), gathered(self.lora_b), self.lora.scale, self._lengths()).to(
            weight.dtype
        )

    def _lengths(self) -> Tensor | None:
        return None if self.magnitude is None else gathered(self.magnitude)

    @torch.no_grad()
    def start_magnitude(self) -> None:
        """DoRA begins at the lengths of the rows of base and adapter. Call when both are there, on every rank."""
        if self.magnitude is not None:
            a, b = gathered(self.lora_a), gathered(self.lora_b)
            start = merge(self.whole_weight(torch.float32), a, b, self.lora.scale)
            copy_whole(self.magnitude, torch.linalg.vector_norm(start, dim=1))


class LoraExperts(Adapted, FrozenExperts):
    """One adapter for each expert's linear: A [E, rank, in], B [E, out, rank]."""

    def __init__(self, linear: LinearConfig, lora: Lora, num_experts: int) -> None:
        super().__init__(linear, num_experts)
        self.lora = lora
        self.lora_a = nn.Parameter(torch.empty(num_experts, lora.rank, linear.in_features))
        self.lora_b = nn.Parameter(torch.zeros(num_experts, linear.out_features, lora.rank))

    def forward(self, x_MI: Tensor, counts_E: Tensor) -> Tensor:
        x_MI = x_MI.to(ops.compute_dtype(x_MI))
        dropped = F.dropout(x_MI, self.lora.dropout, self.training)
        low_MR = grouped_linear(dropped, self.lora_a.to(x_MI.dtype), counts_E)
        update = grouped_linear(low_MR, self.lora_b.to(x_MI.dtype), counts_E)
        return torch.add(super().forward(x_MI, counts_E), update, alpha=self.lora.scale)

    def fixed_types(self) -> list[Tensor]:
        return [*super().fixed_types(), self.lora_a, self.lora_b]

    @torch.no_grad()
    def give_weight(self) -> Tensor:
        """The merged weights of all experts."""
        weight = super().give_weight()
        return merge(weight, gathered(self.lora_a), gathered(self.lora_b), self.lora.scale).to(weight.dtype)

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype) -> Tensor:
        """W + scale B A of every expert, [E, out, in]."""
        frozen = self.whole_weight(dtype)
        return torch.baddbmm(frozen, self.lora_b.to(dtype), self.lora_a.to(dtype), alpha=self.lora.scale)
