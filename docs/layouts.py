"""Writes the measured section of docs/layouts.md from benchmarks/results/layouts_*.json. CI runs it with --check.

python docs/layouts.py [--check]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pages import write_or_check

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "layouts.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: python docs/layouts.py -->\n", "<!-- end of measured -->"
NONE = (
    "No results are kept yet: `python benchmarks/layouts_gpu.py --out benchmarks/results/layouts_NAME.json` makes them."
)


def section(found: dict[str, Any]) -> str:
    """One machine: the 1B Llama in each layout, then the layouts in which Llama-3-8B started."""
    starts = set(found["starts"])
    compared = [line for line in found["lines"] if line["layout"] not in starts]
    started = [line for line in found["lines"] if line["layout"] in starts]
    text = [
        f"{found['device']}, torch {found['torch']}, {found['date']}: {found['steps']} steps of "
        f"{found['rows_per_step']} rows of {found['seq_len']} tokens. `step` is the largest difference of a step's "
        "loss from the run on one GPU, `mean` that of the mean loss; the bounds are 0.5% and 0.1%.",
        table(
            ("layout", "`parallel`", "GPUs", "step %", "mean %", "tokens/s/GPU", "peak GiB"),
            [(*head(line), *apart(line), *speed(line)) for line in compared],
        ),
    ]
    if started:
        text += [
            "Llama-3-8B, three steps with random weights in the layouts of the published tables that these GPUs allow:",
            table(
                ("layout", "`parallel`", "GPUs", "tokens/s/GPU", "peak GiB"),
                [(*head(line), *speed(line)) for line in started],
            ),
        ]
    return "\n\n".join(text)


def head(line: dict[str, Any]) -> tuple[str, str, str]:
    return line["layout"], f"`{line['words']}`" if line["words"] else "", str(line["gpus"])


def apart(line: dict[str, Any]) -> tuple[str, str]:
    return tuple(f"{line[key]:.3f}" if key in line else "" for key in ("step_percent", "mean_percent"))  # type: ignore[return-value]


def speed(line: dict[str, Any]) -> tuple[str, str]:
    if "error" in line:
        return f"failed: {line['error'][:80]}", ""
    return f"{line['tokens_per_second_per_gpu']:,.0f}", f"{line['peak_memory_gib']:.1f}"


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def page(text: str) -> str:
    """The page as it should be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("layouts_*.json"))]
    sections = "\n\n".join(section(found) for found in kept) or NONE
    return f"{before}{BEGIN}{sections}\n{END}{after}"


if __name__ == "__main__":
    write_or_check(PAGE, page)
