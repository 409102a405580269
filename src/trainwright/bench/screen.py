"""What a person sees while a benchmark runs: a live table on a terminal, a line a cell in a log. No torch.

Owns the pace and the words; what a row says is `table.py`'s.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from trainwright.bench.cell import Cell
from trainwright.bench.result import Row
from trainwright.bench.table import COLUMNS, Column, shown, used

SHOWN = {
    "name", "gpus", "layout", "tokens_per_second_per_gpu", "samples_per_second", "mfu", "peak_memory_gib",
    "step_seconds", "predicted_memory_gib", "predicted_step_seconds", "result",
}  # fmt: skip
GOOD, BAD = "green", "red"


class Screen:
    """Progress towards `total` rows (0: nobody knows how many); a context. stdout is left to --json."""

    def __init__(self, title: str, total: int) -> None:
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.title, self.total = title, total
        self.rows: list[Row] = []
        self.now: dict[str, str] = {}  # where each cell that runs stands
        self._began: dict[str, float] = {}
        self._live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self.now.clear()
            self._live.update(self._table())
            self._live.stop()

    def begin(self, cell: Cell) -> None:
        """A cell starts."""
        self._began[cell.name] = time.monotonic()
        self.progress(cell, None)
        if self._live is None:
            self._say(f"... {cell.name}: {cell.steps} steps on {cell.gpus} process{'es' if cell.gpus > 1 else ''}")

    def progress(self, cell: Cell, line: dict[str, Any] | None) -> None:
        """Where it stands; `line`: its newest of metrics.jsonl."""
        if self._live is None:
            return
        seconds = time.monotonic() - self._began[cell.name]
        step = f"step {line['step']}/{cell.steps}" if line else "starting"
        self.now[cell.name] = f"{cell.name}: {step}, {seconds:.0f} s of {cell.setting.time_limit_seconds:g}"
        self._live.update(self._table())

    def done(self, row: Row, *, kept: bool) -> None:
        """A row is there."""
        self.rows.append(row)
        self.now.pop(row["name"], None)
        if self._live is not None:
            self._live.update(self._table())
        else:
            count = f"{len(self.rows)}/{self.total} " if self.total else ""
            self._say(f"{count}{one_line(row)}{' (kept)' if kept else ''}")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False)
        sys.stderr.flush()

    def _table(self) -> Table:
        table = rich_table(self.title, self.rows, [column for column in COLUMNS if column.key in SHOWN])
        if self.now:
            now = "\n".join(self.now.values())
            table.caption = f"{len(self.rows)} of {self.total}; {now}" if self.total else now
        return table


def one_line(row: Row) -> str:
    """A row as a line of a log."""
    row = shown([row])[0]
    parts = [f"{row['name']}: {row['result']}"]
    words = (("tokens_per_second_per_gpu", "tokens/s/GPU"), ("mfu", "MFU"), ("peak_memory_gib", "GiB"))
    columns = {column.key: column for column in COLUMNS}
    for key, unit in words:
        if row.get(key) is not None:
            parts.append(f"{columns[key].of(row)} {unit}")
    return ", ".join(parts)


def rich_table(title: str, rows: list[Row], columns: list[Column]) -> Table:
    """Rows for a terminal."""
    everything = shown(rows)
    table = Table(
        title=title, title_justify="left", box=None, header_style="bold", padding=(0, 1), caption_justify="left"
    )
    chosen = used(columns, everything) or columns[:1]
    for column in chosen:
        table.add_column(column.head, justify="right" if column.right else "left", no_wrap=column.right)
    for row in everything:
        style = {"ok": None, "oom": "yellow"}.get(row["status"], BAD)
        table.add_row(*(column.of(row) for column in chosen), style=style)
    return table
