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
from pathlib import Path
from typing import Any

from speed_rows import LLAMA3_KEYS, MOE, ROWS, SMALL, SMALL_MOE, Row

PEAK = 989.5e12  # H100 and H200, dense bf16
COLUMNS = ("row", "who", "tok/s/GPU", "ratio", "MFU", "step s", "GiB", "first s")
WIDTHS = (9, 44, 10, 7, 7, 9, 7, 8)
HERE = Path(__file__).resolve().parent


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
