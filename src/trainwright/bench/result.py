"""What a cell came to: one row of figures, in one convention, or why there are none. No torch.

Owns the arithmetic of a row and its keys, which are those of results.json:

    status      ok, oom, crashed, timeout, refused (a UserError, or more GPUs than there are)
    speed       of the median measured step; step_seconds_min, _max and _spread (the middle half) beside it
    tflops mfu hfu   of one GPU, model FLOPs after PaLM; tflops_causal mfu_causal: what a causal step must really do
    predicted_* *_error   the plan's, less one of the measured
    oom         phase, what was asked, free and short, in GiB, and the planner's account of it
"""

from __future__ import annotations

import signal
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainwright import __version__
from trainwright.bench.cell import Cell, here, layout_name, model_name, predict, recompute_name, task_name
from trainwright.bench.processes import Ended
from trainwright.planner.compare import Measured, compare, out_of_memory
from trainwright.planner.hardware import GIB, find_card, peak_flops
from trainwright.planner.plan import Plan
from trainwright.store import read_json
from trainwright.train.metrics import read_lines

Row = dict[str, Any]
LOG_LINES = 12


def row_of(cell: Cell, folder: Path, ended: Ended) -> Row:
    """The row of a cell that ran in `folder`."""
    outcome, failures = read_json(folder / "outcome.json"), read_failures(folder)
    row = describe(cell)
    row |= {"seconds": ended.seconds, "trainwright": __version__}
    lines = read_lines(folder / "run" / "metrics.jsonl")
    if outcome is not None and ended.status == 0:
        row |= figures(cell, outcome, lines)
        row["status"] = "ok"
    else:
        row |= why(cell, ended, failures, folder / "log.txt", len(lines))
    return row | predictions(cell, row, outcome)


def describe(cell: Cell) -> Row:
    """What was asked, in the words of the published tables."""
    recipe, layout, size = cell.recipe, cell.layout, cell.recipe.train.micro_batch_size
    train = recipe.train
    rows = size if isinstance(size, int) else None
    accumulation = rows and layout.accumulation(rows, train.global_batch_size, train.gradient_accumulation_steps)
    return {
        "name": cell.name,
        "status": "waiting",
        "model": model_name(recipe),
        "task": task_name(recipe),
        "precision": train.precision,
        "optimizer": train.optimizer,
        "seq_len": recipe.data.seq_len,
        "micro_batch_size": size,
        "accumulation": accumulation,
        "global_batch_size": rows and accumulation and rows * accumulation * layout.data_ranks,
        "gpus": cell.gpus,
        "layout": layout_name(layout),
        "recompute": recompute_name(recipe),
        "made": cell.setting.made,
        "memory_cap_gib": cell.setting.memory_gib,
        "note": cell.setting.note,
        "set": cell.setting.set,
        "steps": cell.steps,
        "measured_steps": cell.setting.measured_steps,
    }


def figures(cell: Cell, outcome: Mapping[str, Any], lines: list[dict[str, Any]]) -> Row:
    """Speed, FLOPs and memory of the measured steps."""
    measured = lines[cell.setting.warmup_steps :]
    seconds = [line["step_seconds"] for line in measured]
    step = statistics.median(seconds)
    tokens = statistics.fmean(line["tokens_per_second_per_gpu"] * line["step_seconds"] for line in measured)
    rate, samples = tokens / step, outcome["rows_per_step"] / step
    flops = outcome["flops_per_token"]
    peak = peak_flops(outcome["device"], cell.recipe.train.precision)
    card = find_card(outcome["device"])
    return {
        "device": card.name if card else outcome["device"],
        "device_name": outcome["device"],
        "peak_tflops": peak / 1e12 if peak else None,
        "torch": outcome["torch"],
        "parameters": outcome["parameters"],
        "trained_parameters": outcome["trained_parameters"],
        "micro_batch_size": outcome["micro_batch_size"],
        "accumulation": outcome["accumulation"],
        "global_batch_size": outcome["rows_per_step"],
        "step_seconds": step,
        "step_seconds_min": min(seconds),
        "step_seconds_max": max(seconds),
        "step_seconds_spread": middle_half(seconds),
        "start_seconds": outcome["start_seconds"],
        "tokens_per_second_per_gpu": rate,
        "samples_per_second": samples,
        "seconds_per_sample": 1 / samples,
        "tflops": rate * flops["palm"] / 1e12,
        "tflops_causal": rate * flops["causal"] / 1e12,
        "mfu": rate * flops["palm"] / peak if peak else None,
        "mfu_causal": rate * flops["causal"] / peak if peak else None,
        "hfu": rate * flops["hardware"] / peak if peak else None,
        "flops_per_token": flops,
        "peak_memory_gib": outcome["peak_memory_gib"],
        "reserved_memory_gib": outcome["reserved_memory_gib"],
        "standing_memory_gib": outcome["standing_memory_gib"],
        "device_memory_gib": outcome["device_memory_gib"],
        "data_wait_seconds": statistics.median(line.get("data_wait_seconds") or 0.0 for line in measured),
        "loss": lines[-1]["loss"],
    }


def middle_half(values: list[float]) -> float:
    """The interquartile range; the whole range of fewer than four values."""
    if len(values) < 4:
        return max(values) - min(values)
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return upper - lower


# ---- what went wrong


def read_failures(folder: Path) -> list[dict[str, Any]]:
    """What the ranks that failed wrote, the one that explains the others first: out of memory, then first causes."""
    found = [told for path in sorted(folder.glob("failure-*.json")) if (told := read_json(path))]
    return sorted(found, key=lambda told: (told["status"] != "oom", bool(told.get("secondary")), told["rank"]))


def why(cell: Cell, ended: Ended, failures: list[dict[str, Any]], log: Path, steps: int) -> Row:
    """Status and one line for a cell without figures, with the last lines of its log."""
    tail = last_lines(log)
    row: Row = {"log": tail, "steps_done": steps}
    if ended.late:
        limit = cell.setting.time_limit_seconds
        where = f"after step {steps} of {cell.steps}" if steps else "before its first step ended"
        return row | {"status": "timeout", "line": f"ended at its time limit of {limit:g} s, {where}"}
    verdict = next((line for line in reversed(tail) if line.startswith("trainwright: ")), None)
    if failures and failures[0].get("secondary"):  # who only saw another go does not know why
        silent = sorted(set(range(cell.gpus)) - {told["rank"] for told in failures})
        ranks = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        verdict = f"{ranks} ended without a word, as a signal or the kernel ends a process" if silent else verdict
    elif failures:
        told = failures[0]
        row |= {"status": told["status"], "line": told["line"]}
        if told["status"] == "oom":
            asked, free = told.get("asked_gib"), told.get("free_gib")
            short = asked - free if asked is not None and free is not None and asked > free else None
            keys = ("phase", "asked_gib", "free_gib", "rank", "step")
            row["oom"] = {**{key: told.get(key) for key in keys}, "short_gib": short}
        return row
    if ended.status < 0:
        name = signal.Signals(-ended.status).name
        text = " ".join(tail)
        if any(words in text for words in ("bad_alloc", "Cannot allocate memory")):  # C++ that could not even raise
            told = {"phase": "unknown", "asked_gib": None, "free_gib": None, "short_gib": None}
            return row | {"status": "oom", "line": f"ended by {name}: {tail[-1]}", "oom": told}
        hint = ", which the kernel sends when the host runs out of memory" if name == "SIGKILL" else ""
        return row | {"status": "crashed", "line": f"ended by {name}{hint}"}
    if verdict is not None:
        return row | {"status": "crashed", "line": verdict.removeprefix("trainwright: ")}
    last = tail[-1] if tail else "it said nothing"
    return row | {"status": "crashed", "line": f"ended with status {ended.status}: {last}"}


def last_lines(log: Path) -> list[str]:
    """The end of a cell's log."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line[:300] for line in text.splitlines() if line.strip()][-LOG_LINES:]


# ---- predicted beside measured


def predictions(cell: Cell, row: Row, outcome: Mapping[str, Any] | None) -> Row:
    """The planner's memory and step time, their errors, and for a cell that ran out its account.

    A planner that fails leaves the columns empty and the benchmark alone.
    """
    told = outcome or {}
    cluster = here(cell.gpus, cell.setting.memory_gib, told.get("device"), told.get("device_memory_gib") or 0.0)
    made = predict(cell, cluster)
    if made is None:
        return {}
    on_cpu = cluster.card.name == "CPU"
    try:
        return _against(made, row, on_cpu)
    except Exception:
        return {}


def _against(made: Plan, row: Row, on_cpu: bool) -> Row:
    measured = Measured(
        None if on_cpu else row.get("peak_memory_gib"),  # a processor tells its process's memory, not its tensors'
        row.get("step_seconds"),
        row.get("standing_memory_gib"),
        row.get("data_wait_seconds") or 0.0,
    )
    found = compare(made, measured)
    told: Row = {
        "predicted_memory_gib": found.predicted_memory_gib,
        "predicted_needed_gib": made.memory.needed / GIB,
        "predicted_step_seconds": found.predicted_step_seconds,
        "predicted_fits": made.fits,
        "memory_error": found.memory_error,
        "time_error": found.time_error,
        "missed": list(found.missed),
    }
    if row["status"] == "oom":
        oom = row["oom"]
        account = out_of_memory(made, oom["phase"], asked_gib=oom["asked_gib"], free_gib=oom["free_gib"])
        short = oom["short_gib"] if oom["short_gib"] is not None else max(0.0, -made.memory.free / GIB) or None
        told["oom"] = {**oom, "short_gib": short, "account": account}
        told["line"] = account
    return told
