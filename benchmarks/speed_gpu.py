"""Training speed on the GPUs of one machine beside torchtitan's on the same GPUs, minutes apart: one table.

    python benchmarks/speed_gpu.py --rows bf16,fp8,tp [--sides ours,titan] [--gpus 4] [--folder /tmp/speed]
    python benchmarks/speed_gpu.py --rows bf16,tp,pp --small --gpus 2        the same program on CPU processes, tiny

Random weights, random tokens, rows of one document. Each line is a job of its own with a time limit, `torchrun`'s for
both sides: tokens a second and GPU over the measured steps, the ratio to the peer's best line of the row, MFU (causal
FLOPs over the card's dense bf16 peak, also for fp8), seconds of a step, peak allocated memory, and the seconds from
the start of Python to the end of the first step. Lines that the plan says the cards are too small for are passed over,
and spare ones take their place. Compiled programs are kept between the lines. `--layers` shrinks the
models. torchtitan 0.2.2 must be where Python finds it, with torchdata, tyro, docstring_parser, typeguard, and torchao
for fp8. The row of one GPU has transformers + Liger + bitsandbytes beside it instead.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PEAK = 989.5e12  # H100 and H200, dense bf16
COLUMNS = ("row", "who", "tok/s/GPU", "ratio", "MFU", "step s", "GiB", "first s")
WIDTHS = (9, 44, 10, 7, 7, 9, 7, 8)
HERE = Path(__file__).resolve().parent
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


def ours(row: Row, words: str, options: argparse.Namespace) -> dict[str, Any]:
    """What our worker reads: a whole recipe."""
    from trainwright.bench.made import made
    from trainwright.recipe.load import load_recipe

    seq_len = 128 if options.small else row.seq_len
    layers = options.layers or row.layers
    overrides = {"max_position_embeddings": max(seq_len, 8192)}
    values: dict[str, Any] = {
        "name": "run",
        "task": "pretrain",
        "output": str(options.folder / "runs"),
        "model": {
            "config": (SMALL_MOE if row.model == MOE else SMALL) if options.small else row.model,
            "tokenizer": "byte",
            "overrides": overrides | ({"num_hidden_layers": layers} if layers and not options.small else {}),
        },
        "data": {"path": "shipped:arithmetic", "seq_len": seq_len, "cache": str(options.folder / "cache")},
        "train": {
            "steps": sum(steps_of(row, options)) + options.profile, "schedule": "constant", "warmup": 0,
            "learning_rate": 1e-5, "compile": not options.small,
        },
        "tracking": {"tensorboard": False},
    }  # fmt: skip
    recipe = made(load_recipe(values, words.split()), rows=64)
    run = {"warm": steps_of(row, options)[0], "profile": options.profile}
    return {"recipe": recipe.model_dump(mode="json"), **run}


def titan(row: Row, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What `peers/titan.py` reads."""
    warm, measured = steps_of(row, options)
    layers = 4 if options.small else options.layers or row.layers
    model, flavor = row.peer
    settings = {
        "training.seq_len": 128 if options.small else row.seq_len,
        "compile.enable": not options.small,
        "training.local_batch_size": 1,
        **settings,
    }
    return {
        "model": model,
        "flavor": ("debugmodel_moe" if model == "qwen3" else "debugmodel") if options.small else flavor,
        "arguments": {"n_layers": layers} if layers else {},
        "settings": settings,
        "warm": warm,
        "steps": warm + measured,
    }


def transformers(row: Row, who: str, options: argparse.Namespace) -> dict[str, Any]:
    """What `peers/hf_full.py` reads."""
    warm, measured = steps_of(row, options)
    layers = {"num_hidden_layers": options.layers} if options.layers else {}
    keys = SMALL if options.small else {**LLAMA3_KEYS, **layers}
    length, clip = 128 if options.small else row.seq_len, "no clipping" not in who
    return {"keys": keys, "seq_len": length, "warm": warm, "steps": warm + measured, "clip": clip}


def steps_of(row: Row, options: argparse.Namespace) -> tuple[int, int]:
    return (2, 2) if options.small else row.steps


def work(run: dict[str, Any], out: Path) -> None:
    """One rank of one of our lines: the trainer's own steps, without checkpoint and export."""
    from itertools import islice

    from trainwright.device import peak_memory_gib
    from trainwright.recipe.load import load_recipe
    from trainwright.train.metrics import read_lines
    from trainwright.train.trainer import Trainer, quiet_garbage

    began = time.perf_counter()
    trainer = Trainer(load_recipe(run["recipe"]), force=True)
    trainer.clock = time.perf_counter()
    first = 0.0
    try:
        with quiet_garbage():  # as in a run; torchtitan's trainer controls it too
            while trainer.step < trainer.total_steps - run["profile"]:
                trainer._one_step(list(islice(trainer.loader, trainer.loader.accumulation)), False)
                first = first or time.perf_counter() - began
        peaks = trainer.world.gather(peak_memory_gib(trainer.world.device))
        kernels = profile(trainer) if run["profile"] else []
    finally:
        trainer.close()
    if not trainer.world.is_main:
        return
    recipe, config = trainer.recipe, trainer.sources.config
    lines = read_lines(trainer.folder.metrics)[run["warm"] :]
    seconds = sum(line["step_seconds"] for line in lines) / len(lines)
    rate = trainer.loader.rows_per_step * recipe.data.seq_len / seconds / trainer.world.size
    found = {
        "kernels": kernels,
        "tokens_per_second_per_gpu": rate,
        "step_seconds": seconds,
        "peak_memory_gib": max(allocated or 0 for allocated, _ in peaks),
        "reserved_memory_gib": max(reserved or 0 for _, reserved in peaks),
        "first_step_seconds": first,
        "losses": [line["loss"] for line in read_lines(trainer.folder.metrics)],
        "causal_flops_per_token": config.flops_per_token(recipe.data.seq_len, "causal"),
    }
    out.write_text(json.dumps(found))


def profile(trainer: Any) -> list[tuple[float, int, str]]:
    """One more step: (milliseconds on the device, calls, name) of each kernel of this rank, the longest first."""
    from collections import Counter
    from itertools import islice

    import torch
    from torch.profiler import ProfilerActivity

    from trainwright.device import synchronize

    batches = list(islice(trainer.loader, trainer.loader.accumulation))
    kind = ProfilerActivity.CUDA if torch.accelerator.is_available() else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as recorded:
        trainer._one_step(batches, False)
        synchronize(trainer.world.device)
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in recorded.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            seconds[event.name[:160]] += event.device_time_total / 1e3
            calls[event.name[:160]] += 1
    return [(spent, calls[name], name) for name, spent in seconds.most_common(80)]


def memory_gib(options: argparse.Namespace) -> float:
    """Of one card here."""
    from trainwright.planner.hardware import this_machine

    return 0.0 if options.small else this_machine().card.memory_gib


def fitting(row: Row, options: argparse.Namespace) -> dict[str, str]:
    """The row's lines of ours that are planned to fit this machine's cards, and the spare ones where some do not."""
    from trainwright.planner.hardware import this_machine
    from trainwright.planner.plan import plan
    from trainwright.recipe.load import load_recipe

    if options.small:
        return row.ours
    found = {}
    for who, words in (row.ours | row.spare).items():
        if who in row.spare and len(found) == len(row.ours):
            break
        made = plan(load_recipe(ours(row, words, options)["recipe"]), this_machine(row.gpus or options.gpus))
        if made.fits:
            found[who] = words
        else:
            print(f"passed over, {made.memory.allocated / 2**30:.0f} GiB by plan: {who}", file=sys.stderr, flush=True)
    return found


def lines(options: argparse.Namespace) -> Iterator[tuple[str, str, str, list[str], dict[str, Any], Row]]:
    """(row, side, name of the line, program, what it reads, the row)."""

    def asked(who: str) -> bool:
        return any(who == word[1:] if word[:1] == "=" else word in who for word in options.only.split(";"))

    for name in options.rows.split(","):
        row = ROWS[name]
        peers = row.titan | (row.titan_large if memory_gib(options) > 100 else row.titan_small)
        for who, settings in peers.items() if "titan" in options.sides else ():
            if asked(who):
                yield name, "titan", who, [str(HERE / "peers" / "titan.py")], titan(row, settings, options), row
        for who in row.hf if "titan" in options.sides else ():
            if asked(who):
                yield name, "peer", who, [str(HERE / "peers" / "hf_full.py")], transformers(row, who, options), row
        for who, words in fitting(row, options).items() if "ours" in options.sides else ():
            if asked(who):
                yield name, "ours", who, [__file__, "--worker"], ours(row, words, options), row


def measure(
    program: list[str], run: dict[str, Any], row: Row, options: argparse.Namespace, log: Path
) -> dict[str, Any]:
    """Runs one line's processes; {"error": ...} where they did not end well or in time."""
    given, out = options.folder / "run.json", options.folder / "out.json"
    given.write_text(json.dumps(run))
    out.unlink(missing_ok=True)
    subprocess.run(["rm", "-rf", str(options.folder / "runs")], check=True)
    ranks = row.gpus or options.gpus
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    cache = str(options.folder / "compiled")
    environment = {
        **os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton", "OMP_NUM_THREADS": "4",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }  # fmt: skip
    with log.open("w") as written:
        process = subprocess.Popen(
            [*start, *program, str(given), str(out)],
            stdout=written, stderr=subprocess.STDOUT, start_new_session=True, env=environment,
        )  # fmt: skip
        try:
            process.wait(row.limit)
        except subprocess.TimeoutExpired:
            return {"error": f"not done in {row.limit} s"}
        finally:  # also when this program is told to end: ranks that are left would keep the GPUs
            end(process)
    if out.exists():
        return dict(json.loads(out.read_text()))
    text = log.read_text().splitlines()
    said = [line for line in text if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    return {"error": next((line for line in said if "ChildFailed" not in line), (text or ["?"])[-1])[:150]}


def end(process: subprocess.Popen[bytes]) -> None:
    """All processes of a line that is not done. torchrun gives its ranks 30 s, and killed alone would leave them."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(35)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def text_of(values: tuple[Any, ...]) -> str:
    return " ".join(f"{value!s:<{w}}" if w > 8 else f"{value!s:>{w}}" for value, w in zip(values, WIDTHS, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="bf16,fp8,tp", help=", ".join(ROWS))
    parser.add_argument("--sides", default="titan,ours")
    parser.add_argument("--only", default="", help="the lines whose name has one of these (=: is it), with ; between")
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/trainwright-speed"))
    parser.add_argument("--out", type=Path, default=None, help="all figures and losses, as JSON")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--profile", action="store_true", help="one step more of ours: its kernels go to --out")
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker[0].read_text()), options.worker[1])
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options.folder.mkdir(parents=True, exist_ok=True)
    print(text_of(COLUMNS), flush=True)
    best: dict[str, float] = {}
    flops: dict[str, float] = {}
    every: list[dict[str, Any]] = []
    began = time.perf_counter()
    for number, (name, side, who, program, run, row) in enumerate(lines(options)):
        log = options.folder / f"{name}-{side}-{number}.log"
        found = measure(program, run, row, options, log)
        words = row.ours.get(who) or row.spare.get(who, "") if side == "ours" else ""
        line = {"row": name, "side": side, "who": who, "words": words, "gpus": row.gpus or options.gpus}
        every.append({**line, **found})
        if options.out:
            options.out.write_text(json.dumps(every, indent=1))
        if "error" in found:
            print(f"{name:<9} {side + ' ' + who:<44} {found['error']}  ({log})", flush=True)
            continue
        rate = found["tokens_per_second_per_gpu"]
        if side != "ours":
            best[name] = max(rate, best.get(name, 0.0))
        flops[name] = found.get("causal_flops_per_token", flops.get(name, 0.0))
        ratio = f"{rate / best[name]:.3f}" if name in best else ""
        used = f"{rate * flops[name] / PEAK:.1%}" if flops[name] else ""
        shown = (f"{rate:,.0f}", ratio, used, f"{found['step_seconds']:.3f}", f"{found['peak_memory_gib']:.1f}")
        print(text_of((name, f"{side} {who}", *shown, f"{found['first_step_seconds']:.0f}")), flush=True)
    print(f"{time.perf_counter() - began:.0f} s in all", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
