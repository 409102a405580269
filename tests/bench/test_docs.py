"""The commands of docs/benchmarks.md do what it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.warm import python
from trainwright.bench.matrix import Matrix, MatrixRow

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    name, content = re.findall(r"```yaml (\S+)\n(.*?)```", text, re.DOTALL)[0]
    (tmp_path / name).write_text(content)
    commands = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)[0].splitlines()
    places = {"TRAINWRIGHT_CACHE": str(tmp_path / "cache"), "TRAINWRIGHT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    said = {}
    for line in commands:
        words = shlex.split(line, comments=True)[1:]
        command = [python(), "-m", "trainwright", *words]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **places}, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stderr[-2000:]}"
        said[" ".join(words[1:])] = done
    rows = json.loads((tmp_path / "benches/mine/results.json").read_text())["rows"]
    names = ["one process micro_batch_size=2", "one process micro_batch_size=4", "two processes micro_batch_size=2"]
    assert [(row["name"], row["status"]) for row in rows] == [(name, "ok") for name in names]
    # the third run compares with the second's results, which are its own
    assert [row["beside"]["speed_ratio"] for row in rows] == [1, 1, 1]
    assert "3/3 two processes micro_batch_size=2: ok" in said["mine.yaml"].stderr
    only = said["mine.yaml --only one* --json"]
    assert only.stderr.count("(kept)") == 2
    assert len(json.loads(only.stdout)["rows"]) == 3
    found = json.loads((tmp_path / "benches/mine-max_micro_batch/results.json").read_text())["rows"]
    assert [(row["name"], row["find"]["limit"] > 0) for row in found] == [(names[0], True)]


def test_every_key_of_a_matrix_is_told():
    told = set(re.findall(r"`(\w+)`", PAGE.read_text(encoding="utf-8")))
    assert set(Matrix.model_fields) | set(MatrixRow.model_fields) <= told
