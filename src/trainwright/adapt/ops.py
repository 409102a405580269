"""Arithmetic of a frozen linear layer with and without a low-rank adapter: what is computed, and what is kept for it.

y = x W^T + b + scale (x A^T) B^T. Kept for the backward pass: x, which the layer's neighbours share, and x A^T, which
is rank wide. W is read once forward and once backward; in fewer bits it becomes full width only inside one operation.
No gradient of W or b exists.

Forward and backward are custom operations, opaque to torch.compile: seen through, W in full width would be an
intermediate result like any other, and the compiler would keep it from the forward for the backward pass. Their
gradients are registered with them, not written as an autograd.Function: what stands inside such a function is not
computed again under torch.compile of 2.11, whatever the layer's recomputation says.
"""

# No `from __future__ import annotations`: torch reads the operations' schemas from these annotations.
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from trainwright.model.kernels import quantized
from trainwright.model.kernels.grouped import grouped_linear
from trainwright.model.kernels.product import add_matmul, matmul


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that matrix products run in: autocast's where it is on, else x's own."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def full_weight(format: str, pieces: list[Tensor], columns: int, dtype: torch.dtype) -> Tensor:
    if format == "plain":
        return pieces[0].to(dtype)
    return quantized.dequantize(format, quantized.as_bytes(pieces), columns, dtype)  # type: ignore[arg-type]


def as_rows(x: Tensor) -> Tensor:
    """[..., I] -> [M, I]."""
    return x.reshape(-1, x.shape[-1])


# Where an adapter's product is asked for too (`low`), the large product adds to the small one as it writes: one pass
# over the result less than the other way round. That of fp8 cannot.


def product(
    x_MI: Tensor,
    format: str,
    pieces: list[Tensor],
    columns: int,
    bias: Tensor | None,
    low: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """x W^T + b; with `low` (x A^T [M, R], B^T [R, O], scale) the adapter's product beside it."""
    bias = bias if bias is None else bias.to(x_MI.dtype)
    if format == "fp8":
        y = quantized.fp8_linear(x_MI, *quantized.as_bytes(pieces))
        y = y if bias is None else y.add_(bias)
        return y if low is None else y.addmm_(low[0], low[1], alpha=low[2])
    weight = full_weight(format, pieces, columns, x_MI.dtype)
    if low is None:
        return F.linear(x_MI, weight, bias)
    low_MR, up_RO, scale = low
    y = (low_MR * scale) @ up_RO if bias is None else torch.addmm(bias, low_MR, up_RO, alpha=scale)
    return add_matmul(y, x_MI, weight.t())


def product_backward(
    grad_MO: Tensor, format: str, pieces: list[Tensor], columns: int, low: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """grad W; with `low` (scale grad B [M, R], A [R, I]) the adapter's product beside it."""
    if format == "fp8":
        grad_x = quantized.fp8_linear_backward(grad_MO, *quantized.as_bytes(pieces))
        return grad_x if low is None else grad_x.addmm_(*low)
    if low is None:
        return matmul(grad_MO, full_weight(format, pieces, columns, grad_MO.dtype))
    return add_product_backward(low[0] @ low[1], grad_MO, format, pieces)


def add_product_backward(onto_MI: Tensor, grad_MO: Tensor, format: str, pieces: list[Tensor]) -> Tensor:
    """onto + grad W, in place."""
    columns = onto_MI.shape[1]
    if format == "fp8":
        return onto_MI.add_(product_backward(grad_MO, format, pieces, columns))
    return add_matmul(onto_MI, grad_MO, full_weight(format, pieces, columns, grad_MO.dtype))


def product_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32: gradients of A and B are as exact as the matrix unit's own sums."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


# ---- the operations -------------------------------------------------------------------------------------------------


@custom_op("trainwright::frozen_linear", mutates_args=())
def frozen_linear_op(x: Tensor, format: str, pieces: list[Tensor], columns: int, bias: Tensor | None) -> Tensor:
    y = product(as_rows(x), format, pieces, columns, bias)
    return y.view(*x.shape[:-1], y.shape[-1])


@frozen_linear_op.register_fake
def _(x: Tensor, format: str, pieces: list[Tensor], columns: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], pieces[0].shape[0])


@custom_op("trainwright::frozen_linear_backward", mutates_args=())
def frozen_linear_backward_op(grad: Tensor, format: str, pieces: list[Tensor], columns: int) -> Tensor:
    return product_backward(as_rows(grad), format, pieces, columns).view(*grad.shape[:-1], columns)


@frozen_linear_backward_op.register_fake
def _(grad: Tensor, format: str, pieces: list[Tensor], columns: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], columns)


@custom_op("trainwright::lora_linear", mutates_args=())
def lora_linear_op(
    x: Tensor,
    format: str,
    pieces: list[Tensor],
    low_MR: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
) -> Tensor:
    """`low_MR` is x A^T and A itself is not read: it stands here for its gradient."""
    low = low_MR, b.to(x.dtype).t(), scale
    y_MO = product(as_rows(x), format, pieces, x.shape[-1], bias, low)
    return y_MO.view(*x.shape[:-1], y_MO.shape[-1])


@lora_linear_op.register_fake
def _(
    x: Tensor,
    format: str,
    pieces: list[Tensor],
    low_MR: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], b.shape[0])


@custom_op("trainwright::lora_linear_backward", mutates_args=())
def lora_linear_backward_op(
    grad: Tensor,
    x: Tensor,
    low_MR: Tensor,
    format: str,
    pieces: list[Tensor],
    a: Tensor,
    b: Tensor,
    scale: float,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_MO, x_MI = as_rows(grad), as_rows(x)
    grad_low_MR = (grad_MO @ b.to(x.dtype)).mul_(scale)
    grad_a = product_float32(grad_low_MR.t(), x_MI).to(a.dtype)
    grad_b = product_float32(grad_MO.t(), low_MR).mul_(scale).to(b.dtype)
    if not needs_x:
        return x.new_empty(0), grad_a, grad_b
    grad_x = product_backward(grad_MO, format, pieces, a.shape[1], (grad_low_MR, a.to(x.dtype)))
    return grad_x.view(x.shape), grad_a, grad_b


@lora_linear_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    low_MR: Tensor,
    format: str,
    pieces: list[Tensor],
    a: Tensor,
    b: Tensor,
    scale: float,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape if needs_x else (0,)), torch.empty_like(a), torch.empty_like(b)


@custom_op("trainwright::frozen_grouped_linear", mutates_args=())
def frozen_grouped_linear_op(
    x_MI: Tensor, format: str, pieces: list[Tensor], columns: int, counts_E: Tensor, backward: bool
) -> Tensor:
    weight_EOI = full_weight(format, pieces, columns, x_MI.dtype)
    return grouped_linear(x_MI.contiguous(), weight_EOI.transpose(1, 2) if backward else weight_EOI, counts_E)


@frozen_grouped_linear_op.register_fake
def _(x_MI: Tensor, format: str, pieces: list[Tensor], columns: int, counts_E: Tensor, backward: bool) -> Tensor:
    return x_MI.new_empty(x_MI.shape[0], columns if backward else pieces[0].shape[1])


# ---- with gradients -------------------------------------------------------------------------------------------------


def _keep_frozen(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.format, pieces, ctx.columns, _ = inputs
    ctx.save_for_backward(*pieces)


def _frozen_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    pieces = list(ctx.saved_tensors)
    return frozen_linear_backward_op(grad, ctx.format, pieces, ctx.columns), None, [None] * len(pieces), None, None


def _keep_lora(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.format, pieces, low_MR, _, a, b, ctx.scale = inputs
    ctx.save_for_backward(x, low_MR, a, b, *pieces)


def _lora_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, low_MR, a, b, *pieces = ctx.saved_tensors
    needs_x = ctx.needs_input_grad[0]
    grad_x, grad_a, grad_b = lora_linear_backward_op(grad, x, low_MR, ctx.format, pieces, a, b, ctx.scale, needs_x)
    return grad_x if needs_x else None, None, [None] * len(pieces), None, None, grad_a, grad_b, None


def _keep_grouped(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.format, pieces, ctx.columns, counts_E, _ = inputs
    ctx.save_for_backward(counts_E, *pieces)


def _grouped_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    counts_E, *pieces = ctx.saved_tensors
    grad_x = frozen_grouped_linear_op(grad, ctx.format, pieces, ctx.columns, counts_E, True)
    return grad_x, None, [None] * len(pieces), None, None, None


frozen_linear_op.register_autograd(_frozen_gradients, setup_context=_keep_frozen)
lora_linear_op.register_autograd(_lora_gradients, setup_context=_keep_lora)
frozen_grouped_linear_op.register_autograd(_grouped_gradients, setup_context=_keep_grouped)


def frozen_linear(x: Tensor, format: str, pieces: list[Tensor], columns: int, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in x's dtype, [..., I] -> [..., O]; gradient to x alone. `columns` is I."""
    return frozen_linear_op(x, format, pieces, columns, bias)


def lora_linear(
    x: Tensor, format: str, pieces: list[Tensor], bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """x W^T + b + scale (x A^T) B^T in x's dtype, [..., I] -> [..., O]; gradients to x, A [R, I] and B [O, R]."""
    # x A^T stands apart: where a layer is computed again, its last product is wanted for this alone.
    low_MR = F.linear(as_rows(x.detach()), a.detach().to(x.dtype))
    return lora_linear_op(x, format, pieces, low_MR, bias, a, b, scale)


def frozen_grouped_linear(x_MI: Tensor, format: str, pieces: list[Tensor], columns: int, counts_E: Tensor) -> Tensor:
    """Rows by their expert's weight [E, O, I], [M, I] -> [M, O]; gradient to x alone."""
    return frozen_grouped_linear_op(x_MI, format, pieces, columns, counts_E, False)


def kept_cost(args: tuple[Any, ...]) -> tuple[int, float]:
    """(bytes of the result, FLOPs to make it again) of one of `KEPT`, from what it was called with."""
    x, pieces = args[0], args[2]
    rows, columns, out = x.numel() // x.shape[-1], x.shape[-1], pieces[0].shape[-2]
    return rows * out * x.element_size(), 2.0 * rows * out * columns


KEPT = frozenset(
    {
        torch.ops.trainwright.lora_linear.default,
        torch.ops.trainwright.frozen_linear.default,
        torch.ops.trainwright.frozen_grouped_linear.default,
    }
)
"""Results that cost more to compute than to keep, for selective recompute."""
