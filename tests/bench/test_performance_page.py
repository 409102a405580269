"""docs/performance.md shows what is kept, and what is kept shows nothing of a machine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from trainwright.bench.matrix import matrix_names

SCRIPT = Path(__file__).parents[2] / "docs" / "performance.py"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as python does for the folder of a script that it runs
    spec = importlib.util.spec_from_file_location("performance_page", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.RESULTS, module.PAGE = tmp_path / "results", tmp_path / "performance.md"
    tables = "\nbetween\n".join(f"{module.BEGIN.format(name)}old\n{module.END}" for name in ("measured", "speed"))
    module.PAGE.write_text(f"before\n\n{tables}\nafter\n")
    return module


def row(name: str, ratio: float | None, note: str = "") -> dict[str, Any]:
    beside = {"system": "X", "device": "A100-80", "gpus": 8, "mfu": 0.4, "mfu_ratio": ratio}
    return {
        "name": name, "status": "ok", "gpus": 4, "device": "H200", "torch": "2.11.0", "mfu": 0.5, "note": note,
        "tokens_per_second_per_gpu": 9876.5, "beside": beside, "log": ["/root/x/y.py: line 3"],
        "line": "crash in /work/place/run/ranks/rank.txt",
    }  # fmt: skip


def test_what_is_kept_is_shown(script, tmp_path):
    name = next(name for name in matrix_names() if not name.startswith("planner_"))
    rows = [row("one", 1.25), row("two", 0.9, "a smaller batch"), row("three", 0.8)]
    results = {"title": "A title", "rows": rows, "counts": {"source": "A document", "speed": "tokens"}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert script.keep(tmp_path, name) == script.RESULTS / f"{name}.json"
    text = (script.RESULTS / f"{name}.json").read_text()
    assert not any(word in text for word in ("/work", "/root", '"log"'))
    assert "crash in rank.txt" in text
    page = script.page(script.PAGE.read_text())
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "old" not in page
    assert f"### A title\n\n`trainwright bench {name}` on H200, torch 2.11.0." in page
    assert "Per peak TFLOP ours is 0.80 to 1.25 times theirs; not higher: two (a smaller batch); three (NO R" in page
    assert "Beside: A document. Speed: tokens." in page
    assert "| one | 4 | 9,876 | 50.0% | ok |" in page
    assert script.page(page) == page  # made anew, it stays


def test_runs_of_the_speed_table_are_kept_one_after_the_other(script, tmp_path):
    """A ratio is to the best peer of the same run; lines that failed and kernels are left out."""
    script.RESULTS.mkdir()
    kept, given = script.RESULTS / "speed_x.json", tmp_path / "out.json"
    kept.write_text(
        json.dumps({"title": "A table", "device": "H200", "torch": "2.11", "lines": [line(1, "titan", 500)]})
    )
    ours = {**line(0, "ours", 1100), "causal_flops_per_token": 9.895e11, "kernels": [[1.0, 1, "k"]]}
    given.write_text(
        json.dumps([line(0, "titan", 1000), ours, {"row": "bf16", "side": "ours", "who": "x", "error": "y"}])
    )
    assert script.keep_speed(given, "speed_x") == kept
    lines = json.loads(kept.read_text())["lines"]
    assert [(each["run"], each["side"]) for each in lines] == [(1, "titan"), (2, "titan"), (2, "ours")]
    assert not any("kernels" in each for each in lines)
    page = script.page(script.PAGE.read_text())
    assert "A table, torch 2.11:\n\n| row | run |" in page
    assert "| bf16 | 2 | who | 1,100 | 1.100 | 110.0% | 2.000 | 3.0 |" in page
    assert "| bf16 | 1 | torchtitan: who | 500 |  | 50.0% | 2.000 | 3.0 |" in page
    kept.write_text(json.dumps({"title": "B", "device": "H200", "torch": "2.11", "lines": [line(1, "peer", 500)]}))
    assert "| bf16 | 1 | who | 500 |  |" in script.page(script.PAGE.read_text())  # another peer's name says whose it is


def line(run: int, side: str, rate: float) -> dict[str, Any]:
    found = {"tokens_per_second_per_gpu": rate, "step_seconds": 2.0, "peak_memory_gib": 3.0}
    return {"run": run, "row": "bf16", "side": side, "who": "who", "words": "", "gpus": 4, **found}


def test_a_stale_page_is_refused(script, monkeypatch):
    monkeypatch.setattr("sys.argv", ["performance.py", "--check"])
    with pytest.raises(SystemExit, match="is stale"):
        script.main()
    monkeypatch.setattr("sys.argv", ["performance.py"])
    script.main()
    monkeypatch.setattr("sys.argv", ["performance.py", "--check"])
    script.main()
    assert script.PAGE.read_text().count("No result is kept yet.") == 2
    with pytest.raises(SystemExit, match="no shipped matrix"):
        script.keep(Path("x"), "no_such")
