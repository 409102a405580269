"""transformers + PEFT + bitsandbytes + Liger: LoRA and QLoRA as their documentation sets them up.

Gradient checkpointing as asked, SDPA attention, Liger's kernels with its fused linear cross entropy, bf16 autocast over
float32 adapters, nf4 with double quantization or LLM.int8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_random_model(folder: str, keys: dict[str, Any]) -> None:
    """A folder with config.json, bf16 safetensors and a tokenizer, of random weights (normal, std 0.02)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainwright.data.tokenizer import load_tokenizer

    kind = keys["model_type"]
    config = AutoConfig.for_model(kind, **{key: value for key, value in keys.items() if key != "model_type"})
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    load_tokenizer("byte").save(folder)


def build(folder: str, row: dict[str, Any]) -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """(model, function that gives the mean loss of one micro batch of ids and has a graph)."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    apply_liger_kernel_to_llama()
    bits = {
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        "int8": {"load_in_8bit": True},
    }.get(row["quantize"])
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map={"": 0},
        attn_implementation="sdpa",
        quantization_config=BitsAndBytesConfig(**bits) if bits else None,
    )
    recompute = row.get("recompute", True)
    settings = {"use_reentrant": False}
    if bits:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=recompute, gradient_checkpointing_kwargs=settings
        )
    elif recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        model.enable_input_require_grads()
    config = LoraConfig(
        r=row["rank"], lora_alpha=2 * row["rank"], target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config).train()
    model.config.use_cache = False

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return model(input_ids=ids, labels=ids).loss

    return model, loss
