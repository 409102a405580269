"""Activations computed again in the backward pass instead of kept: per layer, all of it or what is cheap.

Owns the choice of what is kept. Where it stands in the order of application is `apply.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# Results that cost more to compute than to keep: matrix products and attention.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_attention_math.default,
}


def apply_recompute(model: nn.Module, mode: Literal["none", "selective", "full"]) -> None:
    """Sets every layer of `model.layers` to keep nothing (full), or matrix products and attention (selective).

    The layer's own `forward` is replaced on the instance, so names, weights and hooks stay as they are.
    """
    if mode == "none":
        return
    extra: dict[str, Any] = {}
    if mode == "selective":
        extra["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for layer in model.layers.values():  # type: ignore[operator]
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=True, **extra)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
