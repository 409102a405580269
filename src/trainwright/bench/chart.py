"""PNG charts of a benchmark: speed, and memory, a bar a row; theirs beside ours where there is one. No torch.

Owns what is drawn. matplotlib is imported when something is.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
OURS, THEIRS, PLANNED = "#1f4e9c", "#c2571a", "#8a94a3"


@dataclass(frozen=True)
class Chart:
    """One picture: its file's name, its head, and where its values are in a row (None: no such bars)."""

    name: str
    head: str
    unit: str
    ours: str
    theirs: str | None
    planned: str | None
    scale: float = 1.0


CHARTS = (
    Chart("speed", "Speed", "tokens/s/GPU", "tokens_per_second_per_gpu", "tokens_per_second_per_gpu", None),
    Chart("mfu", "Speed per peak FLOP", "MFU, %", "mfu", "mfu", None, 100.0),
    Chart("memory", "Peak memory", "GiB", "peak_memory_gib", "peak_memory_gib", "predicted_memory_gib"),
    Chart("step", "A step", "seconds", "step_seconds", None, "predicted_step_seconds"),
)


def charts(title: str, rows: Sequence[Row]) -> dict[str, bytes]:
    """The PNG files, by name; none for figures that no row has."""
    return {
        f"{chart.name}.png": draw(title, chart, rows) for chart in CHARTS if any(row.get(chart.ours) for row in rows)
    }


def draw(title: str, chart: Chart, rows: Sequence[Row]) -> bytes:
    """One picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = [("ours", OURS, [_scaled(row.get(chart.ours), chart) for row in rows])]
    if chart.theirs is not None:
        series.append(("beside", THEIRS, [_scaled((row.get("beside") or {}).get(chart.theirs), chart) for row in rows]))
    if chart.planned is not None:
        series.append(("planned", PLANNED, [_scaled(row.get(chart.planned), chart) for row in rows]))
    series = [each for each in series if any(value is not None for value in each[2])]
    figure = Figure(figsize=(9, 1.2 + 0.24 * len(rows) * len(series) + 0.2 * len(rows)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    thick = 0.8 / len(series)
    for number, (label, colour, values) in enumerate(series):
        places = [index + (number - (len(series) - 1) / 2) * thick for index in range(len(rows))]
        bars = axes.barh(places, [value or 0.0 for value in values], thick, color=colour, label=label)
        axes.bar_label(bars, ["" if value is None else f"{value:.4g}" for value in values], fontsize=7, padding=2)
    for index, row in enumerate(rows):
        if row["status"] == "oom":
            axes.text(0, index, " out of memory", va="center", fontsize=8, color="#b42318")
    axes.set_yticks(range(len(rows)), [str(row["name"]) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel=chart.unit, title=f"{title}: {chart.head.lower()}")
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.25)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _scaled(value: float | None, chart: Chart) -> float | None:
    return None if value is None else value * chart.scale
