"""Several adapted linear layers of one input as one operation: q, k and v; gate and up.

They share one product by all of their A's, and one gradient of x, to which each adds its part: two small products and
a sum over the stream less for each layer beyond the first, in both directions. What is kept is what each would keep.
"""

# No `from __future__ import annotations`: torch reads the operations' schemas from these annotations.
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from trainwright.adapt import ops


@custom_op("trainwright::lora_linears", mutates_args=())
def lora_linears_op(
    x: Tensor,
    format: str,
    pieces: list[Tensor],
    low: Tensor,
    biases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scale: float,
) -> list[Tensor]:
    """`ops.lora_linear_op` of several layers: their pieces one after the other, `low` [M, R] x A^T of all."""
    x_MI, lows = ops.as_rows(x), low.split([part.shape[0] for part in a], 1)
    made = []
    for number, (part, one_MR, up) in enumerate(zip(_parts(pieces, len(b)), lows, b, strict=True)):
        bias = biases[number] if biases else None
        y_MO = ops.product(x_MI, format, part, x.shape[-1], bias, (one_MR, up.to(x.dtype).t(), scale))
        made.append(y_MO.view(*x.shape[:-1], y_MO.shape[-1]))
    return made


@lora_linears_op.register_fake
def _(
    x: Tensor,
    format: str,
    pieces: list[Tensor],
    low: Tensor,
    biases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scale: float,
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], up.shape[0]) for up in b]


@custom_op("trainwright::lora_linears_backward", mutates_args=())
def lora_linears_backward_op(
    grads: list[Tensor],
    x: Tensor,
    low: Tensor,
    format: str,
    pieces: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scale: float,
    needs_x: bool,
) -> list[Tensor]:
    """Gradients of x, of every A and of every B."""
    x_MI, rows, ranks = ops.as_rows(x), [ops.as_rows(grad) for grad in grads], [part.shape[0] for part in a]
    grad_low_MR = torch.empty_like(low)
    for grad_MO, up, out_MR in zip(rows, b, grad_low_MR.split(ranks, 1), strict=True):
        torch.mm(grad_MO, up.to(x.dtype), out=out_MR)
    grad_low_MR.mul_(scale)
    of_a = ops.product_float32(grad_low_MR.t(), x_MI).split(ranks)
    of_b = [ops.product_float32(grad.t(), one).mul_(scale) for grad, one in zip(rows, low.split(ranks, 1), strict=True)]
    made = [grad.to(part.dtype, copy=True) for grad, part in zip([*of_a, *of_b], [*a, *b], strict=True)]
    if not needs_x:
        return [x.new_empty(0), *made]
    grad_x = grad_low_MR @ torch.cat(a).to(x.dtype)
    for grad_MO, part in zip(rows, _parts(pieces, len(b)), strict=True):
        ops.add_product_backward(grad_x, grad_MO, format, part)
    return [grad_x.view(x.shape), *made]


@lora_linears_backward_op.register_fake
def _(
    grads: list[Tensor],
    x: Tensor,
    low: Tensor,
    format: str,
    pieces: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scale: float,
    needs_x: bool,
) -> list[Tensor]:
    return [x.new_empty(x.shape if needs_x else (0,)), *(torch.empty_like(part) for part in (*a, *b))]


def _parts(pieces: list[Tensor], count: int) -> list[list[Tensor]]:
    each = len(pieces) // count
    return [pieces[start : start + each] for start in range(0, len(pieces), each)]


def _keep_loras(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, ctx.format, pieces, low, biases, a, b, ctx.scale = inputs
    ctx.counts = len(a), len(pieces), len(biases)
    ctx.save_for_backward(x, low, *a, *b, *pieces)


def _loras_gradients(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    count, pieces, biases = ctx.counts
    x, low, *rest = ctx.saved_tensors
    a, b, frozen = rest[:count], rest[count : 2 * count], rest[2 * count :]
    needs_x = ctx.needs_input_grad[0]
    grad_x, *made = lora_linears_backward_op(grads, x, low, ctx.format, frozen, a, b, ctx.scale, needs_x)
    of_x = grad_x if needs_x else None
    return of_x, None, [None] * pieces, None, [None] * biases, made[:count], made[count:], None


lora_linears_op.register_autograd(_loras_gradients, setup_context=_keep_loras)


def lora_linears(
    x: Tensor,
    format: str,
    pieces: list[list[Tensor]],
    biases: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
) -> list[Tensor]:
    """`ops.lora_linear` of several layers of one format, for each its pieces, A and B; biases of all or none."""
    low = F.linear(ops.as_rows(x.detach()), torch.cat([part.detach() for part in a]).to(x.dtype))
    return lora_linears_op(
        x, format, [piece for each in pieces for piece in each], low, list(biases), list(a), list(b), scale
    )


KEPT = ops.KEPT | {torch.ops.trainwright.lora_linears.default}


def kept_cost(args: tuple[Any, ...]) -> tuple[int, float]:
    """`ops.kept_cost` of one of `KEPT`."""
    if len(args) < 7 or not isinstance(args[6], list):
        return ops.kept_cost(args)
    x, outputs = args[0], sum(up.shape[0] for up in args[6])
    rows = x.numel() // x.shape[-1]
    return rows * outputs * x.element_size(), 2.0 * rows * outputs * x.shape[-1]
