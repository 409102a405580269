"""Every file that a benchmark writes can be read by what reads such files."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser
from typing import Any

import pytest

from trainwright.bench.page import write_all
from trainwright.bench.table import csv_text, gib, markdown, result, significant

OK: dict[str, Any] = {
    "name": "a | b", "status": "ok", "model": "llama", "task": "lora", "precision": "bf16", "seq_len": 8192, "gpus": 1,
    "micro_batch_size": 2, "accumulation": 1, "layout": "TP1PP1DP1", "recompute": "none", "device": "H200",
    "tokens_per_second_per_gpu": 12345.678, "samples_per_second": 1.507, "seconds_per_sample": 0.6636, "mfu": 0.5123,
    "tflops": 506.9, "peak_memory_gib": 61.25, "step_seconds": 1.327, "step_seconds_spread": 0.0123, "loss": 9.87654,
    "predicted_memory_gib": 60.0, "memory_error": -0.0204, "missed": [], "aligned": True,
    "alignment": {"with": "b", "mean_relative_difference": 0.000123},
    "beside": {"system": "X", "device": "A100-80", "gpus": 8, "mfu": 0.4, "speed_ratio": 2.0, "mfu_ratio": 1.28},
}  # fmt: skip
OOM: dict[str, Any] = {
    "name": "b", "status": "oom", "model": "llama", "gpus": 1, "log": ["Traceback <b>"],
    "line": "out of memory in loss",
    "oom": {"phase": "backward", "short_gib": 1.234},
}  # fmt: skip
FOUND: dict[str, Any] = {
    **OK, "name": "c", "beside": None,
    "find": {"what": "max_seq_len", "limit": 65536, "next": 66560, "next_short_gib": 0.0031, "next_phase": "loss"},
}  # fmt: skip
CRASH: dict[str, Any] = {"name": "d", "status": "crashed", "gpus": 2, "line": "ended by SIGKILL"}
RESULTS = {"title": "A title", "trainwright": "0.1.0", "devices": ["H200"], "rows": [OK, OOM, FOUND, CRASH]}


def parse(text: str) -> list[list[str]]:
    """The rows of the first Markdown table."""
    lines = [line for line in text.split("\n\n")[1].splitlines() if line.startswith("|")]
    rows = [line.strip("|").replace("\\|", "\0").split("|") for line in lines]
    return [[cell.strip().replace("\0", "|") for cell in row] for row in rows]


def test_markdown():
    text = markdown("A title", RESULTS["rows"])
    heads, rules, *rows = parse(text)
    assert len({len(row) for row in (heads, rules, *rows)}) == 1
    first = dict(zip(heads, rows[0], strict=True))
    assert first["row"] == "a | b"
    assert (first["length"], first["tokens/s/GPU"], first["MFU"]) == ("8,192", "12,346", "51.2%")
    assert (first["GiB"], first["loss"], first["aligned"], first["error"]) == ("61.2", "9.8765", "yes", "-2.0%")
    assert first["losses apart"] == "0.012%"
    results = [dict(zip(heads, row, strict=True))["result"] for row in rows]
    assert results == ["ok", "OOM in backward, 1.23 GiB short", "ok", "crashed: ended by SIGKILL"]
    assert "| a \\| b | X | A100-80 | 8 |" in text
    assert "## Side by side" in text
    assert "| c | max_seq_len | 65,536 |" in text
    assert "| 66,560 | 0.0031 | loss |" in text
    assert "HFU" not in text  # no row has it


def test_csv_has_every_figure_unrounded():
    rows = list(csv.DictReader(io.StringIO(csv_text(RESULTS["rows"]))))
    assert float(rows[0]["tokens_per_second_per_gpu"]) == 12345.678
    assert float(rows[0]["beside.mfu_ratio"]) == 1.28
    assert rows[1]["oom.phase"] == "backward"
    assert rows[1]["mfu"] == ""
    assert [row["name"] for row in rows] == ["a | b", "b", "c", "d"]


class Page(HTMLParser):
    """Which tags stand open, and everything that would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "img", "!doctype"):
            self.open.append(tag)
        self.fetched += [value for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_all_files(tmp_path):
    from matplotlib import image

    files = write_all(tmp_path, RESULTS)
    assert {file.name for file in files} == {
        "results.json", "table.md", "table.csv", "speed.png", "mfu.png", "memory.png", "step.png", "index.html",
    }  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text()) == RESULTS
    for file in tmp_path.glob("*.png"):
        assert image.imread(file).shape[2] == 4
    page = Page()
    page.feed((tmp_path / "index.html").read_text())
    assert page.open == []
    assert len(page.fetched) == 4
    assert all(item.startswith("data:image/png;base64,") for item in page.fetched)
    assert "OOM in backward, 1.23 GiB short" in page.words
    assert "Traceback <b>" in page.words  # escaped on the way
    assert not list(tmp_path.glob("*.partial"))


def test_a_figure_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        write_all(tmp_path, {**RESULTS, "rows": [{**OK, "loss": float("nan")}]})


def test_numbers():
    digits = significant(4)
    assert [digits(value) for value in (12345.6, 1234.4, 0.00012346, 2.0, 0.1)] == [
        "12,346", "1,234", "0.0001235", "2", "0.1",
    ]  # fmt: skip
    assert [gib(value) for value in (123.45, 9.876, 0.0031)] == ["123.5", "9.88", "0.0031"]
    assert result({"status": "timeout", "line": "ended at its time limit"}) == "timeout: ended at its time limit"
