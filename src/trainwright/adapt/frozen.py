"""Modules that hold a fixed weight, plain or in fewer bits: linear layer, experts, token table, head.

Owns how such a weight is stored in a module and filled, so that builds on the meta device, streaming loads, FSDP and
`model.to(dtype)` treat it right. Arithmetic is `ops.py`, `head.py` and `model/kernels/quantized.py`.

A weight in fewer bits is plain parameters and buffers without gradient: `weight` (codes) and `weight_absmax` (scales
with the weight's rows as dim 0) are parameters, so FSDP shards them; nf4's second level is two small buffers.
That level groups 256 scales whatever row they belong to, so where a weight is cut inside (tensor and expert
parallelism), its scales are the same numbers in float32 instead: `single_level`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.adapt import ops
from trainwright.adapt.head import frozen_cross_entropy
from trainwright.errors import UserError
from trainwright.model.config import EmbeddingConfig, HeadConfig, LinearConfig
from trainwright.model.init import copy_whole
from trainwright.model.kernels import quantized
from trainwright.model.kernels.cross_entropy import VocabShard
from trainwright.model.kernels.grouped import grouped_linear
from trainwright.model.kernels.quantized import Kind, Pieces


class FrozenWeight(nn.Module):
    """Holds one weight [..., out, in] that is not trained. `kind` None: as it is."""

    weight_nested_absmax: Tensor
    weight_nested_offset: Tensor
    compute: Tensor

    def __init__(self, shape: tuple[int, ...], kind: Kind | None) -> None:
        super().__init__()
        self.weight_shape = shape
        self.kind = kind
        if kind is None:
            self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
            return
        codes, absmax, *nested = quantized.empty_pieces(kind, shape)
        self.weight = nn.Parameter(quantized.stored(codes), requires_grad=False)
        self.weight_absmax = nn.Parameter(quantized.stored(absmax), requires_grad=False)
        if nested:
            self.register_buffer("weight_nested_absmax", nested[0])
            self.register_buffer("weight_nested_offset", nested[1])
        self.register_buffer("compute", torch.empty(0), persistent=False)

    def single_level(self) -> None:
        """Keeps nf4's scales in float32, with the values that two levels give them: every block stands alone, and any
        stretch of rows or of whole blocks is a weight again. 0.05 bytes a weight more. Call before weights are there.
        """
        if "weight_nested_absmax" not in self._buffers:
            return
        with torch.device(self.weight_absmax.device):
            self.weight_absmax = nn.Parameter(torch.empty(self.weight_absmax.shape), requires_grad=False)
        del self.weight_nested_absmax, self.weight_nested_offset

    @property
    def format(self) -> str:
        """What `ops` calls it: plain, nf4, int8, fp8."""
        return self.kind or "plain"

    @property
    def pieces(self) -> Pieces:
        """The weight as `ops` takes it: what `quantized.stored` makes of its pieces; one tensor where it is plain."""
        if self.kind is None:
            return [self.weight]
        if "weight_nested_absmax" not in self._buffers:
            return [self.weight, self.weight_absmax]
        return [self.weight, self.weight_absmax, self.weight_nested_absmax, self.weight_nested_offset]

    @torch.no_grad()
    def take_weight(self, whole: Tensor) -> None:
        """Fills the weight, or this rank's shard of it, from the whole tensor in full precision.

        `whole` may be on the CPU: it goes to the device a few rows at a time and leaves in its own format, so no second
        copy of it is ever there.
        """
        if self.kind is None:
            copy_whole(self.weight, whole)
            return
        places, pieces = self.pieces, quantized.quantize(self.kind, whole, device=self.weight.device)
        if len(places) < len(pieces):
            pieces = [pieces[0], quantized.decompress(pieces)]
        for place, piece in zip(places, pieces, strict=True):
            copy_whole(place, quantized.stored(piece))

    @torch.no_grad()
    def rounded(self, whole: Tensor) -> Tensor:
        """The whole weight as this module's format keeps it, float32; nothing is stored."""
        assert self.kind is not None
        return quantized.dequantize(self.kind, quantized.quantize(self.kind, whole), whole.shape[-1], torch.float32)

    def give_weight(self) -> Tensor:
        """The whole weight in full precision, for a save. Every rank of a sharded model calls it."""
        if self.kind is not None:
            raise UserError(
                f"these weights are kept in {self.kind}, and a model saved from them would be worse than its base: "
                "save the adapter, and merge it into the base with `trainwright convert merge`"
            )
        return gathered(self.weight)

    @torch.no_grad()
    def whole_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight as the forward pass sees it, [..., out, in]; gathered where it is sharded. Inside a forward under
        tensor parallelism: this rank's part."""
        pieces = [gathered(piece) for piece in self.pieces]
        if self.kind is None:
            return pieces[0].to(dtype)
        pieces = quantized.as_bytes(pieces)
        held = pieces[0].shape[-1] * (2 if self.kind == "nf4" else 1)
        return quantized.dequantize(self.kind, pieces, min(held, self.weight_shape[-1]), dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`to(dtype)` leaves codes as they are, scales and adapters float32: absmax in bf16 would be another weight."""
        keep = {id(tensor) for tensor in self.fixed_types()}

        def guarded(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if id(tensor) in keep and new.dtype != tensor.dtype else new

        return super()._apply(guarded, recurse)

    def fixed_types(self) -> list[Tensor]:
        """What `to(dtype)` does not change the type of."""
        return [] if self.kind is None else self.pieces

    def extra_repr(self) -> str:
        return f"{self.weight_shape}, {self.format}"


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; a collective where it is."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    if tensor.dtype == torch.float8_e4m3fn:  # bytes, which every backend sends
        own = tensor.to_local().view(torch.uint8)
        mesh, sizes = tensor.device_mesh, tensor.shape
        tensor = DTensor.from_local(own, mesh, tensor.placements, run_check=False, shape=sizes, stride=tensor.stride())
        return quantized.stored(tensor.full_tensor())
    whole: Tensor = tensor.full_tensor()
    return whole


class FrozenLinear(FrozenWeight):
    """y = x W^T + b, neither trained. [..., in] -> [..., out]."""

    def __init__(self, linear: LinearConfig) -> None:
        kind = linear.quantization.kind if linear.quantization is not None else None
        super().__init__((linear.out_features, linear.in_features), kind)
        self.bias = nn.Parameter(torch.zeros(linear.out_features), requires_grad=False) if linear.bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(ops.compute_dtype(x))
        return ops.frozen_linear(x, self.format, self.pieces, x.shape[-1], self.bias)


class FrozenExperts(FrozenWeight):
    """The linears of all experts, weight [E, out, in]. Rows sorted by expert and their counts -> rows."""

    def __init__(self, linear: LinearConfig, num_experts: int) -> None:
        kind = linear.quantization.kind if linear.quantization is not None else None
        super().__init__((num_experts, linear.out_features, linear.in_features), kind)

    def forward(self, x_MI: Tensor, counts_E: Tensor) -> Tensor:
        x_MI = x_MI.to(ops.compute_dtype(x_MI))
        if self.kind is None:
            return grouped_linear(x_MI, self.weight.to(x_MI.dtype), counts_E)
        return ops.frozen_grouped_linear(x_MI, self.kind, self.pieces, x_MI.shape[-1], counts_E)


class FrozenEmbedding(FrozenWeight):
    """A token table in fewer bits: only the rows that are looked up are turned back. [...] int -> [..., H]."""

    def __init__(self, table: EmbeddingConfig, kind: Kind) -> None:
        super().__init__((table.num_embeddings, table.embedding_dim), kind)

    def forward(self, ids: Tensor) -> Tensor:
        assert self.kind is not None
        dtype = ops.compute_dtype(self.compute)
        return quantized.select_rows(self.kind, quantized.as_bytes(self.pieces), ids, self.weight_shape[-1], dtype)


class FrozenHead(FrozenWeight):
    """The head in fewer bits: logits, or the loss of labels with neither logits nor weight ever whole."""

    def __init__(self, head: HeadConfig, kind: Kind) -> None:
        super().__init__((head.out_features, head.in_features), kind)
        self.bias = nn.Parameter(torch.zeros(head.out_features), requires_grad=False) if head.bias else None
        self.shard: VocabShard | None = None  # set from outside where the rows of W are a slice of the vocabulary

    def forward(self, x_BSH: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        x_BSH = x_BSH.to(ops.compute_dtype(x_BSH))
        assert self.kind is not None
        if labels_BS is None:
            return ops.frozen_linear(x_BSH, self.format, self.pieces, self.weight_shape[-1], self.bias)
        pieces = quantized.as_bytes(self.pieces)
        return frozen_cross_entropy(x_BSH, self.kind, pieces, labels_BS, self.bias, self.shard)
