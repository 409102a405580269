"""Every layout trains the same model: a 1B Llama for 100 steps on several GPUs and on one, losses side by side.

    python benchmarks/layouts_gpu.py [--gpus 4] [--steps 100] [--layouts zero3,tp2-dp2] [--folder /tmp/layouts]
    python benchmarks/layouts_gpu.py --small --gpus 4         the same program on CPU processes, in a minute

Random weights, made text, bf16 with float32 masters. Prints one table: the largest difference of a step's loss from the
one-GPU run and that of the mean, in percent, tokens a second and GPU, and the most memory of rank 0. Exits with 1 when
a step is 0.5% away or the mean 0.1% (CPU, float32: 0.01%). Finished runs in the folder are not run again, so it may be
called in pieces.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from trainwright.recipe.load import load_recipe
from trainwright.train.metrics import read_lines

LAYOUTS: dict[str, tuple[str, ...]] = {
    "zero0": ("zero=0",),
    "zero1": ("zero=1",),
    "zero2": ("zero=2",),
    "zero3": (),
    "zero3-full-recompute": ("recompute=full",),
    "zero3-selective-recompute": ("recompute=selective",),
    "hybrid-2x2": ("dp_replicate=2",),
    "tp2-dp2": ("tp=2",),
    "tp4": ("tp=4",),
    "cp4-ring": ("cp=4", "cp_method=ring"),
    "cp2-ulysses-dp2": ("cp=2", "cp_method=ulysses"),
    "pp2-dp2": ("pp=2",),
    "pp4": ("pp=4",),
    "pp2-interleaved-dp2": ("pp=2", "pp_schedule=interleaved"),
    "pp2-zbv-dp2": ("pp=2", "pp_schedule=zbv"),
    "tp2-pp2": ("tp=2", "pp=2"),
    "tp2-cp2": ("tp=2", "cp=2"),
    "zero3-offload-optimizer": ("offload=optimizer",),
    "zero3-offload-all": ("offload=all", "recompute=full"),
}
ASYNC = {"tp2-dp2-async": ("tp=2", "async_tp=true"), "tp4-async": ("tp=4", "async_tp=true")}  # with --compile
LLAMA_1B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
TINY: dict[str, Any] = {
    **LLAMA_1B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 320,
}  # fmt: skip


def made_text(path: Path, megabytes: float) -> None:
    """Documents of random words with Zipf's frequencies: a loss that falls, and not to nothing."""
    source = random.Random(0)
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 9))) for _ in range(5000)]
    weights = [1 / (rank + 2) for rank in range(len(words))]
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            text = " ".join(source.choices(words, weights, k=source.randint(50, 800)))
            file.write(json.dumps({"text": text}) + "\n")


def recipe_of(arguments: argparse.Namespace, name: str, words: tuple[str, ...]) -> Any:
    """The recipe of one run; global batch and rows are the same in all."""
    folder = Path(arguments.folder)
    values = {
        "name": name,
        "task": "pretrain",
        "output": str(folder / "runs"),
        "model": {"config": TINY if arguments.small else LLAMA_1B, "tokenizer": "byte"},
        "data": {
            "path": str(folder / "text.jsonl"),
            "seq_len": 64 if arguments.small else arguments.seq_len,
            "cache": str(folder / "cache"),
        },
        "train": {
            "steps": arguments.steps,
            "global_batch_size": 16,
            "micro_batch_size": 2,
            "learning_rate": 3e-4,
            "warmup": 0.1,
            "precision": "fp32" if arguments.small else "bf16",
            "compile": arguments.compile,
        },
        "tracking": {"tensorboard": False},
    }
    return load_recipe(values, [f"parallel.{word}" for word in words])


def work(recipe: Any) -> None:
    """One rank of one run: the trainer's own steps, without checkpoint and export."""
    from trainwright.train.trainer import Trainer

    trainer = Trainer(recipe)
    trainer.clock = time.perf_counter()
    try:
        while trainer.step < trainer.total_steps:
            trainer._one_step(list(islice(trainer.loader, trainer.loader.accumulation)), False)
    finally:
        trainer.close()


def lines_of(arguments: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    path = Path(arguments.folder) / "runs" / name / "metrics.jsonl"
    return read_lines(path) if path.exists() else []


def run(arguments: argparse.Namespace, name: str, words: tuple[str, ...], gpus: int) -> list[dict[str, Any]]:
    """The metrics of a run, which is started unless it is there already."""
    from trainwright.parallel.launch import run_processes

    folder = Path(arguments.folder) / "runs" / name
    if len(lines_of(arguments, name)) < arguments.steps:
        shutil.rmtree(folder, ignore_errors=True)
        options = [f"--{key}={getattr(arguments, key)}" for key in ("folder", "steps", "seq_len")]
        flags = [f"--{key}" for key in ("small", "compile") if getattr(arguments, key)]
        command = [sys.executable, __file__, *options, *flags, "--worker", name, *words]
        run_processes(gpus, command, folder / "ranks")
    return lines_of(arguments, name)


def row(name: str, found: list[dict[str, Any]], alone: list[dict[str, Any]], steps: int) -> tuple[str, float, float]:
    """(line of the table, largest difference of a step in percent, difference of the mean in percent)."""
    if len(found) < steps:
        return f"{name:<28} did not finish", float("inf"), float("inf")
    pairs = [(line["loss"], reference["loss"]) for line, reference in zip(found, alone, strict=True)]
    step = max(abs(a - b) / b for a, b in pairs) * 100
    mean = abs(statistics.mean(a for a, _ in pairs) / statistics.mean(b for _, b in pairs) - 1) * 100
    settled = found[len(found) // 5 :]
    speed = statistics.median(line["tokens_per_second_per_gpu"] for line in settled)
    memory = max(line["peak_memory_gib"] or 0 for line in found)
    text = f"{name:<28}{pairs[-1][0]:>9.4f}{step:>10.4f}{mean:>10.4f}{speed:>12,.0f}{memory:>10.2f}"
    return text, step, mean


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seq-len", dest="seq_len", type=int, default=2048)
    parser.add_argument("--seq_len", dest="seq_len", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--folder", default="/tmp/trainwright-layouts")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(recipe_of(arguments, arguments.worker[0], tuple(arguments.worker[1:])))
        return 0
    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "text.jsonl").exists():
        made_text(folder / "text.jsonl", 0.2 if arguments.small else 8.0)
    alone = run(arguments, "one", (), 1)
    if len(alone) < arguments.steps:
        return 1
    table = [f"{'layout':<28}{'loss':>9}{'step %':>10}{'mean %':>10}{'tok/s/GPU':>12}{'GiB':>10}"]
    table.append(row("one GPU", alone, alone, arguments.steps)[0])
    limits = (0.01, 0.01) if arguments.small else (0.5, 0.1)
    good = True
    for name in [*arguments.layouts.split(","), *(ASYNC if arguments.compile else ())]:
        text, step, mean = row(
            name, run(arguments, name, (LAYOUTS | ASYNC)[name], arguments.gpus), alone, arguments.steps
        )
        good = good and step <= limits[0] and mean <= limits[1]
        table.append(text)
    print("\n".join(table))
    print("all agree" if good else "SOME DO NOT AGREE", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
