"""Writes the tables of docs/planner.md: what the planner says beside what was printed and measured. CI runs it with
--check.

python docs/planner.py [--check]

Published rows are `bench/published/`; measured ones are results of `trainwright bench MATRIX` kept as
`benchmarks/results/MATRIX.json`. Every figure of the plan is computed anew, with the efficiencies that are shipped, or
with those that `doctor --measure` wrote on that machine where `benchmarks/results/MATRIX.yaml` keeps them.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pages import write_or_check

from trainwright.bench.cell import Cell, cells_of
from trainwright.bench.matrix import find_matrix, matrix_names, read_matrix
from trainwright.bench.published import PublishedRow, load_published
from trainwright.planner.calibration import Calibration, read_calibration
from trainwright.planner.hardware import GIB, cluster_of
from trainwright.planner.memory import plan_memory
from trainwright.planner.plan import Plan, plan
from trainwright.planner.speed import plan_speed
from trainwright.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "planner.md"
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))  # the speed table's own recipes
STATES = ROOT / "tests" / "planner" / "test_states.py"

os.environ["TRAINWRIGHT_CALIBRATION"] = str(RESULTS / "none")  # the shipped efficiencies, not this machine's own


def table(heads: str, rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown; heads that end in a colon are of numbers."""
    names = heads.split(" | ")
    rules = ["---:" if name.endswith(":") else "---" for name in names]
    lines = [[name.rstrip(":") for name in names], rules, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def error(planned: float | None, printed: float | None) -> float | None:
    return planned / printed - 1 if planned and printed else None


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1%}"


def mean_and_worst(errors: Iterable[float | None]) -> str:
    known = [abs(value) for value in errors if value is not None]
    return f"{sum(known) / len(known):.1%} / {max(known):.1%} of {len(known)}" if known else ""


# ---- published


def published() -> str:
    """A summary of each document, then every row."""
    rows = [(row, row.plan()) for document in load_published() for row in document.rows]
    return f"{_summary(rows)}\n\n{_every_row(rows)}"


def _summary(rows: list[tuple[PublishedRow, Plan]]) -> str:
    lines = []
    for document in load_published():
        for use in ("held out", "calibration", "shown only"):
            mine = [(row, made) for row, made in rows if row.seed == document.seed and row.use == use]
            if mine:
                memory = mean_and_worst(_memory_error(*each) for each in mine)
                speed = mean_and_worst(_speed_error(*each) for each in mine)
                lines.append([document.seed, document.title, use, str(len(mine)), memory, speed])
    return table("seed | document | rows are | rows: | memory, mean / worst: | speed, mean / worst:", lines)


def _memory_error(row: PublishedRow, made: Plan) -> float | None:
    return error(row.planned_memory_gib(made), row.memory_gib)


def _speed_error(row: PublishedRow, made: Plan) -> float | None:
    return error(*row.speeds(made))


def _every_row(rows: list[tuple[PublishedRow, Plan]]) -> str:
    lines = []
    for row, made in rows:
        planned, printed = row.speeds(made)
        memory = f"{row.memory_gib:.1f}" if row.memory_gib else ("out of memory" if row.out_of_memory else "")
        ours = f"{row.planned_memory_gib(made):.1f}" + ("" if made.fits else ", does not fit") if memory else ""
        speeds = [f"{printed:.4g}", f"{planned:.4g}"] if printed else ["", ""]
        errors = percent(_memory_error(row, made)), percent(_speed_error(row, made))
        lines.append([row.seed, row.name, row.use, memory, ours, errors[0], *speeds, errors[1]])
    heads = "seed | row | use | GiB printed: | planned: | error: | speed printed: | planned: | error:"
    return table(heads, lines)


# ---- measured

# Rows that a figure of the planner was fitted to, beside those whose note says so: the host's time for adapters and for
# matrices in fewer bits, the share of the matrix units' peak, what a collective takes besides its bytes.
FITTED = {
    "000_h200_1": {"QLoRA 512 in 10 GB, nothing twice"},
    "000_h200_4": {"8k on 4 GPUs"},
    "001_h200_4": {"meta-llama/Llama-2-7b"},
    "002_llama2_7b_peft": {"fp16 4 x 64", "int4 4 x 512", "fp16 16 x 512"},
    "planner_qlora_h200_1": {"QLoRA 512, little memory", "int8 8 x 512, 12.6 GB"},
    "001_h200_2": {"meta-llama/Llama-2-13b"},
    "speed_h200_2": {
        "EP2 x ZeRO-3, 2 rows",
        "EP2 x ZeRO-3, 2 rows, cuDNN attention",
        "EP2 x ZeRO-3, 2 rows, cuDNN attention, a row for each choice",
    },
    "speed_h200_4": {"ZeRO-3, 2 rows, NCCL", "ZeRO-3, 2 rows", "ZeRO-3, 3 rows", "ZeRO-3, tensorwise, 2 rows"},
}
HEADS = "row | use | GiB taken: | planned: | error: | step s taken: | planned: | error:"
Errors = tuple[str, float | None, float | None, bool]  # use of a row, of memory, of time, said to fit and did not


def measured() -> str:
    """Every kept result of a matrix, all of them together first; what is kept of none is said."""
    every, parts = [], []
    for path in sorted(RESULTS.glob("*.json")):
        if path.stem in matrix_names():
            errors, text = _measured(path)
            every += errors
            parts.append(text)
    for path in sorted(RESULTS.glob("speed_*.json")):
        errors, text = _speed_table(path)
        every += errors
        parts.append(text)
    parts.insert(0, f"### All {len(every)} rows\n\n{_bounds(every)}")
    for name in ("planner_h200_1", "planner_h200_2", "planner_h200_4"):
        if not (RESULTS / f"{name}.json").exists():
            parts.append(f"`{name}`: {len(cells_of(read_matrix(find_matrix(name))))} rows, no result is kept yet.")
    return "\n\n".join(parts)


def _measured(path: Path) -> tuple[list[Errors], str]:
    results, own = json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".yaml")
    calibration = read_calibration(own) if own.is_file() else None
    cells = {cell.name: cell for cell in cells_of(read_matrix(find_matrix(path.stem)))}
    rows = [row for row in results["rows"] if row["status"] in ("ok", "oom") and row["name"] in cells]
    lines, errors = [], list[Errors]()
    for row in rows:
        made = _plan(cells[row["name"]], row, calibration, results)
        memory = _peak(made, results.get("peak_of"))
        seconds = row.get("step_seconds")
        of_memory, of_time = error(memory / GIB, row.get("peak_memory_gib")), error(made.speed.step_seconds, seconds)
        fitted = row.get("note", "").startswith("calibration") or row["name"] in FITTED.get(path.stem, ())
        use = "calibration" if fitted else "held out"
        errors.append((use, of_memory, of_time, row["status"] == "oom" and made.fits))
        ran = f"{row['peak_memory_gib']:.1f}" if row["status"] == "ok" else "out of memory"
        step = f"{seconds:.3g}" if seconds else ""
        lines.append([row["name"], use, ran, *_planned(made, memory, of_memory, step, of_time)])
    parts = [f"### {results['title']}", results.get("source", ""), _bounds(errors), table(HEADS, lines)]
    return errors, "\n\n".join(part for part in parts if part)


def _peak(made: Plan, of: str | None) -> int:
    """Bytes of what was looked at: the fullest rank of all, "rank 0", "steps" without building the model, or the
    "first step", whose backward pass finds no states of the optimizer yet."""
    if of == "rank 0":
        return made.memory.stages[0].peak.total
    if of == "steps":
        return max(moment.total for moment in made.memory.fullest.moments if moment.name != "build")
    if of == "first step":
        moments = [moment for moment in made.memory.fullest.moments if moment.name in ("loss", "backward", "optimizer")]
        states = [moment.parts.get("optimizer", 0) if moment.name != "optimizer" else 0 for moment in moments]
        return max(moment.total - size for moment, size in zip(moments, states, strict=True))
    return made.memory.allocated


def _speed_table(path: Path) -> tuple[list[Errors], str]:
    """Our lines of a kept result of `benchmarks/speed_gpu.py`."""
    import speed_gpu

    results = json.loads(path.read_text(encoding="utf-8"))
    options = argparse.Namespace(small=False, layers=None, folder=Path("speed"), profile=False)
    lines, errors = [], list[Errors]()
    for line in results["lines"]:
        if line["side"] != "ours" or line.get("outdated"):
            continue
        recipe = speed_gpu.ours(speed_gpu.ROWS[line["row"]], line["words"], options)["recipe"]
        made = _as_then(plan(load_recipe(recipe), cluster_of(results["device"], line["gpus"])), line)
        memory, seconds, taken = _peak(made, line.get("peak_of")), line["step_seconds"], line["peak_memory_gib"]
        of_memory = error(memory / GIB, taken)
        of_time = error(made.speed.step_seconds, seconds) if made.fits else None  # no speed is promised there
        use = "calibration" if line["who"] in FITTED.get(path.stem, ()) else "held out"
        errors.append((use, of_memory, of_time, False))
        step = f"{seconds:.3g}"
        name = f"{line['row']}: {line['who']}"
        lines.append([name, use, f"{taken:.1f}", *_planned(made, memory, of_memory, step, of_time)])
    return errors, "\n\n".join([f"### {results['title']}", _bounds(errors), table(HEADS, lines)])


def _planned(made: Plan, memory: int, of_memory: float | None, step: str, of_time: float | None) -> list[str]:
    """The columns of HEADS from the planned memory (bytes) on; step: what one took."""
    ours = f"{memory / GIB:.1f}" + ("" if made.fits else ", does not fit")
    return [ours, percent(of_memory), step, f"{made.speed.step_seconds:.3g}", percent(of_time)]


def _plan(cell: Cell, row: dict[str, Any], calibration: Calibration | None, results: dict[str, Any]) -> Plan:
    """As of the results that have the row."""
    cap = cell.setting.memory_gib or row.get("device_memory_gib")
    cluster = cluster_of(row["device"], cell.gpus, memory_gib=cap)
    return _as_then(plan(cell.recipe, cluster, calibration=calibration), results)


def _as_then(made: Plan, results: dict[str, Any]) -> Plan:
    """Planned again with what was another number of our program when these results were measured."""
    job = replace(made.job, program=made.job.program.with_values(results.get("program", {})))
    return Plan(job, plan_memory(job), plan_speed(job))


def _bounds(errors: list[Errors]) -> str:
    lines = []
    for use in ("held out", "calibration"):
        mine = [each for each in errors if each[0] == use]
        if mine:
            wrong = sum(each[3] for each in mine)
            means = mean_and_worst(each[1] for each in mine), mean_and_worst(each[2] for each in mine)
            lines.append([use, str(len(mine)), *means, str(wrong)])
    heads = "rows are | rows: | memory, mean / worst: | step time, mean / worst: | said to fit, did not:"
    return table(heads, lines)


# ---- exact


def exact() -> str:
    """The layouts whose every rank is compared to the byte, as the test lists them."""
    tree = ast.parse(STATES.read_text(encoding="utf-8"))
    found: dict[str, Any] = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    rows = [[each.elts[0].value, f"`{ast.unparse(each.elts[1])}`", "all"] for each in found["LAYOUTS"].elts]
    for each in found["ADAPTED"].elts:
        how = ", ".join(f"{key} {value}" for key, value in ast.literal_eval(each.elts[2]).items())
        rows.append([each.elts[0].value, f"`{ast.unparse(each.elts[1])}`", f"adapters, {how.replace(' True', '')}"])
    families = ", ".join(each.value for each in found["FAMILIES"].elts)
    return f"{table('model | layout | trained', rows)}\n\nOne process, every family: {families}."


TABLES: dict[str, Callable[[], str]] = {"published": published, "measured": measured, "exact": exact}


def page(text: str) -> str:
    """The page with every table between `<!-- table: NAME -->` and `<!-- end -->` made anew."""

    def made(match: re.Match[str]) -> str:
        return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", made, text, flags=re.DOTALL)


if __name__ == "__main__":
    write_or_check(PAGE, page)
