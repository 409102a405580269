"""The commands of docs/planner.md do what it says."""

import os
import re
import shlex
import subprocess
from pathlib import Path

from typer.testing import CliRunner

from tests.warm import python
from trainwright.cli import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planner.md"


def commands() -> list[list[str]]:
    block = re.search(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block
    return [shlex.split(line, comments=True)[1:] for line in block[1].splitlines()]


def test_every_plan_of_the_page_fits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plans = [words for words in commands() if words[0] == "plan"]
    assert len(plans) >= 4
    for words in plans:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.output, result.exception)
    assert (tmp_path / "best.yaml").exists()


def test_the_card_is_measured_as_the_page_says(tmp_path):
    words = next(words for words in commands() if words[0] == "doctor")
    environment = {**os.environ, "TRAINWRIGHT_CALIBRATION": str(tmp_path), "TRAINWRIGHT_DEVICE": "cpu"}
    done = subprocess.run([python(), "-m", "trainwright", *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cpu.yaml").exists()
