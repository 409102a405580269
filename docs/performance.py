"""Writes the measured tables of docs/performance.md from the results that are kept. CI runs it with --check.

python docs/performance.py [--check]
python docs/performance.py --keep FOLDER NAME      a benchmark's results.json becomes benchmarks/results/NAME.json

NAME is that of the shipped matrix; planner_* are docs/planner.md's. What is kept has no logs and no paths of a machine,
and `trainwright bench NAME --folder F` goes on from it where it lies as F/results.json.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pages import write_or_check

from trainwright.bench.matrix import matrix_names
from trainwright.bench.table import markdown_table, tables
from trainwright.store import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: python docs/performance.py -->\n", "<!-- end -->"
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+")

Row = dict[str, Any]


def kept() -> list[str]:
    """The matrices that this page shows, in their order."""
    return [name for name in matrix_names() if not name.startswith("planner_")]


def section(name: str, results: dict[str, Any]) -> str:
    """One matrix: what it is, how many rows are above the published ones, all tables."""
    rows = results["rows"]
    devices = ", ".join(sorted({str(row["device"]) for row in rows if row.get("device")}))
    torch = ", ".join(sorted({str(row["torch"]) for row in rows if row.get("torch")}))
    lines = [f"### {results['title']}", f"`trainwright bench {name}` on {devices}, torch {torch}.{verdict(rows)}"]
    if counts := results.get("counts"):
        what = {key: value for key, value in counts.items() if key != "source"}
        told = "; ".join(f"{key}: {value}" for key, value in what.items())
        lines.append(f"Beside: {counts['source']}. {told[:1].upper()}{told[1:]}.")
    for head, columns, part in tables(rows):
        lines += [f"**{head}**" if head else "", markdown_table(columns, part).rstrip()]
    return "\n\n".join(line for line in lines if line)


def verdict(rows: list[Row]) -> str:
    """How the rows stand against what is published, per peak TFLOP."""
    ratios = {row["name"]: row["beside"]["mfu_ratio"] for row in rows if (row.get("beside") or {}).get("mfu_ratio")}
    if not ratios:
        return ""
    below = {name: ratio for name, ratio in ratios.items() if ratio <= 1}
    told = f" Per peak TFLOP ours is {min(ratios.values()):.2f} to {max(ratios.values()):.2f} times theirs"
    if not below:
        return f"{told}: higher on every row."
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["name"] in below:
            reasons.setdefault(row.get("note") or "NO REASON GIVEN", []).append(row["name"])
    return f"{told}; not higher: " + "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items()) + "."


def measured() -> Iterator[str]:
    """A section for each matrix whose results are kept."""
    for name in kept():
        results = read_json(RESULTS / f"{name}.json")
        if results is not None:
            yield section(name, results)


def page(text: str) -> str:
    """The page with everything between its markers made anew; what people wrote stays."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"docs/performance.md has no {BEGIN.strip()} ... {END}")
    sections = "\n\n".join(measured()) or "No result of a shipped matrix is kept yet."
    return f"{before}{BEGIN}\n{sections}\n\n{END}{after}"


def keep(folder: Path, name: str) -> Path:
    """A benchmark's results, without its logs and its machine's paths, as those of a matrix."""
    if name not in matrix_names():
        sys.exit(f"{name} is no shipped matrix: use one of {', '.join(matrix_names())}")
    results = read_json(folder / "results.json" if folder.is_dir() else folder)
    if results is None:
        sys.exit(f"{folder} holds no results.json")
    rows = [{key: value for key, value in row.items() if key != "log"} for row in results["rows"]]
    text = MACHINE_PATH.sub("", json.dumps({**results, "rows": rows}, ensure_ascii=False))
    target = RESULTS / f"{name}.json"
    write_json(target, json.loads(text))
    return target


def main() -> None:
    """Writes the page, says that it is stale, or keeps results."""
    words = sys.argv[1:]
    if words[:1] == ["--keep"]:
        print(keep(Path(words[1]), words[2]))
    write_or_check(PAGE, page)


if __name__ == "__main__":
    main()
