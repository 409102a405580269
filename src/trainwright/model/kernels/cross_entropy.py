"""Cross entropy of a linear head, summed over tokens, without ever holding all logits.

Owns the head's matmul in training. Per chunk of tokens it makes logits in float32, adds their loss and turns them into
gradients at once, so memory holds one chunk of logits and the backward pass is a multiplication. Arithmetic is that of
matmul + log softmax + negative log likelihood; the sum and the weight gradient accumulate in float32.
Splitting the vocabulary over ranks is parallel/'s work: it passes `vocab_offset` and the two reductions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainwright.model.kernels import has_triton
from trainwright.model.kernels.cast import cast
from trainwright.model.kernels.product import add_matmul, matmul

IGNORE = -100
_CHUNK_BYTES = {"cpu": 96 << 20}
_DEFAULT_CHUNK_BYTES = 512 << 20
TRAINED_ROWS = 4096
"""Tokens of a chunk on a GPU where the head is trained, or more: its gradient is read and written in float32 once a
chunk, which hides behind a product of so many tokens (a sixth of its time) and not of 1,024 (two thirds)."""
ALIGNED = 8
"""Numbers of 16 bits in the 16 bytes that a matrix unit reads at once."""


@dataclass(frozen=True)
class VocabShard:
    """This rank's slice of the vocabulary begins at `offset`; the callables reduce in place over all slices.

    `size`: rows of the largest slice. All ranks cut their tokens into chunks by it, so that they reduce equally often.
    """

    offset: int
    size: int
    reduce_max: Callable[[Tensor], Any]
    reduce_sum: Callable[[Tensor], Any]


def linear_cross_entropy_plain(x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    """The reference: all logits at once."""
    logits = F.linear(x, weight, bias).float().flatten(0, -2)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")


def chunk_rows(rows: int, vocab: int, device_type: str, trained: bool = False) -> int:
    """Tokens a chunk, so that its float32 logits stay near a fixed size. trained: whether the head gets a gradient."""
    budget = _CHUNK_BYTES.get(device_type, _DEFAULT_CHUNK_BYTES)
    chunks = max(1, -(-rows * vocab * 4 // budget))
    if trained and device_type != "cpu":
        chunks = min(chunks, max(1, -(-rows // TRAINED_ROWS)))
    return max(1, -(-rows // chunks))  # a part of a row may have no supervised token at all


def _matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a float32 result; the matrix unit accumulates in float32 anyway, so nothing is rounded between."""
    if a.dtype == torch.float32:
        return matmul(a, b)
    if a.device.type != "cuda":
        return (a @ b).float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _whole_units(x: Tensor, vocab: int) -> int:
    """The vocabulary with as many words of nothing as make whole reads of a matrix unit. It reads rows of an odd one
    (GPT-2's 50257) number by number, also where only its size is odd and the rows begin at even places."""
    return -(-vocab // ALIGNED) * ALIGNED if x.is_cuda and x.dtype != torch.float32 else vocab


def _widened(grad_MV: Tensor, width: int) -> Tensor:
    """[M, width] with zeros behind; in place where each row has the room, as the logits that it was made of had."""
    columns = grad_MV.shape[1]
    if columns == width:
        return grad_MV
    if grad_MV.stride(0) != width:
        return F.pad(grad_MV, (0, width - columns))
    wide = grad_MV.as_strided((grad_MV.shape[0], width), grad_MV.stride())
    wide[:, columns:] = 0
    return wide


def _probabilities(logits_MV: Tensor, labels_M: Tensor, shard: VocabShard | None) -> tuple[Tensor, Tensor]:
    """(softmax in place of the logits, loss [M]); labels outside this slice of the vocabulary are < 0."""
    if shard is None:
        logits_MV = F.log_softmax(logits_MV, -1)
        loss_M = -logits_MV.gather(1, labels_M.clamp(min=0)[:, None]).squeeze(1)
        return logits_MV.exp_(), loss_M
    highest_M1 = logits_MV.amax(-1, keepdim=True)
    shard.reduce_max(highest_M1)
    logits_MV.sub_(highest_M1)
    target_M = logits_MV.gather(1, labels_M.clamp(min=0)[:, None]).squeeze(1).masked_fill(labels_M < 0, 0.0)
    total_M1 = logits_MV.exp_().sum(-1, keepdim=True)
    shard.reduce_sum(total_M1)
    shard.reduce_sum(target_M)
    return logits_MV.div_(total_M1), total_M1.log().squeeze(1) - target_M


def _gradient(
    logits_MV: Tensor,
    labels_M: Tensor,
    kept_M: Tensor,
    shard: VocabShard | None,
    dtype: torch.dtype | None,
    grad_b: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """(softmax - one-hot in `dtype`, loss [M]), None for the first without a type; what rows of `kept` give the bias is
    added to `grad_b`."""
    probabilities, loss_M = _probabilities(logits_MV, labels_M, shard)
    if dtype is None:
        return None, loss_M
    probabilities.scatter_add_(1, labels_M.clamp(min=0)[:, None], -(labels_M >= 0).float()[:, None])
    if grad_b is not None:
        grad_b += kept_M.float() @ probabilities
    return probabilities.to(dtype), loss_M


def _fused(
    x: Tensor, shard: VocabShard | None
) -> Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]] | None:
    """Gradient and loss of a chunk by our kernels, where the device has Triton."""
    if not x.is_cuda or not has_triton():
        return None
    from trainwright.model.kernels import triton_cross_entropy

    if shard is None:
        return triton_cross_entropy.softmax_gradient

    def of_slice(logits_MV: Tensor, labels_M: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        highest_M, total_M, target_M = triton_cross_entropy.slice_sums(logits_MV, labels_M)
        top_M = highest_M.clone()
        shard.reduce_max(top_M)
        sums = torch.stack([total_M * (highest_M - top_M).exp_(), target_M])
        shard.reduce_sum(sums)
        whole_M = sums[0].log_().add_(top_M)
        return triton_cross_entropy.slice_gradient(logits_MV, labels_M, whole_M, dtype), whole_M - sums[1]

    return of_slice


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_M: Tensor,
        shard: VocabShard | None,
        chunk: int,
    ) -> Tensor:
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        needed = need_x or need_w or need_b
        supervised_M = labels_M != IGNORE
        local_M = labels_M - (shard.offset if shard else 0)
        local_M = torch.where(supervised_M & (local_M >= 0) & (local_M < weight_VH.shape[0]), local_M, -1)
        loss = torch.zeros((), dtype=torch.float32, device=x_MH.device)
        grad_x = torch.empty_like(x_MH) if need_x else None
        vocab = weight_VH.shape[0]
        width = _whole_units(x_MH, vocab)
        weight_WH = F.pad(weight_VH, (0, 0, 0, width - vocab)) if width > vocab else weight_VH
        grad_w = torch.zeros_like(weight_WH, dtype=torch.float32) if need_w else None
        grad_b = torch.zeros(vocab, dtype=torch.float32, device=x_MH.device) if need_b else None
        fused = _fused(x_MH, shard) if bias_V is None and needed else None
        rows = chunk or chunk_rows(x_MH.shape[0], shard.size if shard else vocab, x_MH.device.type, need_w)
        for begin in range(0, x_MH.shape[0], rows):
            part = slice(begin, begin + rows)
            kept, label = supervised_M[part], local_M[part]
            # A row that is not trained must give no gradient. Zeroing its H inputs and its H outputs does that; zeroing
            # its V probabilities would be another pass over the logits.
            x = x_MH[part].masked_fill(~kept[:, None], 0.0)
            logits = _matmul_float32(x, weight_WH.t())[:, :vocab]
            logits = logits.add_(bias_V) if bias_V is not None else logits
            grad: Tensor | None
            if fused:
                grad, loss_M = fused(logits, label, x.dtype)
            else:
                grad, loss_M = _gradient(logits, label, kept, shard, x.dtype if needed else None, grad_b)
            del logits  # or it would live on beside the next chunk's
            loss += loss_M.masked_fill_(~kept, 0.0).sum()
            if grad is None:
                continue
            grad = _widened(grad, width)
            if grad_x is not None:
                matmul(grad, weight_WH, out=grad_x[part]).masked_fill_(~kept[:, None], 0.0)
            if grad_w is not None:
                _add_product(grad_w, grad.t(), x)
            del grad
        ctx.dtypes = weight_VH.dtype, bias_V.dtype if bias_V is not None else None
        ctx.grads = grad_x, None if grad_w is None else grad_w[:vocab], grad_b
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        if ctx.grads is None:
            raise RuntimeError("the loss of a linear head can be differentiated once: it scales its gradients in place")
        (grad_x, grad_w, grad_b), ctx.grads = ctx.grads, None
        factor = grads[0]
        return (
            None if grad_x is None else grad_x.mul_(factor),
            None if grad_w is None else _scaled(grad_w, factor, ctx.dtypes[0]),
            None if grad_b is None else _scaled(grad_b, factor, ctx.dtypes[1]),
            None,
            None,
            None,
        )


def _scaled(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """total * factor in `dtype`, in one pass."""
    return total.mul_(factor) if total.dtype == dtype else cast(total, dtype, factor)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in float32, in place where the device can: a product of its own would be as large as the total,
    and writing, reading and adding it three times the bytes."""
    if a.dtype == torch.float32:
        add_matmul(total, a, b)
    elif _sums_in_place(a.device.type, a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += _matmul_float32(a, b)


@cache
def _sums_in_place(device: str, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of 16-bit factors to a float32 total. Tried, since versions and devices differ:
    it is missing on CPUs, and an earlier one wants all three of one type."""
    factor, total = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def linear_cross_entropy(
    x: Tensor,
    weight_VH: Tensor,
    labels: Tensor,
    bias_V: Tensor | None = None,
    shard: VocabShard | None = None,
    chunk: int = 0,
) -> Tensor:
    """Sum over labels != -100 of -log softmax(x W^T + b)[label], a float32 scalar.

    x [..., H], labels [...] int64, already shifted. Gradients flow to x, W and b, each only if it needs one.
    `chunk`: tokens whose logits exist at once; 0 keeps them near a fixed size.
    """
    x_MH, labels_M = x.flatten(0, -2), labels.flatten()
    if x.device.type == "cpu" and shard is None and not torch.compiler.is_compiling():
        # Asking how many tokens are supervised costs nothing here and saves the head's work on the others.
        kept = (labels_M != IGNORE).nonzero().flatten()
        if kept.numel() < labels_M.numel():
            x_MH, labels_M = x_MH[kept], labels_M[kept]
    return _LinearCrossEntropy.apply(x_MH, weight_VH, bias_V, labels_M, shard, chunk)
