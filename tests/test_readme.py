"""The commands of README.md do what it says: each line of its list is run, shortened by overrides."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.warm import python

README = Path(__file__).resolve().parents[1] / "README.md"
SHORT = ["data.path=shipped:arithmetic?rows=300", "data.validation=0.1", "train.steps=2", "evaluation.generate=2"]
# A conversation needs a person (tests/test_chat.py), prove has tests of its own (tests/bench/test_prove.py), and two
# curves of two steps have nothing from step 21 on to compare (tests/bench/test_align.py).
ELSEWHERE = {"chat", "prove", "align"}


def commands() -> list[list[str]]:
    block = re.search(r"## What one does\n\n```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert block
    return [shlex.split(line, comments=True)[1:] for line in block[1].splitlines()]


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    verbs = {words[0] for words in commands()}
    assert {"recipes", "plan", "prepare", "train", *ELSEWHERE} <= verbs
    for number, words in enumerate(commands()):
        if words[0] in ELSEWHERE:
            continue
        extra = []
        if words[0] in ("train", "prepare"):
            extra = [*SHORT, f"data.cache={tmp_path / 'cache'}"]
        if words[0] == "train" and "--resume" not in words:
            extra.append(f"name=run-{number}")
        done = subprocess.run(
            [python(), "-m", "trainwright", *words, *extra], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"
