"""An MLP that works through a row piece by piece, so that its wide inner tensors never exist for a whole row.

Each piece keeps its input and computes the rest again in its backward pass: what one piece needs is all that exists at
a time. For rows so long that an MLP is most of a layer's memory even with full recompute (Bekman et al. 2025, ALST,
section 3.1.1). Costs one more forward pass of the MLP inside a layer that recomputes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.model.ffn import Mlp
from trainwright.parallel.recompute import checkpointed

TOKENS = -2  # the dim of [..., S, H] that is cut


def apply_tiles(layers: Iterable[nn.Module], tokens: int, compile_: Callable[..., Any] | None = None) -> None:
    """Cuts the rows of every dense MLP into pieces of `tokens`, in place. With `compile_` a layer's parts are compiled
    apart, attention and one piece of the MLP, instead of the layer."""
    for layer in layers:
        mlp = layer.mlp
        if not isinstance(mlp, Mlp):
            continue
        piece = mlp.forward if compile_ is None else compile_(mlp.forward)
        mlp.forward = _tiled(checkpointed(piece), tokens)  # type: ignore[method-assign,assignment]
        if compile_ is not None:
            layer.self_attn.forward = compile_(layer.self_attn.forward)  # type: ignore[union-attr]


def _tiled(piece: Callable[[Tensor], Tensor], tokens: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if x.shape[TOKENS] <= tokens:
            return piece(x)
        return torch.cat([piece(part) for part in x.split(tokens, TOKENS)], TOKENS)

    return forward
