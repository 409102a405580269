"""Long rows and pipelines on the GPUs of one machine: ways to share one row, and orders of micro batches, side by side.

    python benchmarks/long_rows.py [--gpus 4] [--model meta-llama/Meta-Llama-3-8B] [--seq-len 131072] [--layers 0]
    python benchmarks/long_rows.py --pipelines [--gpus 4] [--seq-len 4096]

Each line is one `trainwright train` of a few steps with random weights on rows of one document each, and the mean of
the last steps: tokens a second and GPU, MFU by the PaLM count, peak memory, and the loss, which has to agree down the
table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS, WARM = 6, 3
COLUMNS = ("layout", "tokens/s/GPU", "MFU", "peak GiB", "loss")


def rows(gpus: int) -> list[tuple[str, list[str]]]:
    """Ways to share one row."""
    full = ["parallel.recompute=full"]
    return [
        (f"CP{gpus} auto, full recompute", [f"parallel.cp={gpus}", *full]),
        (f"CP{gpus} Ulysses, full recompute", [f"parallel.cp={gpus}", "parallel.cp_method=ulysses", *full]),
        (f"CP{gpus} ring, full recompute", [f"parallel.cp={gpus}", "parallel.cp_method=ring", *full]),
        (f"CP{gpus}, selective, 20 GiB", [
            f"parallel.cp={gpus}", "parallel.recompute=selective", "parallel.recompute_memory=20",
        ]),
        (f"CP{gpus}, full, activations in host memory", [f"parallel.cp={gpus}", *full, "parallel.offload=activations"]),
        (f"TP{gpus}, full recompute", [f"parallel.tp={gpus}", *full]),
    ]  # fmt: skip


def pipelines(gpus: int) -> list[tuple[str, list[str]]]:
    """Orders of micro batches, beside ZeRO-3 on the same GPUs."""
    batch = ["train.micro_batch_size=1", f"train.global_batch_size={4 * gpus}"]
    return [
        ("ZeRO-3", batch),
        *((f"PP{gpus} {name}", [f"parallel.pp={gpus}", f"parallel.pp_schedule={name}", *batch]) for name in
          ("1f1b", "interleaved", "zbv")),
        (f"PP{gpus} 1f1b, layers by FLOPs", [f"parallel.pp={gpus}", "parallel.pp_layers=estimated", *batch]),
    ]  # fmt: skip


def write_documents(path: Path, length: int) -> None:
    """Enough documents of random letters, each longer than a row."""
    letters = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(32):
            file.write(json.dumps({"text": "".join(letters.choices("abcdefghij ", k=length + 8))}) + "\n")


def measure(name: str, words: list[str], shared: list[str], gpus: int, folder: Path) -> dict[str, Any]:
    """One run; a run that fails says why in its line."""
    run = f"run{len(list(folder.glob('run*')))}"
    command = [
        sys.executable,
        "-m",
        "trainwright",
        "train",
        str(folder / "recipe.yaml"),
        f"name={run}",
        *shared,
        *words,
    ]
    done = subprocess.run([*command, "--gpus", str(gpus)], capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["?"])[-1]
        return {"layout": f"{name}: {last[:100]}"}
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line.get("step", 0) > WARM and "tokens_per_second_per_gpu" in line]

    def mean(key: str) -> float:
        return sum(line[key] or 0 for line in kept) / len(kept)

    return {
        "layout": name,
        "tokens/s/GPU": f"{mean('tokens_per_second_per_gpu'):,.0f}",
        "MFU": f"{mean('mfu'):.1%}",
        "peak GiB": f"{max(line['peak_memory_gib'] or 0 for line in kept):.1f}",
        "loss": f"{kept[-1]['loss']:.5f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--model", default="meta-llama/Meta-Llama-3-8B")
    parser.add_argument("--seq-len", type=int, default=0)
    parser.add_argument("--layers", type=int, default=0, help="0: all")
    parser.add_argument("--pipelines", action="store_true")
    options = parser.parse_args()
    length = options.seq_len or (4096 if options.pipelines else 131072)
    with tempfile.TemporaryDirectory(prefix="long-rows-") as temporary:
        folder = Path(temporary)
        write_documents(folder / "text.jsonl", length)
        (folder / "recipe.yaml").write_text(
            f"task: pretrain\nmodel: {{config: {options.model}, tokenizer: byte}}\n"
            f"data: {{path: {folder}/text.jsonl, seq_len: {length}, packing: false, cache: {folder}/cache, "
            "max_truncated: 1.0}\n"
            f"train: {{steps: {STEPS}, schedule: constant, warmup: 0, learning_rate: 1e-5, micro_batch_size: 1}}\n"
            f"output: {folder}\n"
        )
        shared = [f"model.overrides.max_position_embeddings={length}"]
        shared += [f"model.overrides.num_hidden_layers={options.layers}"] if options.layers else []
        print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
        for name, words in (pipelines if options.pipelines else rows)(options.gpus):
            found = measure(name, words, shared, options.gpus, folder)
            print(f"| {' | '.join(found.get(column, '') for column in COLUMNS)} |", flush=True)


if __name__ == "__main__":
    main()
