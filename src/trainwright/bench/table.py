"""Rows as tables: Markdown and CSV, with the columns of DESIGN section 6. No torch.

Owns which columns there are, their heads and their rounding, for the terminal and the page too.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: what it reads of a row and how it says it. `text` gets the value, never None."""

    head: str
    key: str
    text: Callable[[Any], str] = str
    right: bool = True

    def of(self, row: Row) -> str:
        value: Any = row
        for part in self.key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return "" if value is None else self.text(value)


def significant(digits: int) -> Callable[[float], str]:
    """Numbers of so many digits, without an exponent; thousands have commas."""

    def text(value: float) -> str:
        if abs(value) >= min(1000, 10**digits):
            return f"{value:,.0f}"
        plain = format(Decimal(f"{value:.{digits}g}"), "f")
        return plain.rstrip("0").rstrip(".") if "." in plain else plain

    return text


def percent(value: float) -> str:
    return f"{value:.1%}"


def signed(value: float) -> str:
    return f"{value:+.1%}"


def gib(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else significant(2)(value)


def yes(value: bool) -> str:
    return "yes" if value else "NO"


COLUMNS = (
    Column("row", "name", right=False),
    Column("model", "model", right=False),
    Column("task", "task", right=False),
    Column("type", "precision", right=False),
    Column("length", "seq_len", "{:,}".format),
    Column("micro batch", "micro_batch_size"),
    Column("accumulation", "accumulation"),
    Column("GPUs", "gpus"),
    Column("layout", "layout", right=False),
    Column("recompute", "recompute", right=False),
    Column("tokens/s/GPU", "tokens_per_second_per_gpu", significant(4)),
    Column("samples/s", "samples_per_second", significant(4)),
    Column("s/sample", "seconds_per_sample", significant(4)),
    Column("TFLOPs", "tflops", significant(3)),
    Column("MFU", "mfu", percent),
    Column("MFU causal", "mfu_causal", percent),
    Column("HFU", "hfu", percent),
    Column("GiB", "peak_memory_gib", gib),
    Column("reserved GiB", "reserved_memory_gib", gib),
    Column("cap GiB", "memory_cap_gib", gib),
    Column("loss", "loss", "{:.4f}".format),
    Column("aligned", "aligned", yes),
    Column("losses apart", "alignment.mean_relative_difference", "{:.3%}".format),
    Column("step s", "step_seconds", significant(4)),
    Column("± s", "step_seconds_spread", significant(2)),
    Column("planned GiB", "predicted_memory_gib", gib),
    Column("error", "memory_error", signed),
    Column("planned step s", "predicted_step_seconds", significant(4)),
    Column("error", "time_error", signed),
    Column("result", "result", right=False),
    Column("note", "note", right=False),
)

BESIDE = (
    Column("row", "name", right=False),
    Column("beside", "beside.system", right=False),
    Column("its card", "beside.device", right=False),
    Column("GPUs", "beside.gpus"),
    Column("tokens/s/GPU", "beside.tokens_per_second_per_gpu", significant(4)),
    Column("samples/s", "beside.samples_per_second", significant(4)),
    Column("MFU", "beside.mfu", percent),
    Column("GiB", "beside.peak_memory_gib", gib),
    Column("our card", "device", right=False),
    Column("GPUs", "gpus"),
    Column("ours, tokens/s/GPU", "tokens_per_second_per_gpu", significant(4)),
    Column("MFU", "mfu", percent),
    Column("GiB", "peak_memory_gib", gib),
    Column("speed, ours / theirs", "beside.speed_ratio", significant(3)),
    Column("per peak TFLOP, ours / theirs", "beside.mfu_ratio", significant(3)),
    Column("TFLOPs as they count, theirs", "beside.own_tflops", significant(4)),
    Column("ours", "beside.ours_own_tflops", significant(4)),
    Column("result", "result", right=False),
    Column("note", "note", right=False),
)

LIMITS = (
    Column("row", "name", right=False),
    Column("what", "find.what", right=False),
    Column("limit", "find.limit", "{:,}".format),
    Column("planned", "find.planned", "{:,}".format),
    Column("GiB there", "peak_memory_gib", gib),
    Column("reserved GiB", "reserved_memory_gib", gib),
    Column("cap GiB", "memory_cap_gib", gib),
    Column("next tried", "find.next", "{:,}".format),
    Column("it lacked GiB", "find.next_short_gib", gib),
    Column("in", "find.next_phase", right=False),
    Column("tokens/s/GPU there", "tokens_per_second_per_gpu", significant(4)),
    Column("result", "result", right=False),
)


def result(row: Row) -> str:
    """How a row ended, in a few words."""
    if row.get("find", {}).get("line"):
        return str(row["find"]["line"])
    status = str(row["status"])
    if status == "oom":
        told = row.get("oom") or {}
        short = f", {gib(told['short_gib'])} GiB short" if told.get("short_gib") else ""
        return f"OOM in {told.get('phase', 'unknown')}{short}"
    return status if status in ("ok", "waiting") else f"{status}: {row.get('line', '')}".rstrip(": ")


def shown(rows: Sequence[Row]) -> list[Row]:
    """The rows with what tables compute."""
    return [{**row, "result": result(row)} for row in rows]


def used(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """The columns that say something."""
    return [column for column in columns if any(column.of(row) for row in rows)]


def tables(rows: Sequence[Row]) -> list[tuple[str, list[Column], list[Row]]]:
    """(head, columns, rows) of every table that these rows make."""
    everything = shown(rows)
    found = [row for row in everything if row.get("find")]
    beside = [row for row in everything if row.get("beside")]
    parts = [("", COLUMNS, everything), ("Limits", LIMITS, found), ("Side by side", BESIDE, beside)]
    return [(head, used(columns, part), part) for head, columns, part in parts if part]


def markdown_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """One GitHub table."""
    heads = " | ".join(column.head for column in columns)
    rules = " | ".join("---:" if column.right else "---" for column in columns)
    lines = [" | ".join(_cell(column.of(row)) for column in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in (heads, rules, *lines)) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def markdown(title: str, rows: Sequence[Row]) -> str:
    """All tables of a benchmark under their title."""
    parts = [f"# {title}\n"]
    for head, columns, part in tables(rows):
        parts.append((f"## {head}\n\n" if head else "") + markdown_table(columns, part))
    return "\n".join(parts)


def csv_text(rows: Sequence[Row]) -> str:
    """Every figure of every row, unrounded; what is nested has dotted heads, lists are left to JSON."""
    flat = [_flat(row) for row in shown(rows)]
    heads = list(dict.fromkeys(key for row in flat for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, heads, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(values: Row, prefix: str = "") -> Row:
    flat: Row = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            flat[f"{prefix}{key}"] = "" if value is None else value
    return flat
