"""Which lines `speed_gpu.py` runs: words of our recipes and settings of torchtitan, by row of the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LLAMA3, LLAMA2, MOE = "meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-2-7b", "Qwen/Qwen3-30B-A3B"
SMALL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 320, "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA3_KEYS: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
SMALL_MOE = {
    **SMALL, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}  # fmt: skip
TITAN_MEMORY = {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"}
TITAN_NONE = {"activation_checkpoint.mode": "none"}
TITAN_FP8 = {
    "model.converters": ["quantize.linear.float8"],
    "quantize.linear.float8.enable_fsdp_float8_all_gather": True,
    "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": True,
    "quantize.linear.float8.filter_fqns": ["output"],
}
ASYNC_TP2 = "parallel.tp=2 parallel.async_tp=true"
TWICE = "parallel.pp=2 parallel.pp_schedule=interleaved"
SMALL_LOSS = "train.loss_chunk=1024"  # where the loss is the fullest moment
LEAN = "train.optimizer=adamw8bit train.master_weights=false"
IN_BACKWARD = "train.optimizer_in_backward=true train.max_grad_norm=0"
ASYNC = {"parallelism.enable_async_tensor_parallel": True}
TP2 = {"parallelism.tensor_parallel_degree": 2, "training.local_batch_size": 2}
PP2 = {
    "parallelism.pipeline_parallel_degree": 2, "training.local_batch_size": 8, **TITAN_NONE,
    "parallelism.pipeline_parallel_microbatch_size": 1,
}  # fmt: skip
INTERLEAVED = {"parallelism.pipeline_parallel_schedule": "Interleaved1F1B"}
FOUR_STAGES = {
    "parallelism.pipeline_parallel_layers_per_stage": 4, "parallelism.pipeline_parallel_first_stage_less_layers": 0,
    "parallelism.pipeline_parallel_last_stage_less_layers": 0,
}  # fmt: skip
CP4 = {"parallelism.context_parallel_degree": 4, "activation_checkpoint.mode": "full"}
EP = {"training.local_batch_size": 2, **TITAN_NONE}
EP2, EP4 = ({"parallelism.expert_parallel_degree": ranks, **EP} for ranks in (2, 4))


@dataclass(frozen=True)
class Row:
    """What one row of the table runs: words of a recipe by the name of the line, torchtitan's settings likewise.

    spare: lines of ours where the card is too small, by plan, for some of those. titan_large,
    titan_small: more of its lines on cards over and under 100 GiB.
    steps: (not measured, measured). limit: seconds of one line at most.
    """

    ours: dict[str, str]
    titan: dict[str, dict[str, Any]] = field(default_factory=dict)
    spare: dict[str, str] = field(default_factory=dict)
    titan_large: dict[str, dict[str, Any]] = field(default_factory=dict)
    titan_small: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: str = LLAMA3
    seq_len: int = 8192
    steps: tuple[int, int] = (4, 6)
    limit: int = 240
    gpus: int | None = None  # else as asked
    layers: int | None = None
    peer: tuple[str, str] = ("llama3", "8B")
    hf: tuple[str, ...] = ()


QWEN: dict[str, Any] = {"model": MOE, "seq_len": 4096, "layers": 8, "peer": ("qwen3", "30B-A3B")}


def micro(size: int, rows: int | None = None) -> str:
    """Words: rows in a micro batch, and micro batches in a step (1)."""
    return f"train.micro_batch_size={size} train.gradient_accumulation_steps={rows or 1}"


def budget(gib: int) -> str:
    """Words: of what layers would keep, so much."""
    return f"parallel.recompute=selective parallel.recompute_memory={gib}"


def away(share: float) -> str:
    """Words: of the layers, so many keep theirs in host memory."""
    return f"parallel.offload=activations parallel.offload_share={share}"


# Seconds in the comments: the whole row on four H200, both sides, compiled for the first time.
ROWS: dict[str, Row] = {
    # 290
    "bf16": Row(
        {
            "ZeRO-3, 2 rows": micro(2),
            "ZeRO-3, 2 rows, NCCL": f"parallel.fsdp_transport=nccl {micro(2)}",
            "ZeRO-3, 3 rows": f"{SMALL_LOSS} {micro(3)}",
            "ZeRO-3, 1 row": micro(1),
        },
        {"FSDP, 1 row, no recompute": {"training.local_batch_size": 1, **TITAN_NONE}},
        {"ZeRO-3, 2 rows, selective": f"{budget(35)} {micro(2)}"},
        {"FSDP, 2 rows, no recompute": {"training.local_batch_size": 2, **TITAN_NONE}},
        {"FSDP, 2 rows, selective": {"training.local_batch_size": 2, **TITAN_MEMORY}},
    ),
    # 340
    "fp8": Row(
        {
            "ZeRO-3, tensorwise, 2 rows": f"train.float8=tensorwise {micro(2)}",
            "ZeRO-3, tensorwise, 4 rows": f"train.float8=tensorwise {micro(4)}",
            "ZeRO-3, rowwise, 2 rows": f"train.float8=rowwise {micro(2)}",
        },
        {"FSDP, tensorwise, fp8 gather, 2 rows": {"training.local_batch_size": 2, **TITAN_MEMORY, **TITAN_FP8}},
        {
            "ZeRO-3, tensorwise, 1 row": f"train.float8=tensorwise {micro(1)}",
            "ZeRO-3, tensorwise, 2 rows, selective": f"train.float8=tensorwise {budget(40)} {micro(2)}",
        },
        {"the same, no recompute": {"training.local_batch_size": 2, **TITAN_NONE, **TITAN_FP8}},
        {"the same, 1 row, no recompute": {"training.local_batch_size": 1, **TITAN_NONE, **TITAN_FP8}},
    ),
    # 320
    "tp": Row(
        {
            "TP2 x ZeRO-3, 2 rows": f"parallel.tp=2 {micro(2)}",
            "TP2 x ZeRO-3, 2 rows, async": f"{ASYNC_TP2} {micro(2)}",
            "TP2 x ZeRO-3, 4 rows, async": f"{ASYNC_TP2} {micro(4)}",
            "TP2 x ZeRO-3, 6 rows, async": f"{ASYNC_TP2} {micro(6)}",
        },
        {
            "TP2 x FSDP, 2 rows": {**TP2, **TITAN_NONE},
            "TP2 x FSDP, 2 rows, async": {**TP2, **TITAN_NONE, **ASYNC},
        },
        titan_large={
            "TP2 x FSDP, 4 rows, async": {**TP2, **TITAN_NONE, **ASYNC, "training.local_batch_size": 4},
        },
        titan_small={
            "TP2 x FSDP, 2 rows, selective, async": {**TP2, **TITAN_MEMORY, **ASYNC},
            "TP2 x FSDP, 1 row, async": {**TP2, **TITAN_NONE, **ASYNC, "training.local_batch_size": 1},
        },
    ),
    # 420
    "pp": Row(
        {
            "PP2 x ZeRO-3 1F1B, 8 micro batches": f"parallel.pp=2 {micro(1, 8)}",
            "PP2 x ZeRO-3 interleaved, 8 micro batches": f"{TWICE} {micro(1, 8)}",
            "PP2 x ZeRO-3 interleaved, 4 stages a rank, 8 micro batches": f"{TWICE} parallel.pp_stages=4 {micro(1, 8)}",
            "PP2 x ZeRO-3 zbv, 8 micro batches": f"parallel.pp=2 parallel.pp_schedule=zbv {micro(1, 8)}",
        },
        spare={
            "PP2 x ZeRO-3 interleaved, 8 micro batches, selective": f"{TWICE} {budget(22)} {micro(1, 8)}",
            "PP2 x ZeRO-3 1F1B, 8 micro batches, selective": f"parallel.pp=2 {budget(20)} {micro(1, 8)}",
        },
        titan_large={
            "PP2 x FSDP 1F1B, 8 micro batches": PP2,
            "PP2 x FSDP interleaved, 8 micro batches": {**PP2, **INTERLEAVED},
            "PP2 x FSDP interleaved, 4 stages a rank, 8 micro batches": {**PP2, **INTERLEAVED, **FOUR_STAGES},
        },
        titan_small={
            "PP2 x FSDP 1F1B, 8 micro batches, selective": {**PP2, **TITAN_MEMORY},
            "PP2 x FSDP interleaved, 8 micro batches, selective": {**PP2, **TITAN_MEMORY, **INTERLEAVED},
        },
        steps=(3, 4),
    ),
    # 270
    "128k": Row(
        {"CP4 Ulysses, selective": f"parallel.cp=4 {budget(70)} {micro(1)}"},
        {"CP4, full recompute": CP4},
        {"CP4 Ulysses, selective, 30 GiB": f"parallel.cp=4 {budget(30)} {micro(1)}"},
        seq_len=131072,
        steps=(1, 2),
        limit=300,
    ),
    # one step, with the compilation in it: 126 of it by plan, 173 for the second line
    "512k": Row(
        {
            "CP4, tiles, half of the layers to the host": "parallel.cp=4 parallel.recompute=selective "
            f"{away(0.5)} parallel.mlp_tokens=16384 {micro(1)}",
            "CP4, tiles, offload": "parallel.cp=4 parallel.recompute=full parallel.offload=activations "
            f"parallel.mlp_tokens=16384 {micro(1)}",
        },
        seq_len=524288,
        steps=(0, 1),
        limit=560,
    ),
    # does not end within a call of ten minutes with all layers: --layers 8 shows speed and what a layer keeps
    "1M": Row(
        {"CP4, tiles, offload": "parallel.cp=4 parallel.recompute=full parallel.offload=all "
         f"parallel.mlp_tokens=16384 {micro(1)}"},
        seq_len=1048576,
        steps=(1, 1),
        limit=560,
        layers=8,
    ),
    # 150
    "1gpu": Row(
        {
            "8 bit AdamW, selective": f"{LEAN} {budget(12)} {SMALL_LOSS} {micro(1)}",
            "8 bit AdamW, selective, half to the host":
            f"{LEAN} {budget(16)} {away(0.5)} train.loss_chunk=2048 {micro(1)}",
            "8 bit AdamW, selective, 18 GiB, 0.47 to the host":
            f"{LEAN} {budget(18)} {away(0.47)} {SMALL_LOSS} {micro(1)}",
            "8 bit AdamW in backward, no clipping, selective, half to the host":
            f"{LEAN} {IN_BACKWARD} {budget(22)} {away(0.55)} {SMALL_LOSS} {micro(1)}",
            "8 bit AdamW in backward, no clipping, full recompute":
            f"{LEAN} {IN_BACKWARD} parallel.recompute=full {micro(1)}",
        },
        gpus=1,
        hf=(
            "transformers + Liger, 8 bit AdamW, full recompute",
            "transformers + Liger, 8 bit AdamW, no clipping, full recompute",
        ),
    ),
    # 120 without the last
    "llama2": Row(
        {
            "TP2 x ZeRO-2, 8 rows, 2 micro batches, async": f"parallel.zero=2 {ASYNC_TP2} {micro(8, 2)}",
            "TP2 x ZeRO-2, 4 rows, 4 micro batches, async": f"parallel.zero=2 {ASYNC_TP2} {micro(4, 4)}",
            "TP2 x ZeRO-2, 4 rows, 4 micro batches": f"parallel.tp=2 parallel.zero=2 {micro(4, 4)}",
        },
        model=LLAMA2,
        seq_len=4096,
        steps=(2, 3),
    ),
    # 150
    "moe": Row(
        {"EP4 x ZeRO-3, 2 rows": f"parallel.ep=4 {micro(2)}"},
        {"EP4 x FSDP, 2 rows": EP4},
        **QWEN,
    ),
    # the same two where there are no four GPUs
    "tp2": Row(
        {
            "TP2, 2 rows, async": f"{ASYNC_TP2} {micro(2)}",
            "TP2, 2 rows": f"parallel.tp=2 {micro(2)}",
        },
        {"TP2, 2 rows": {**TP2, **TITAN_NONE}, "TP2, 2 rows, async": {**TP2, **TITAN_NONE, **ASYNC}},
        gpus=2,
        layers=12,
    ),
    "moe2": Row(
        {"EP2 x ZeRO-3, 2 rows": f"parallel.ep=2 {micro(2)}"},
        {"EP2 x FSDP, 2 rows": EP2},
        gpus=2,
        **QWEN,
    ),
}  # fmt: skip
