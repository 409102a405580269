"""Writes the measured tables of docs/performance.md from the results that are kept. CI runs it with --check.

python docs/performance.py [--check]
python docs/performance.py --keep FOLDER NAME      a benchmark's results.json becomes benchmarks/results/NAME.json
python docs/performance.py --keep-speed FILE NAME  what speed_gpu.py wrote with --out is added to it as one more run

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
from trainwright.planner.hardware import find_card
from trainwright.store import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- {}: python docs/performance.py -->\n", "<!-- end -->"
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


def speed() -> Iterator[str]:
    """A table for each result of `benchmarks/speed_gpu.py` that is kept: both sides, the ratio inside of one run."""
    for path in sorted(RESULTS.glob("speed_*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        lines = results["lines"]
        best: dict[tuple[int, str], float] = {}
        flops: dict[str, float] = {}
        for line in lines:
            key, rate = (line["run"], line["row"]), line["tokens_per_second_per_gpu"]
            if line["side"] != "ours":
                best[key] = max(rate, best.get(key, 0.0))
            flops[line["row"]] = line.get("causal_flops_per_token") or flops.get(line["row"], 0.0)
        yield f"{results['title']}, torch {results['torch']}:"
        rows = ["| row | run | who | tokens/s/GPU | ours / best peer | MFU causal | step s | GiB |"]
        rows.append("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
        for line in sorted(lines, key=lambda line: line["row"]):  # stable: each row in the order of its runs
            rate, peer = line["tokens_per_second_per_gpu"], best.get((line["run"], line["row"]))
            who = ("torchtitan: " if line["side"] == "titan" else "") + line["who"]
            ratio = f"{rate / peer:.3f}" if peer and line["side"] == "ours" else ""
            share = rate * flops[line["row"]] / (find_card(results["device"]).peak("bf16") or 1)
            used = f"{share:.1%}" if share else ""
            rows.append(
                f"| {line['row']} | {line['run']} | {who} | {rate:,.0f} | {ratio} | {used} | "
                f"{line['step_seconds']:.3f} | {line['peak_memory_gib']:.1f} |"
            )
        yield "\n".join(rows)


def page(text: str) -> str:
    """The page with everything between its markers made anew; what people wrote stays."""
    for name, parts in (("measured", measured), ("speed", speed)):
        start = BEGIN.format(name)
        before, begin, rest = text.partition(start)
        _, end, after = rest.partition(END)
        if not (begin and end):
            sys.exit(f"docs/performance.md has no {start.strip()} ... {END}")
        sections = "\n\n".join(parts()) or "No result is kept yet."
        text = f"{before}{start}\n{sections}\n\n{END}{after}"
    return text


def keep_speed(written: Path, name: str) -> Path:
    """The lines that ended well become one more run of a speed table, without their kernels."""
    target = RESULTS / f"{name}.json"
    results = json.loads(target.read_text(encoding="utf-8"))
    run = 1 + max(line["run"] for line in results["lines"])
    for line in json.loads(written.read_text(encoding="utf-8")):
        if "error" not in line:
            results["lines"].append({**{key: value for key, value in line.items() if key != "kernels"}, "run": run})
    write_json(target, results)
    return target


def keep(folder: Path, name: str) -> Path:
    """A benchmark's results, without its logs and its machine's paths, as those of a matrix."""
    if name not in matrix_names():
        sys.exit(f"{name} is no shipped matrix: use one of {', '.join(matrix_names())}")
    results = read_json(folder / "results.json" if folder.is_dir() else folder)
    if results is None:
        sys.exit(f"{folder} holds no results.json")
    target = RESULTS / f"{name}.json"
    before = read_json(target) or {"rows": []}
    rows = {row["name"]: row for row in [*before["rows"], *results["rows"]]}  # rows that did not run now stay
    kept = [{key: value for key, value in row.items() if key != "log"} for row in rows.values()]
    then = {"program": before["program"]} if "program" in before else {}
    text = MACHINE_PATH.sub("", json.dumps({**results, **then, "rows": kept}, ensure_ascii=False))
    write_json(target, json.loads(text))
    return target


def main() -> None:
    """Writes the page, says that it is stale, or keeps results."""
    words = sys.argv[1:]
    if words[:1] == ["--keep"]:
        print(keep(Path(words[1]), words[2]))
    if words[:1] == ["--keep-speed"]:
        print(keep_speed(Path(words[1]), words[2]))
    write_or_check(PAGE, page)


if __name__ == "__main__":
    main()
