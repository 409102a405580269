"""The capability matrix: every family in every kind of parallelism, alone and in products, as cases of `parity.py`.

    python -m tests.parallel.matrix docs/layouts.md      runs all of it and writes the table there

`test_matrix.py` runs the same cases, so a cell is never a claim.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.parallel.parity import TOLERANCE, Case, differences, trace_of
from tests.parallel.worlds import run
from trainwright.parallel.layout import Layout

FAMILIES = (
    "llama", "mistral", "mixtral", "qwen", "qwen2", "qwen3", "qwen3_moe", "baichuan_7b", "baichuan_13b",
    "baichuan2_7b", "baichuan2_13b", "chatglm", "chatglm2", "glm_130b", "gpt2", "opt", "bloom",
)  # fmt: skip
EXPERTS = ("mixtral", "qwen3_moe")
COLUMNS: dict[str, Case] = {
    "DP (ZeRO 0)": Case("", Layout(world_size=2, zero=0)),
    "ZeRO 1": Case("", Layout(world_size=2, zero=1)),
    "ZeRO 2": Case("", Layout(world_size=2, zero=2)),
    "ZeRO 3, full recompute": Case("", Layout(world_size=2), (("recompute", "full"),)),
    "TP + SP": Case("", Layout(world_size=2, tp=2)),
    "TP4": Case("", Layout(world_size=4, tp=4)),
    "CP": Case("", Layout(world_size=2, cp=2)),
    "PP": Case("", Layout(world_size=2, pp=2)),
    "EP": Case("", Layout(world_size=2, ep=2)),
    "hybrid x TP": Case("", Layout(world_size=8, tp=2, dp_replicate=2)),
    "TP x PP x ZeRO 2": Case("", Layout(world_size=8, tp=2, pp=2, zero=2)),
}
SMALL = ("llama", "bloom", "chatglm", "mixtral")  # of these CI runs every column; of all families those that matter
# Columns that are the same work for every family; CI runs them for SMALL.
DEEP = ("DP (ZeRO 0)", "ZeRO 1", "ZeRO 2", "TP4", "hybrid x TP", "TP x PP x ZeRO 2")
BEGIN, END = "<!-- matrix: python -m tests.parallel.matrix docs/layouts.md -->", "<!-- end of matrix -->"


def case_of(family: str, column: str) -> Case | None:
    """One cell; None where it has no meaning (expert parallelism of a model without experts)."""
    if column == "EP" and family not in EXPERTS:
        return None
    pattern = COLUMNS[column]
    return Case(f"golden:{family}", pattern.layout, pattern.options)


def cell(family: str, column: str) -> str:
    """The largest relative difference of three steps' losses, norms and gradients from one process's."""
    case = case_of(family, column)
    if case is None:
        return "no experts"
    worst = max(differences(case, run(case.layout.world_size, trace_of, case)).values())
    return f"{worst:.0e}" if worst <= TOLERANCE else f"**{worst:.0e}**"


def table() -> str:
    """The matrix in Markdown, every cell measured now."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    lines += [f"| {family} | {' | '.join(cell(family, column) for column in COLUMNS)} |" for family in FAMILIES]
    return "\n".join(lines)


def main(path: Path) -> None:
    """Writes the table between its two marks."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
