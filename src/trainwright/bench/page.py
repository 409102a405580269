"""A benchmark on one HTML page that needs nothing else: every table, every chart, the reasons of what did not run.

Owns the page; its template is `page.html.jinja`. No torch.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from trainwright.bench.table import Row, csv_text, markdown, shown, tables
from trainwright.store import write_bytes, write_json, write_text

TEMPLATE = Path(__file__).with_name("page.html.jinja")
CONVENTIONS = (
    "TFLOPs and MFU are of one GPU, model FLOPs after PaLM: 6N + 12 L h s a token, frozen weights without their weight "
    "gradient, over the card's dense peak.",
    "MFU causal counts what a causal step must really do: the head but not the token table, half of the scores.",
    "HFU adds what is computed again.",
    "GiB is the fullest rank's peak of allocated memory; on a CPU it is the process's resident peak.",
    "Speed is that of the median measured step; ± is the middle half of the steps.",
)


def page(title: str, results: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The whole page as text."""
    rows: Sequence[Row] = results["rows"]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        devices=results.get("devices") or [],
        version=results.get("trainwright", ""),
        tables=[(head, columns, part) for head, columns, part in tables(rows)],
        pictures=[(name, base64.b64encode(content).decode()) for name, content in pictures.items()],
        conventions=CONVENTIONS,
        reasons=[row for row in shown(rows) if row.get("line") or row.get("missed")],
        counts=results.get("counts") or {},
    )


def write_all(folder: Path, results: Mapping[str, Any]) -> list[Path]:
    """results.json, table.md, table.csv, the charts and index.html; returns their paths."""
    from trainwright.bench.chart import charts

    title, rows = results["title"], results["rows"]
    pictures = charts(title, rows)
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", markdown(title, rows))
    write_text(folder / "table.csv", csv_text(rows))
    for name, content in pictures.items():
        write_bytes(folder / name, content)
    write_text(folder / "index.html", page(title, results, pictures))
    return [folder / name for name in ("results.json", "table.md", "table.csv", *pictures, "index.html")]
