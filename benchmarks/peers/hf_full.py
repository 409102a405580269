"""transformers + Liger + bitsandbytes' 8-bit AdamW: all weights of a model trained on one GPU, full recompute.

    python benchmarks/peers/hf_full.py RUN.json OUT.json

RUN.json: {"keys": {config.json's}, "seq_len": 8192, "warm": 4, "steps": 12, "clip": true}.
bf16 weights, SDPA attention, Liger's kernels with its fused linear cross entropy, as their documentation sets them up.
Random weights and tokens. Without a GPU it runs without Liger and with torch's AdamW, for rehearsals.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


def build(keys: dict[str, Any], device: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    if device == "cuda":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    config = AutoConfig.for_model(keys["model_type"], **{k: v for k, v in keys.items() if k != "model_type"})
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def main() -> None:
    run, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    model = build(run["keys"], device)
    if device == "cuda":
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    optimizer = AdamW(model.parameters(), lr=1e-5)
    source = torch.Generator().manual_seed(0)
    marks = {}
    for step in range(1, run["steps"] + 1):
        ids = torch.randint(0, run["keys"]["vocab_size"], (1, run["seq_len"]), generator=source).to(device)
        model(input_ids=ids, labels=ids).loss.backward()
        if run["clip"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in (1, run["warm"], run["steps"]):
            wait()
            marks[step] = time.perf_counter()
    seconds = (marks[run["steps"]] - marks[run["warm"]]) / (run["steps"] - run["warm"])
    peaks = [torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30]
    found = {
        "tokens_per_second_per_gpu": run["seq_len"] / seconds,
        "step_seconds": seconds,
        "peak_memory_gib": peaks[0],
        "reserved_memory_gib": peaks[1],
        "first_step_seconds": marks[1] - began,
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
