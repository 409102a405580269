"""Rows of tokens to places and back, as gathers in both directions. Owns the choice between Triton and plain torch.

A row that goes to a place of an order comes back from that place: the backward pass of a gather is a gather by the
inverse, and a token's sum over its choices reads each of their rows once. Left to autograd they would be scattered
sums, which add atomically, in the order in which they happen to run, or sort the indices first.

Names: M tokens with C choices each, choice c of token m being number m x C + c. R of them have a place: order_R[place]
is the number that stands there, places_MC[m, c] its place; a choice without one has a number from R on.
"""

# No `from __future__ import annotations`: torch reads the operations' schemas from these annotations.
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from trainwright.model.kernels import has_triton


def inverse(order: Tensor) -> Tensor:
    """Where each number of a permutation stands."""
    places = torch.empty_like(order)
    return places.scatter_(0, order, torch.arange(order.numel(), device=order.device, dtype=order.dtype))


def spread(x_MH: Tensor, order_R: Tensor, places_MC: Tensor) -> Tensor:
    """[R, H]: each token's row in the places of its choices."""
    made: Tensor = _way(spread_op, _Spread, _spread)(x_MH, order_R, places_MC)
    return made


def collect(x_RH: Tensor, order_R: Tensor, places_MC: Tensor) -> Tensor:
    """[M, H]: the sum of each token's rows, in float32 until it is whole."""
    made: Tensor = _way(collect_op, _Collect, _collect)(x_RH, order_R, places_MC)
    return made


def mix(x_RH: Tensor, weights_MC: Tensor, order_R: Tensor, places_MC: Tensor) -> Tensor:
    """[M, H]: each token's rows by their weights, summed in float32. The weights may have another type."""
    made: Tensor = _way(mix_op, _Mix, _mix)(x_RH, weights_MC, order_R, places_MC)
    return made


def _way(operation: Any, function: Any, plain: Any) -> Callable[..., Any]:
    """Compiled, they are operations of their own, with registered gradients: in a layer that is to compute it again,
    torch 2.11 keeps what an autograd.Function makes, and these rows are C times the stream. Elsewhere Functions, which
    take half of the host's time."""
    if torch.compiler.is_compiling():
        made: Callable[..., Any] = operation
    else:
        made = function.apply if torch.is_grad_enabled() else plain
    return made


# ---- what they do


def _spread(x_MH: Tensor, order_R: Tensor, places_MC: Tensor) -> Tensor:
    return x_MH[order_R // places_MC.shape[1]]


def _collect(x_RH: Tensor, order_R: Tensor, places_MC: Tensor) -> Tensor:
    if kernels := _kernels(x_RH):
        return kernels.sums(x_RH, None, places_MC)
    rows = x_RH.shape[0]
    padded_RH = F.pad(x_RH, (0, 0, 0, 1))
    return F.embedding_bag(places_MC.clamp(max=rows), padded_RH, mode="sum", padding_idx=rows)


def _mix(x_RH: Tensor, weights_MC: Tensor, order_R: Tensor, places_MC: Tensor) -> Tensor:
    if kernels := _kernels(x_RH):
        return kernels.sums(x_RH, weights_MC, places_MC)
    parts_MCH = _rows_at(x_RH, places_MC).to(_wide(x_RH))
    return (parts_MCH * weights_MC[..., None]).sum(1).to(x_RH.dtype)


def _mix_backward(
    grad_MH: Tensor, x_RH: Tensor, weights_MC: Tensor, order_R: Tensor, places_MC: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `mix`'s rows and of its weights; 0 for a weight of no row."""
    if kernels := _kernels(x_RH):
        return kernels.mix_gradients(grad_MH, x_RH, weights_MC, places_MC)
    wide = _wide(x_RH)
    of_rows = grad_MH[order_R // places_MC.shape[1]].to(wide) * weights_MC.flatten()[order_R][:, None]
    of_weights = (_rows_at(x_RH, places_MC).to(wide) * grad_MH[:, None]).sum(-1)
    return of_rows.to(x_RH.dtype), of_weights.to(weights_MC.dtype)


def _kernels(x: Tensor) -> ModuleType | None:
    """Our Triton kernels, where they take this."""
    if not x.is_cuda or x.dtype == torch.float64 or not has_triton():
        return None
    from trainwright.model.kernels import triton_rows

    return triton_rows


def _rows_at(x_RH: Tensor, places_MC: Tensor) -> Tensor:
    """[M, C, H], zeros where a place has no row."""
    rows = x_RH.shape[0]
    if rows == places_MC.numel():
        return x_RH[places_MC]
    return F.pad(x_RH, (0, 0, 0, 1))[places_MC.clamp(max=rows)]


def _wide(x: Tensor) -> torch.dtype:
    """Of sums over x."""
    return torch.promote_types(x.dtype, torch.float32)


# ---- as operations and as Functions

spread_op = custom_op("trainwright::spread_rows", _spread, mutates_args=())
collect_op = custom_op("trainwright::collect_rows", _collect, mutates_args=())
mix_op = custom_op("trainwright::mix_rows", _mix, mutates_args=())
mix_backward_op = custom_op("trainwright::mix_rows_backward", _mix_backward, mutates_args=())


@spread_op.register_fake
def _(x_MH: Tensor, order_R: Tensor, places_MC: Tensor) -> Tensor:
    return x_MH.new_empty(order_R.shape[0], x_MH.shape[1])


@collect_op.register_fake
def _(x_RH: Tensor, order_R: Tensor, places_MC: Tensor) -> Tensor:
    return x_RH.new_empty(places_MC.shape[0], x_RH.shape[1])


@mix_op.register_fake
def _(x_RH: Tensor, weights_MC: Tensor, order_R: Tensor, places_MC: Tensor) -> Tensor:
    return x_RH.new_empty(places_MC.shape[0], x_RH.shape[1])


@mix_backward_op.register_fake
def _(grad_MH: Tensor, x_RH: Tensor, weights_MC: Tensor, order_R: Tensor, places_MC: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_RH), torch.empty_like(weights_MC)


def _keep_places(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _of_spread(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return collect(grad, *ctx.saved_tensors), None, None


def _of_collect(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return spread(grad, *ctx.saved_tensors), None, None


def _of_mix(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    made = mix_backward_op if torch.compiler.is_compiling() else _mix_backward
    return *made(grad, *ctx.saved_tensors), None, None


spread_op.register_autograd(_of_spread, setup_context=_keep_places)
collect_op.register_autograd(_of_collect, setup_context=_keep_places)
mix_op.register_autograd(_of_mix, setup_context=_keep_all)


def _function(name: str, make: Any, keep: Any, backward: Any) -> type[torch.autograd.Function]:
    """The same as a Function. With a `setup_context` of its own it would look at its signature in every call, 10 us."""

    def forward(ctx: Any, *inputs: Any) -> Tensor:
        made: Tensor = make(*inputs)
        keep(ctx, inputs, made)
        return made

    return type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )


_Spread = _function("_Spread", _spread, _keep_places, _of_spread)
_Collect = _function("_Collect", _collect, _keep_places, _of_collect)
_Mix = _function("_Mix", _mix, _keep_all, _of_mix)
