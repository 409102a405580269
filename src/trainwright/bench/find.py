"""The largest micro batch, or the longest row, that fits: found by running. No torch.

Every probe is a cell: a process tree of its own, kept and resumed like any other. The search starts where the planner
says the limit is, steps away from it in steps that double until one size fits and one does not, and halves what is
between. It takes for granted that whatever fits, fits smaller too.

Owns the search; `runner.py` runs the probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from trainwright.bench.cell import Cell, here, predict
from trainwright.bench.result import Row, describe
from trainwright.errors import UserError

What = Literal["max_micro_batch", "max_seq_len"]
KEYS: dict[str, str] = {"max_micro_batch": "train.micro_batch_size", "max_seq_len": "data.seq_len"}
CEILING = 1 << 22  # no search goes beyond
STEPS = {"warmup_steps": 1, "measured_steps": 2}  # from the second step on, optimizer states are there


def find_limit(cell: Cell, what: What, measure: Callable[[Cell], Row]) -> Row:
    """The row of the largest size that fits, with `find`: the limit, and what the next size lacked.

    A probe that ends otherwise than by fitting or running out of memory ends the search, and its row says how.
    """
    unit = 1 if what == "max_micro_batch" else _row_unit(cell)
    probes: dict[int, Row] = {}

    def fits(size: int) -> bool | None:
        probes[size] = measure(probe(cell, what, size))
        return {"ok": True, "oom": False}.get(probes[size]["status"])

    planned = planned_limit(cell, what, unit)
    low, high, stopped = search(fits, planned or unit, unit)
    tried = [_tried(size, row) for size, row in probes.items()]
    told: dict[str, Any] = {"what": what, "unit": unit, "planned": planned, "limit": low, "next": high, "probes": tried}
    if stopped is not None:
        row = probes[stopped]
        told["line"] = f"the search ended at {stopped}: {row.get('line', row['status'])}"
        return {**row, "name": cell.name, "find": told}
    lacking = probes[high].get("oom", {}) if high is not None else {}
    told |= {"next_short_gib": lacking.get("short_gib"), "next_phase": lacking.get("phase")}
    if low is None:
        return {**probes[unit], "name": cell.name, "find": {**told, "line": f"not even {unit} fits"}}
    return {**probes[low], "name": cell.name, "find": told}


def search(fits: Callable[[int], bool | None], start: int, unit: int) -> tuple[int | None, int | None, int | None]:
    """(largest that fits, smallest that does not, where it was cut short) among multiples of `unit`.

    Sizes above 64 units are told apart to about one part in 64. `fits` answers None where there is no answer.
    """
    low: int | None = None
    high: int | None = None
    size, step = start, max(unit, start // 16 // unit * unit)
    while low is None or high is None or high - low > max(unit, low // 64 // unit * unit):
        answer = fits(size)
        if answer is None:
            return low, high, size
        low, high = (size, high) if answer else (low, size)
        if high is None:
            if size >= CEILING:
                return low, None, None
            size, step = min(CEILING, size + step), 2 * step
        elif low is None:
            if size <= unit:
                return None, high, None
            size, step = max(unit, size - step), 2 * step
        else:
            size = (low + high) // 2 // unit * unit
    return low, high, None


def probe(cell: Cell, what: What, size: int) -> Cell:
    """The cell with another size, and two micro batches a step at most: more take time and no memory."""
    change: dict[str, Any] = {KEYS[what]: size}
    accumulation = describe(cell)["accumulation"] or 1
    change["train.gradient_accumulation_steps"] = min(2, accumulation)
    return cell.with_set(change, name=f"{cell.name}: {size}", align_with=None, **STEPS)


def planned_limit(cell: Cell, what: What, unit: int) -> int | None:
    """What the planner takes for the limit; None where it has no opinion."""
    cluster = here(cell.gpus, cell.setting.memory_gib)

    def fits(size: int) -> bool | None:
        try:
            made = predict(probe(cell, what, size), cluster)
        except UserError:
            return None
        return None if made is None else made.fits

    return search(fits, unit, unit)[0]


def _row_unit(cell: Cell) -> int:
    """Rows are multiples of 64 tokens, and of what the layout divides them by."""
    return math.lcm(64, 2 * cell.recipe.parallel.cp * cell.recipe.parallel.tp)


def _tried(size: int, row: Row) -> dict[str, Any]:
    short = (row.get("oom") or {}).get("short_gib")
    return {"size": size, "status": row["status"], "peak_memory_gib": row.get("peak_memory_gib"), "short_gib": short}


def check_find(find: str | None, cells: Sequence[Cell], gpus: int) -> What | None:
    """What is searched for. Raises UserError for another word, and where a search would fill a host's memory."""
    if find is None:
        return None
    if find not in KEYS:
        raise UserError(f"--find {find} is no limit: use {' or '.join(KEYS)}")
    open_ended = next((cell.name for cell in cells if cell.setting.memory_gib is None), None)
    if gpus == 0 and open_ended is not None:
        raise UserError(f"--find on a CPU fills the host's memory with {open_ended}: add --memory-gib, such as 1")
    return cast(What, find)
