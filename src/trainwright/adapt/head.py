"""Cross entropy of a head whose weight is kept in fewer bits: neither its logits nor the weight are ever whole.

Over ranks that each hold a part of the vocabulary, the sums are reduced between the two passes.
Two passes over slices of the vocabulary: the first finds each token's log-sum-exp, the second turns logits into
gradients. The logits are computed twice, which costs a third more of the head's own work, and no memory grows with the
vocabulary. The plain head's loss, with one pass over chunks of tokens, is `model/kernels/cross_entropy.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trainwright.model.kernels.cross_entropy import IGNORE, VocabShard
from trainwright.model.kernels.quantized import Kind, Pieces, dequantize, slice_rows

_TILE_NUMEL = 1 << 24
"""Logits that exist at once: 64 MiB in float32."""
_SLICE = 4096
"""Rows of the head that exist at once."""


def frozen_cross_entropy(
    x: Tensor,
    kind: Kind,
    pieces: Pieces,
    labels: Tensor,
    bias_V: Tensor | None = None,
    shard: VocabShard | None = None,
) -> Tensor:
    """Sum over labels != -100 of -log softmax(x W^T + b)[label], float32 scalar; gradients flow to x alone.

    x [..., H], labels [...] int64, already shifted; W [V, H] in the pieces of `kind`; with `shard`, V and b are this
    rank's part of the vocabulary.
    """
    return _FrozenCrossEntropy.apply(x.flatten(0, -2), labels.flatten(), kind, bias_V, shard, *pieces)


class _FrozenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MH: Tensor,
        labels_M: Tensor,
        kind: Kind,
        bias_V: Tensor | None,
        shard: VocabShard | None,
        *pieces: Any,
    ) -> Tensor:
        weight = _Slices(kind, list(pieces), x_MH.shape[1], bias_V, x_MH.dtype)
        kept_M = labels_M != IGNORE
        if shard is not None:
            labels_M = labels_M - shard.offset
        grad_MH = torch.empty_like(x_MH) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), dtype=torch.float32, device=x_MH.device)
        rows = max(1, _TILE_NUMEL // min(_SLICE, weight.rows if shard is None else shard.size))  # on all ranks alike
        for begin in range(0, x_MH.shape[0], rows):
            part = slice(begin, begin + rows)
            total_M, target_M = _log_sum_exp(x_MH[part], labels_M[part], weight, shard)
            loss += (total_M - target_M).masked_fill_(~kept_M[part], 0.0).sum()
            if grad_MH is not None:
                grad_MH[part] = _gradient(x_MH[part], labels_M[part], total_M, kept_M[part], weight)
        ctx.save_for_backward(grad_MH)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_MH,) = ctx.saved_tensors
        grad_x = None if grad_MH is None else (grad_MH * grads[0]).to(grad_MH.dtype)
        return (grad_x, *(None for _ in ctx.needs_input_grad[1:]))


class _Slices:
    """The head's weight, some rows at a time: (first row, weight [R, H], bias [R] or None)."""

    def __init__(self, kind: Kind, pieces: Pieces, width: int, bias_V: Tensor | None, dtype: torch.dtype) -> None:
        self.kind, self.pieces, self.width, self.bias_V, self.dtype = kind, pieces, width, bias_V, dtype
        self.rows = pieces[0].shape[0]

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        for begin in range(0, self.rows, _SLICE):
            end = min(begin + _SLICE, self.rows)
            rows = dequantize(self.kind, slice_rows(self.kind, self.pieces, begin, end), self.width, self.dtype)
            yield begin, rows, None if self.bias_V is None else self.bias_V[begin:end]


def _logits(x_MH: Tensor, weight_RH: Tensor, bias_R: Tensor | None) -> Tensor:
    """[M, R] float32."""
    if x_MH.is_cuda and x_MH.dtype != torch.float32:
        logits = torch.mm(x_MH, weight_RH.t(), out_dtype=torch.float32)
    else:
        logits = (x_MH @ weight_RH.t()).float()
    return logits if bias_R is None else logits.add_(bias_R)


def _log_sum_exp(x_MH: Tensor, labels_M: Tensor, weight: _Slices, shard: VocabShard | None) -> tuple[Tensor, Tensor]:
    """(log of the sum of exponentials, logit of the label), float32 [M]; the second is 0 for labels outside."""
    highest_M = torch.full(labels_M.shape, float("-inf"), device=x_MH.device)
    total_M, target_M = torch.zeros_like(highest_M), torch.zeros_like(highest_M)
    for begin, rows, bias in weight:
        logits = _logits(x_MH, rows, bias)
        inside_M = (labels_M >= begin) & (labels_M < begin + rows.shape[0])
        index_M1 = (labels_M - begin).clamp(0, rows.shape[0] - 1)[:, None]
        target_M += logits.gather(1, index_M1).squeeze(1).masked_fill_(~inside_M, 0.0)
        now_M = torch.maximum(highest_M, logits.amax(1))
        total_M = total_M * (highest_M - now_M).exp() + logits.sub_(now_M[:, None]).exp_().sum(1)
        highest_M = now_M
    if shard is not None:
        own_M = highest_M.clone()
        shard.reduce_max(highest_M)
        total_M *= (own_M - highest_M).exp()
        shard.reduce_sum(total_M)
        shard.reduce_sum(target_M)
    return highest_M + total_M.log(), target_M


def _gradient(x_MH: Tensor, labels_M: Tensor, total_M: Tensor, kept_M: Tensor, weight: _Slices) -> Tensor:
    """d loss / d x: (softmax - one-hot) W, in x's dtype, summed over slices in float32."""
    grad_MH = torch.zeros(x_MH.shape, dtype=torch.float32, device=x_MH.device)
    for begin, rows, bias in weight:
        probability = _logits(x_MH, rows, bias).sub_(total_M[:, None]).exp_()
        inside_M = (labels_M >= begin) & (labels_M < begin + rows.shape[0])
        index_M1 = (labels_M - begin).clamp(0, rows.shape[0] - 1)[:, None]
        probability.scatter_add_(1, index_M1, -inside_M.float()[:, None])
        probability.mul_(kept_M[:, None])
        grad_MH += _logits(probability.to(x_MH.dtype), rows.t(), None)
    return grad_MH.to(x_MH.dtype)
