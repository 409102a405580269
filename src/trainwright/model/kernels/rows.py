"""Rows of tokens to their experts and back, as gathers in both directions.

A row that goes to a place of an order comes back from that place: the backward pass of a gather by a permutation is a
gather by its inverse, and a token's sum over its choices reads each of their rows once. Left to autograd they would be
scattered sums, which add atomically, in the order in which they happen to run, or sort the indices first.

Names: M tokens with C choices each, R = M x C rows, ordered by expert: order_R[place] is the choice that stands there,
choice c of token m being number m x C + c; places_R its inverse.
"""

# No `from __future__ import annotations`: torch reads the operations' schemas from these annotations.
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op


def inverse(order_R: Tensor) -> Tensor:
    """[R], where each number of a permutation stands."""
    places_R = torch.empty_like(order_R)
    return places_R.scatter_(0, order_R, torch.arange(order_R.numel(), device=order_R.device, dtype=order_R.dtype))


def permute(x_RH: Tensor, order_R: Tensor, places_R: Tensor) -> Tensor:
    """x_RH[order_R]."""
    return _Permute.apply(x_RH, order_R, places_R)


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


# Operations of their own, with registered gradients: in a compiled layer that is to compute it again, torch 2.11 keeps
# what an autograd.Function makes, and these rows are C times the stream.


@custom_op("trainwright::spread_rows", mutates_args=())
def spread(x_MH: Tensor, order_R: Tensor, places_R: Tensor) -> Tensor:
    """[R, H]: each token's row in the places of its choices."""
    return x_MH[order_R // (order_R.numel() // x_MH.shape[0])]


@spread.register_fake
def _(x_MH: Tensor, order_R: Tensor, places_R: Tensor) -> Tensor:
    return x_MH.new_empty(order_R.numel(), x_MH.shape[1])


@custom_op("trainwright::collect_rows", mutates_args=())
def collect(x_RH: Tensor, places_R: Tensor, tokens: int) -> Tensor:
    """[M, H]: the sum of each token's rows. One kernel, which adds in float32."""
    return F.embedding_bag(places_R.view(tokens, -1), x_RH.contiguous(), mode="sum")


@collect.register_fake
def _(x_RH: Tensor, places_R: Tensor, tokens: int) -> Tensor:
    return x_RH.new_empty(tokens, x_RH.shape[1])


def _keep_places(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.tokens = inputs[0].shape[0]
    ctx.save_for_backward(inputs[2])


def _collect(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return collect(grad, *ctx.saved_tensors, ctx.tokens), None, None


spread.register_autograd(_collect, setup_context=_keep_places)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RH: Tensor, weights_MC: Tensor, order_R: Tensor, places_R: Tensor) -> Tensor:
        ctx.save_for_backward(x_RH, weights_MC, order_R, places_R)
        parts_MCH = x_RH[places_R].unflatten(0, weights_MC.shape)
        return _cast((parts_MCH.to(_wide(x_RH)) * weights_MC[..., None]).sum(1), x_RH.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_RH, weights_MC, order_R, places_R = ctx.saved_tensors
        grad_MH, choices = grads[0], weights_MC.shape[1]
        parts_MCH = x_RH[places_R].unflatten(0, weights_MC.shape)
        of_weights = (parts_MCH.to(_wide(x_RH)) * grad_MH[:, None]).sum(-1)
        of_rows = grad_MH[order_R // choices].to(_wide(x_RH)) * weights_MC.flatten()[order_R][:, None]
        return _cast(of_rows, x_RH.dtype), _cast(of_weights, weights_MC.dtype), None, None


def _wide(x: Tensor) -> torch.dtype:
    """Of sums over x."""
    return torch.promote_types(x.dtype, torch.float32)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), but not called where nothing is to do: compiled by torch 2.11, a function that ends in such a call
    loses its gradient."""
    return x if x.dtype == dtype else x.to(dtype)
