"""The floor of one training step on this GPU beside a profile of ours: where the time goes, largest loss first.

    python benchmarks/floor.py [--model llama-3-8b] [--seq-len 8192] [--layers 32] [--recompute none]

Forward and backward of the model alone, bf16 weights, random tokens; no optimizer, no data. The floor is FLOPs over the
matmul and attention rates measured here in the same minute, and bytes over the measured copy rate. Needs a GPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainwright.model.checkpoint import load_config
from trainwright.model.transformer import Transformer
from trainwright.parallel.recompute import apply_recompute

KINDS = (
    ("attention", ("flash", "fmha", "sdpa", "cudnn_generated", "attention", "fprop", "bprop")),
    ("matmul", ("gemm", "nvjet", "cutlass", "matmul", "sm90_xmma", "cublas", "splitk")),
    ("copy", ("memcpy", "memset", "copy")),
)


def seconds(action: Callable[[], Any], repeats: int = 10) -> float:
    """Median seconds of `action` by device events, after two warm-ups."""
    for _ in range(2):
        action()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        action()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def ceilings(tokens: int, config: Any) -> dict[str, float]:
    """Rates of this GPU at this model's shapes: matmul and attention in FLOP/s, copy in bytes/s."""
    block = config.layers[0]
    linear, attention = block.mlp.up_proj, block.self_attn
    a = torch.randn(tokens, linear.in_features, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(linear.in_features, linear.out_features, device="cuda", dtype=torch.bfloat16)
    matmul = 2 * a.shape[0] * a.shape[1] * b.shape[1] / seconds(lambda: a @ b)
    shape = (1, attention.num_heads, tokens, attention.head_dim)
    q = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn_like(q[:, : attention.num_kv_heads]).requires_grad_() for _ in range(2))
    flops = 2 * attention.num_heads * attention.head_dim * tokens * tokens  # causal half of 4 h s^2
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        forward = seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        grad = torch.randn_like(out)
        backward = seconds(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    x, y = torch.empty(2, 2**31, device="cuda", dtype=torch.uint8)
    copy = 2 * x.numel() / seconds(lambda: y.copy_(x))
    return {"matmul": matmul, "attention": flops / forward, "attention_backward": 2 * flops / backward, "copy": copy}


def profile(step: Callable[[], Any]) -> dict[str, float]:
    """Device seconds of one step by kind of kernel, with the ten longest kernels under their own names."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    by_kind: dict[str, float] = defaultdict(float)
    by_name: dict[str, float] = defaultdict(float)
    for event in recorded.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        name, spent = event.name.lower(), event.device_time_total / 1e6
        kind = next((kind for kind, words in KINDS if any(word in name for word in words)), "memory-bound")
        by_kind[kind] += spent
        by_name[event.name[:90]] += spent
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:10]
    return {**by_kind, **{f"  {name}": spent for name, spent in longest}}


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--recompute", default="none", choices=["none", "selective", "full"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    overrides = {"num_hidden_layers": asked.layers} if asked.layers else None
    config = load_config(asked.model, overrides=overrides)
    S = asked.seq_len
    rates = ceilings(S, config)
    gc.collect()
    torch.cuda.empty_cache()
    with torch.device("cuda"):
        model = Transformer(config).to(torch.bfloat16)
    model.init_weights(0)
    apply_recompute(model, asked.recompute)
    if not asked.no_compile:
        for layer in model.layers.values():
            layer.compile()
    ids = torch.randint(0, config.vocab_size, (1, S + 1), device="cuda")

    def step() -> None:
        model(ids[:, :-1], labels=ids[:, 1:]).loss_sum.backward()
        model.zero_grad(set_to_none=False)

    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    spent = seconds(step, 8)
    linear = config.flops_per_token(1, "causal") * S  # one key a query: as good as none
    attention = (config.flops_per_token(S, "causal") * S - linear) / 3
    floor = linear / rates["matmul"] + attention / rates["attention"] + 2 * attention / rates["attention_backward"]
    print({name: f"{rate / 1e12:.3g} T/s" for name, rate in rates.items()})
    print(
        f"{asked.model} x{config.num_layers} layers, {S} tokens, recompute {asked.recompute}, "
        f"compile {not asked.no_compile}: {S / spent:,.0f} tokens/s, {spent * 1e3:.1f} ms, floor {floor * 1e3:.1f} ms "
        f"({floor / spent:.1%}), peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, first step {first:.1f} s"
    )
    if asked.profile:
        for name, value in profile(step).items():
            print(f"{value * 1e3:9.2f} ms  {name}")


if __name__ == "__main__":
    main()
