"""Rows of tokens to their experts and back, as gathers in both directions.

A row that goes to a place of an order comes back from that place: the backward pass of a gather by a permutation is a
gather by its inverse, and a token's sum over its choices reads each of their rows once. Left to autograd they would be
scattered sums, which add atomically, in the order in which they happen to run, or sort the indices first.

Names: M tokens with C choices each, R = M x C rows, ordered by expert: order_R[place] is the choice that stands there,
choice c of token m being number m x C + c; places_R its inverse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def inverse(order_R: Tensor) -> Tensor:
    """[R], where each number of a permutation stands."""
    places_R = torch.empty_like(order_R)
    return places_R.scatter_(0, order_R, torch.arange(order_R.numel(), device=order_R.device, dtype=order_R.dtype))


def permute(x_RH: Tensor, order_R: Tensor, places_R: Tensor) -> Tensor:
    """x_RH[order_R]."""
    return _Permute.apply(x_RH, order_R, places_R)


def spread(x_MH: Tensor, order_R: Tensor, places_R: Tensor) -> Tensor:
    """[R, H]: each token's row in the places of its choices."""
    return _Spread.apply(x_MH, order_R, places_R)


def mix(x_RH: Tensor, weights_MC: Tensor, order_R: Tensor, places_R: Tensor) -> Tensor:
    """[M, H]: each token's rows by their weights, summed in float32. The weights may have another type."""
    return _Mix.apply(x_RH, weights_MC, order_R, places_R)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RH: Tensor, order_R: Tensor, places_R: Tensor) -> Tensor:
        ctx.save_for_backward(places_R)
        return x_RH[order_R]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places_R,) = ctx.saved_tensors
        return grads[0][places_R], None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MH: Tensor, order_R: Tensor, places_R: Tensor) -> Tensor:
        ctx.save_for_backward(places_R)
        ctx.choices = order_R.numel() // x_MH.shape[0]
        return x_MH[order_R // ctx.choices]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places_R,) = ctx.saved_tensors
        parts_MCH = grads[0][places_R].unflatten(0, (-1, ctx.choices))
        return parts_MCH.sum(1, dtype=wide(parts_MCH)).to(parts_MCH.dtype), None, None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RH: Tensor, weights_MC: Tensor, order_R: Tensor, places_R: Tensor) -> Tensor:
        ctx.save_for_backward(x_RH, weights_MC, order_R, places_R)
        parts_MCH = x_RH[places_R].unflatten(0, weights_MC.shape)
        return (parts_MCH.to(wide(x_RH)) * weights_MC[..., None]).sum(1).to(x_RH.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_RH, weights_MC, order_R, places_R = ctx.saved_tensors
        grad_MH, choices = grads[0], weights_MC.shape[1]
        parts_MCH = x_RH[places_R].unflatten(0, weights_MC.shape)
        of_weights = (parts_MCH.to(wide(x_RH)) * grad_MH[:, None]).sum(-1).to(weights_MC.dtype)
        of_rows = grad_MH[order_R // choices].to(wide(x_RH)) * weights_MC.flatten()[order_R][:, None]
        return of_rows.to(x_RH.dtype), of_weights, None, None


def wide(x: Tensor) -> torch.dtype:
    """Of sums over x."""
    return torch.promote_types(x.dtype, torch.float32)
