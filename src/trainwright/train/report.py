"""report.html and loss.png: a run on one page that needs nothing else, made from the run's folder alone.

Owns the page and the picture. The template is `report.html.jinja`; the figures are those of metrics.jsonl,
evaluation.jsonl and answers.json, so a report can be made again at any time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jinja2

from trainwright.train.metrics import read_lines
from trainwright.train.run import RunFolder

TEMPLATE = Path(__file__).with_name("report.html.jinja")
WIDTH, HEIGHT, LEFT, BOTTOM = 860, 300, 58, 30  # the curve's picture, in its own units
POINTS = 1500  # a longer curve is thinned for the page; metrics.jsonl keeps all


def write_report(folder: RunFolder) -> Path:
    """Writes report.html and loss.png of a run's folder and returns the page's path."""
    steps = [line for line in read_lines(folder.metrics) if line.get("loss") is not None]
    evaluations = [line for line in read_lines(folder.evaluations) if line.get("loss") is not None]
    draw_loss(folder.path / "loss.png", steps, evaluations, folder.path.name)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=folder.path.name,
        summary=_summary(steps, evaluations),
        curve=_curve(steps, evaluations),
        table=_table(steps),
        evaluations=evaluations,
        answers=_answers(folder.answers),
        planned=_planned(folder.path / "planned.json"),
        environment=_read_json(folder.path / "environment.json"),
        recipe=(folder.path / "recipe.yaml").read_text(encoding="utf-8"),
    )
    target = folder.path / "report.html"
    target.write_text(page, encoding="utf-8")
    return target


def draw_loss(path: Path, steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], title: str) -> None:
    """The loss of training and of the held-out split over steps, as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy: only when a run ends
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], color="#9db4d6", linewidth=1, label="step")
    smooth = smoothed([s["loss"] for s in steps])
    axes.plot([s["step"] for s in steps], smooth, color="#1f4e9c", linewidth=1.8, label="smoothed")
    if evaluations:
        axes.plot(
            [e["step"] for e in evaluations], [e["loss"] for e in evaluations], "o-", color="#c2571a", label="held-out"
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)


def smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the pull of its start (as Adam corrects its moments)."""
    result, average, total = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append(average / total)
    return result


@dataclass(frozen=True)
class Curve:
    """Polylines and ticks of the loss in the page's own picture."""

    width: int
    height: int
    steps: str
    smooth: str
    held_out: list[tuple[float, float, str]]
    horizontal: list[tuple[float, str]]
    vertical: list[tuple[float, str]]


def _curve(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> Curve | None:
    if not steps:
        return None
    losses = [s["loss"] for s in steps] + [e["loss"] for e in evaluations]
    low, high = min(losses), max(losses)
    low, high = (low - 0.5, high + 0.5) if high == low else (low, high)
    first, last = min([steps[0]["step"], *(e["step"] for e in evaluations)]), max(steps[-1]["step"], 1)

    def place(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - 8) * (step - first) / max(last - first, 1)
        return round(x, 1), round(8 + (HEIGHT - BOTTOM - 8) * (high - loss) / (high - low), 1)

    def line(values: list[float]) -> str:
        stride = max(1, len(steps) // POINTS)
        chosen = [*range(0, len(steps), stride), len(steps) - 1]
        return " ".join("{},{}".format(*place(steps[at]["step"], values[at])) for at in chosen)

    return Curve(
        WIDTH,
        HEIGHT,
        line([s["loss"] for s in steps]),
        line(smoothed([s["loss"] for s in steps])),
        [(*place(e["step"], e["loss"]), f"step {e['step']}: held-out loss {e['loss']:.4f}") for e in evaluations],
        [(place(first, low + (high - low) * k / 4)[1], f"{low + (high - low) * k / 4:.3g}") for k in range(5)],
        [(place(first + (last - first) * k / 5, low)[0], f"{first + (last - first) * k / 5:.0f}") for k in range(6)],
    )


def _summary(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The figures that one looks for first."""
    if not steps:
        return []
    last, settled = steps[-1], steps[len(steps) // 5 :]
    rows = [("steps", f"{last['step']:,}"), ("loss", f"{last['loss']:.4f}"), ("tokens", f"{last['tokens']:,}")]
    if evaluations:
        rows.append(("held-out loss", f"{evaluations[0]['loss']:.4f} → {evaluations[-1]['loss']:.4f}"))
    rows.append(("tokens/s/GPU", f"{median(s['tokens_per_second_per_gpu'] for s in settled):,.0f}"))
    if last.get("mfu") is not None:
        rows.append(("MFU", f"{median(s['mfu'] for s in settled):.1%}"))
    if last.get("peak_memory_gib") is not None:
        rows.append(("peak memory", f"{last['peak_memory_gib']:.2f} GiB"))
    return rows


def _table(steps: list[dict[str, Any]], rows: int = 12) -> list[dict[str, Any]]:
    """Some steps, evenly spread, the first and the last among them."""
    if len(steps) <= rows:
        return steps
    return [steps[round(k * (len(steps) - 1) / (rows - 1))] for k in range(rows)]


def _planned(path: Path) -> dict[str, Any]:
    """What the planner said before the run beside what it took (`planned.py`)."""
    found = _read_json(path)
    rows = []
    for what, unit, key, error in (
        ("peak memory", "GiB", "peak_memory_gib", "memory"),
        ("a step", "s", "step_seconds", "time"),
    ):
        taken, planned = found.get(key), found.get(f"predicted_{key.removeprefix('peak_')}")
        if taken is not None and planned is not None:
            rows.append((what, f"{planned:.3g} {unit}", f"{taken:.3g} {unit}", f"{found[error + '_error']:+.1%}"))
    return {"rows": rows, "missed": found.get("missed", []) if rows else []}


def _answers(path: Path) -> dict[str, Any]:
    """Questions side by side with what was said before and after."""
    found = _read_json(path)
    before, after = found.get("before", {}), found.get("after", {})
    said = {answer["question"]: answer["given"] for answer in before.get("answers", [])}
    pairs = [{**answer, "before": said.get(answer["question"], "")} for answer in after.get("answers", [])]
    return {"pairs": pairs[:50], "before": before.get("exact_match"), "after": after.get("exact_match")}


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found
