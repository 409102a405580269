"""Unsloth: LoRA and QLoRA with its kernels and its offloaded gradient checkpointing, as its notebooks set them up."""

# Unsloth must be imported before transformers, which it patches.
from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers.hf import TARGETS


def build(folder: str, row: dict[str, Any]) -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """(model, function that gives the mean loss of one micro batch of ids and has a graph)."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("UNSLOTH_SKIP_TORCHVISION_CHECK", "1")
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=folder,
        max_seq_length=row["seq_len"],
        dtype=torch.bfloat16,
        load_in_4bit=row["quantize"] == "nf4",
        local_files_only=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=row["rank"],
        lora_alpha=2 * row["rank"],
        target_modules=TARGETS,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth" if row.get("recompute", True) else False,
        random_state=0,
    )
    model.train()

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return model(input_ids=ids, labels=ids).loss

    return model, loss
