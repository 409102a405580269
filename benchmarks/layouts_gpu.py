"""Every layout trains the same model: a 1B Llama for 100 steps on 4 GPUs, on 2 and on one, losses side by side; and
Llama-3-8B started in the layouts of the published tables that 4 GPUs allow.

    python benchmarks/layouts_gpu.py --out benchmarks/results/layouts_h200_4.json [--layouts zero3,tp2-dp2]
    python benchmarks/layouts_gpu.py --small                  the same program on CPU processes

Random weights, made tokens, bf16 with float32 masters, not compiled, 8 rows a step; every layout takes them in as few
passes as it can, since a pass of this model costs the host as long as the GPU. Prints each layout when it is done: the
largest difference of a step's loss from the one-GPU run and that of the mean, in percent, tokens a second and GPU, and
peak memory. Exits with 1 when a step is 0.5% away or the mean 0.1% (CPU, float32: 0.01%), or a start fails.

The layouts of one number of GPUs share their processes: about 15 s each. One GPU runs beside two. On four H200 all of
it is planned to take 7 minutes. What is there already in the folder is not run again, so it may be called in pieces.
`docs/layouts.py` makes the page's table from what --out keeps.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch

FOUR: dict[str, str] = {
    "zero3": "", "zero2": "zero=2", "zero1": "zero=1", "zero0": "zero=0", "hybrid-2x2": "dp_replicate=2",
    "tp2-dp2": "tp=2", "tp4": "tp=4", "cp2-dp2": "cp=2", "cp4-ulysses": "cp=4", "cp4-ring": "cp=4 cp_method=ring",
    "pp2-dp2": "pp=2", "pp4": "pp=4", "pp2-interleaved-dp2": "pp=2 pp_schedule=interleaved",
    "pp2-zbv-dp2": "pp=2 pp_schedule=zbv", "tp2-pp2": "tp=2 pp=2", "tp2-cp2": "tp=2 cp=2",
    "zero3-full-recompute": "recompute=full",
}  # fmt: skip
TWO = {
    "zero3-2": "", "tp2": "tp=2", "cp2": "cp=2", "pp2": "pp=2", "zero1-2": "zero=1", "zero0-2": "zero=0",
    "cp2-ring": "cp=2 cp_method=ring", "pp2-zbv": "pp=2 pp_schedule=zbv",
}  # fmt: skip
# Slow, and so only when asked for: the update runs in host memory.
MORE = {"zero3-offload-optimizer": "offload=optimizer", "zero3-offload-all": "offload=all recompute=full"}
# Llama-3-8B: (words, tokens of a row), named as in the published tables.
STARTS: dict[str, tuple[str, int]] = {
    "ZeRO-3 (seed 000)": ("", 8192),
    "SP2, ZeRO-3 (seed 000)": ("cp=2", 8192),
    "SP4, ZeRO-3 (seed 000)": ("cp=4", 8192),
    "tp2 sd2 stage2 (seed 001)": ("tp=2 zero=2", 4096),
    "TP4PP1 (seed 004)": ("tp=4", 4096),
    "TP2PP1DP2 (seed 004)": ("tp=2 zero=1", 4096),
    "TP2PP2 (seed 004)": ("tp=2 pp=2", 4096),
}
LLAMA_1B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
TINY: dict[str, Any] = {
    **LLAMA_1B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 320,
}  # fmt: skip
ROWS = 8
PIPELINE_PASSES = 4  # micro batches of a step where there are stages


def recipe_of(arguments: argparse.Namespace, name: str, gpus: int) -> Any:
    """The recipe of one run; the rows of a step are the same in all of one table."""
    from trainwright.bench.made import made
    from trainwright.recipe.load import load_recipe

    starts = name in STARTS
    words, seq_len = STARTS.get(name) or ((FOUR | TWO | MORE).get(name, ""), arguments.seq_len)
    seq_len = 64 if arguments.small else seq_len
    degrees = dict(word.split("=") for word in words.split())
    ranks = gpus
    for axis in ("tp", "cp", "pp"):
        ranks //= int(degrees.get(axis, 1))
    passes = PIPELINE_PASSES if "pp" in degrees else 1
    rows = ranks * passes if starts else ROWS
    steps = 3 if starts else arguments.steps
    values = {
        "name": "".join(letter if letter.isalnum() else "-" for letter in name).strip("-"),
        "task": "pretrain",
        "output": str(arguments.folder / "runs"),
        "model": {
            "config": TINY if arguments.small else "meta-llama/Meta-Llama-3-8B" if starts else LLAMA_1B,
            "tokenizer": "byte",
        },
        "data": {"path": "shipped:arithmetic", "seq_len": seq_len, "cache": str(arguments.folder / "cache")},
        "train": {
            "steps": steps,
            "global_batch_size": rows,
            "micro_batch_size": max(1, rows // ranks // passes),
            # Small: at 1e-4 this model's loss has a spike (step 20), and two runs that differ by a rounding come out of
            # it percents apart (docs/decisions.md, 2026-11-27).
            "learning_rate": arguments.learning_rate,
            "warmup": 0.2,
            "precision": "fp32" if arguments.small else "bf16",
            "compile": False,
        },
        "tracking": {"tensorboard": False},
    }
    return made(load_recipe(values, [f"parallel.{word}" for word in words.split()]), rows=ROWS * arguments.steps)


def work(arguments: argparse.Namespace, names: list[str]) -> None:
    """One rank: run after run in this process, each leaving a file; the trainer's own steps, nothing saved."""
    for name in names:
        began = time.perf_counter()
        try:
            found = train(recipe_of(arguments, name, int(os.environ.get("WORLD_SIZE", 1))))
        except Exception as error:  # every rank fails alike, or the others wait and the parent ends them
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        found["seconds"] = time.perf_counter() - began
        if int(os.environ.get("RANK", 0)) == 0:
            result_of(arguments, name).write_text(json.dumps(found))
        gc.collect()
        if torch.accelerator.is_available():
            torch.get_device_module(torch.accelerator.current_accelerator()).empty_cache()


def train(recipe: Any) -> dict[str, Any]:
    """Losses, median speed after the first fifth, peak memory of the fullest rank."""
    from trainwright.device import peak_memory_gib
    from trainwright.train.metrics import read_lines
    from trainwright.train.trainer import Trainer, quiet_garbage

    if torch.accelerator.is_available():
        torch.get_device_module(torch.accelerator.current_accelerator()).reset_peak_memory_stats()
    trainer = Trainer(recipe, force=True)
    trainer.clock = time.perf_counter()
    try:
        with quiet_garbage():
            while trainer.step < trainer.total_steps:
                trainer._one_step(list(islice(trainer.loader, trainer.loader.accumulation)), False)
        peaks = trainer.world.gather(peak_memory_gib(trainer.world.device)[0])
    finally:
        trainer.close()
    if not trainer.world.is_main:
        return {}
    lines = read_lines(trainer.folder.metrics)
    settled = lines[max(1, len(lines) // 5) :]
    return {
        "losses": [line["loss"] for line in lines],
        "tokens_per_second_per_gpu": statistics.median(line["tokens_per_second_per_gpu"] for line in settled),
        "peak_memory_gib": max(peak or 0.0 for peak in peaks),
    }


def result_of(arguments: argparse.Namespace, name: str) -> Path:
    return Path(arguments.folder / f"{''.join(c if c.isalnum() else '-' for c in name)}.json")


def missing(arguments: argparse.Namespace, names: list[str]) -> list[str]:
    return [name for name in names if not result_of(arguments, name).exists()]


def start(arguments: argparse.Namespace, names: list[str], gpus: int, devices: str) -> subprocess.Popen[bytes]:
    """The processes of one number of GPUs, on these of them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    options = [f"--folder={arguments.folder}", f"--steps={arguments.steps}", f"--seq-len={arguments.seq_len}"]
    options.append(f"--learning-rate={arguments.learning_rate}")
    flags = ["--small"] if arguments.small else []
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": devices, "OMP_NUM_THREADS": "1" if arguments.small else "8"}
    log = (arguments.folder / f"{gpus}-gpus.log").open("ab")
    return subprocess.Popen(
        [*(launcher if gpus > 1 else [sys.executable]), __file__, *options, *flags, "--worker", *names],
        stdout=log, stderr=log, start_new_session=True, env=environment,
    )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    """Asks first: torchrun's ranks are sessions of their own, and would stay on the GPUs if it alone were killed. It
    gives them 30 seconds."""
    for number, seconds in ((signal.SIGTERM, 40.0), (signal.SIGKILL, None)):
        os.killpg(process.pid, number)
        try:
            process.wait(seconds)
            return
        except subprocess.TimeoutExpired:
            continue


def finish(arguments: argparse.Namespace, process: subprocess.Popen[bytes], names: list[str]) -> None:
    """Waits for the runs. One that takes too long is given up, with its processes."""
    while process.poll() is None:
        waits = missing(arguments, names)
        done = [result_of(arguments, name).stat().st_mtime for name in names if name not in waits]
        if waits and time.time() - max([*done, arguments.began]) > arguments.limit:
            end(process)
            result_of(arguments, waits[0]).write_text(json.dumps({"error": f"not done in {arguments.limit} s"}))
        time.sleep(0.5)


def run(arguments: argparse.Namespace, names: list[str], gpus: int) -> None:
    """All of them, with new processes where some ended before their time."""
    devices = ",".join(arguments.devices[:gpus])
    for _ in names:
        left = missing(arguments, names)
        if not left:
            return
        arguments.began = time.time()
        finish(arguments, start(arguments, left, gpus, devices), left)
        if missing(arguments, names) == left:
            result_of(arguments, left[0]).write_text(json.dumps({"error": "its processes ended; see the log"}))


def row(arguments: argparse.Namespace, name: str, gpus: int, alone: list[float] | None) -> dict[str, Any]:
    """A line of the table, compared with the losses of the run on one GPU."""
    found = json.loads(result_of(arguments, name).read_text())
    line: dict[str, Any] = {"layout": name, "gpus": gpus, "words": words_of(name)}
    if "error" in found:
        return {**line, "error": found["error"]}
    losses = found["losses"]
    if alone is not None:
        pairs = list(zip(losses, alone, strict=True))
        line["step_percent"] = max(abs(a - b) / b for a, b in pairs) * 100
        line["mean_percent"] = abs(statistics.mean(losses) / statistics.mean(alone) - 1) * 100
    line |= {"losses": losses, "loss": losses[-1], "seconds": round(found["seconds"], 1)}
    return line | {key: found[key] for key in ("tokens_per_second_per_gpu", "peak_memory_gib")}


def words_of(name: str) -> str:
    return STARTS[name][0] if name in STARTS else (FOUR | TWO | MORE).get(name, "")


def text_of(line: dict[str, Any]) -> str:
    if "error" in line:
        return f"{line['layout']:<28}{line['gpus']:>5}  {line['error']}"
    apart = [f"{line[key]:>9.4f}" if key in line else f"{'':>9}" for key in ("step_percent", "mean_percent")]
    return (
        f"{line['layout']:<28}{line['gpus']:>5}{line['loss']:>9.4f}{''.join(apart)}"
        f"{line['tokens_per_second_per_gpu']:>11,.0f}{line['peak_memory_gib']:>8.1f}{line['seconds']:>7.0f}"
    )


def keep(arguments: argparse.Namespace, table: list[dict[str, Any]]) -> None:
    """Writes --out: after each number of GPUs, so that a run that is cut short leaves what it had."""
    if arguments.out is None:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    facts = {"device": device, "torch": torch.__version__, "date": date.today().isoformat()}
    size = {
        "steps": arguments.steps,
        "seq_len": arguments.seq_len,
        "rows_per_step": ROWS,
        "rate": arguments.learning_rate,
        "starts": list(STARTS),
    }
    arguments.out.write_text(json.dumps({**facts, **size, "lines": table}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--layouts", default=",".join([*FOUR, *TWO]), help=f"also {', '.join(MORE)}")
    parser.add_argument("--no-starts", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/trainwright-layouts"))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--devices", type=lambda words: words.split(","), default="0,1,2,3")
    parser.add_argument("--limit", type=int, default=100, help="seconds of one layout at most")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments, arguments.worker)
        return 0
    arguments.folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    wanted = [name for name in arguments.layouts.split(",") if name != "one"]  # which is run whatever is asked
    two = [name for name in wanted if name in TWO]
    four = [name for name in wanted if name not in TWO]
    starts = [] if arguments.no_starts else list(STARTS)
    print(
        f"{'layout':<28}{'GPUs':>5}{'loss':>9}{'step %':>9}{'mean %':>9}{'tok/s/GPU':>11}{'GiB':>8}{'s':>7}", flush=True
    )
    arguments.began = time.time()
    beside = start(arguments, ["one"], 1, arguments.devices[-1]) if missing(arguments, ["one"]) else None
    run(arguments, two, 2)
    if beside is not None:
        finish(arguments, beside, ["one"])
    first = row(arguments, "one", 1, None)
    print(text_of({**first, "layout": "one GPU"}), flush=True)
    if "error" in first:
        return 1
    alone = json.loads(result_of(arguments, "one").read_text())["losses"]
    table = [{**first, "layout": "one GPU"}]
    limits = (0.01, 0.01) if arguments.small else (0.5, 0.1)
    for names, gpus, reference in ((two, 2, alone), (four, 4, alone), (starts, 4, None)):
        run(arguments, names, gpus)
        for name in names:
            table.append(row(arguments, name, gpus, reference))
            print(text_of(table[-1]), flush=True)
        keep(arguments, table)
    good = all("error" not in line for line in table) and all(
        line.get("step_percent", 0) <= limits[0] and line.get("mean_percent", 0) <= limits[1] for line in table
    )
    print(("all agree" if good else "SOME DO NOT AGREE") + f", {time.perf_counter() - began:.0f} s", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
