"""The command line answers at once, and a user's mistake is one line and exit status 2."""

import json
import math
import resource
import subprocess
import sys

import pytest

VERBS = [
    [],
    ["recipes"],
    ["models"],
    ["plan"],
    ["prepare"],
    ["train"],
    ["convert"],
    ["generate"],
    ["chat"],
    ["align"],
    ["doctor"],
]


def run(*words: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "trainwright", *words], capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize("verb", VERBS, ids=lambda words: " ".join(words) or "trainwright")
def test_help_is_instant(verb):
    """Under 0.4 s of processor time: what it takes on a machine that has nothing else to do, so one of a few tries."""
    seconds = [math.inf]
    while min(seconds) >= 0.4 and len(seconds) <= 10:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run(*verb, "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
        assert "Usage" in done.stdout
    assert min(seconds) < 0.4


@pytest.mark.parametrize("verb", VERBS, ids=lambda words: " ".join(words) or "trainwright")
def test_help_imports_nothing_heavy(verb):
    code = f"""
import atexit, sys
sys.argv = ["trainwright", *{verb!r}, "--help"]
heavy = {{"torch", "numpy", "transformers", "matplotlib"}}
atexit.register(lambda: print("HEAVY", sorted(heavy & set(sys.modules))))
from trainwright.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "quikstart"], "did you mean quickstart?"),
        (["train", "quickstart", "train.step=3"], "did you mean steps?"),
        (["train", "quickstart", "train.steps=-1"], "train.steps=-1"),
        (["recipes", "show", "nothing/here"], "no recipe nothing/here"),
        (["train", "smollm2_135m/sft", "model.path=/nonexistent"], "/nonexistent"),
    ],
)
def test_mistakes_get_one_line_and_status_2(words, message, tmp_path):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("trainwright: ")
    assert done.stderr.count("\n") == 1


def test_recipes_as_json():
    names = [row["name"] for row in json.loads(run("recipes", "--json").stdout)]
    assert "quickstart" in names


def test_show_prints_a_recipe_that_trains_the_same(tmp_path):
    (tmp_path / "shown.yaml").write_text(run("recipes", "show", "quickstart").stdout, encoding="utf-8")
    again = run("recipes", "show", "shown.yaml", cwd=tmp_path).stdout
    assert again == (tmp_path / "shown.yaml").read_text(encoding="utf-8")


def test_copy_never_overwrites(tmp_path):
    assert run("recipes", "copy", "quickstart", "mine.yaml", cwd=tmp_path).returncode == 0
    assert "yaml-language-server" in (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    assert run("recipes", "show", "mine.yaml", cwd=tmp_path).returncode == 0
    done = run("recipes", "copy", "quickstart", "mine.yaml", cwd=tmp_path)
    assert (done.returncode, "exists" in done.stderr) == (2, True)
