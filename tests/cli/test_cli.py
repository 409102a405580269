"""The command line answers at once, and a user's mistake is one line and exit status 2."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from trainwright.cli import app

TRIES = 4


def verbs(command=None, words=()):
    """Every verb and every verb below it, by its words."""
    command = command or get_command(app)
    yield list(words)
    for name, below in getattr(command, "commands", {}).items():
        yield from verbs(below, (*words, name))


VERBS = list(verbs())


def run(*words: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "trainwright", *words], capture_output=True, text=True, **kwargs)


HELP = """
import atexit, sys
sys.argv = ["trainwright", *{verb!r}, "--help"]
heavy = {{"torch", "numpy", "transformers", "trainwright.recipe.schema", "matplotlib"}}
atexit.register(lambda: print("HEAVY", sorted(heavy & set(sys.modules))))
from trainwright.cli import main
main()
"""


# What typer and rich take for the help of a program that does nothing: the measure on a machine whose cores are shared,
# where processor time too grows.
BARE = """
import sys, typer
sys.argv = ["bare", "one", "--help"]
app = typer.Typer()
@app.command()
def one(word: str, number: int = typer.Option(1, min=1, help="a number")): ...
@app.command()
def two(word: str): ...
app()
"""


def processor_seconds(code: str) -> tuple[float, str]:
    """What a Python program takes, and prints."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


@pytest.mark.parametrize("verb", VERBS, ids=lambda words: " ".join(words) or "trainwright")
def test_help_is_instant_and_imports_nothing_heavy(verb):
    """Under 0.4 s of processor time; on a busy machine, little more than a program that does nothing takes there."""
    tried = []
    while len(tried) < TRIES:
        seconds, printed = processor_seconds(HELP.format(verb=verb))
        assert "Usage" in printed
        assert "HEAVY []" in printed, printed
        if seconds < 0.4 or seconds < 1.5 * processor_seconds(BARE)[0]:
            return
        tried.append(seconds)
    pytest.fail(f"{' '.join(verb)} --help took {tried} seconds")


def test_all_verbs_are_found():
    assert ["train"] in VERBS
    assert ["convert", "merge"] in VERBS
    assert len(VERBS) > 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "quikstart"], "did you mean quickstart?"),
        (["train", "quickstart", "train.step=3"], "did you mean steps?"),
        (["train", "quickstart", "train.steps=-1"], "train.steps=-1"),
        (["recipes", "show", "nothing/here"], "no recipe nothing/here"),
        (["train", "smollm2_135m/sft", "model.path=/nonexistent"], "/nonexistent"),
        (["trane"], "No such command 'trane'"),
        (["train", "quickstart", "--gpus", "x"], "'--gpus'"),
        (["generate", "runs/none"], "'--prompt'"),
        (["recipes", "schema", "no/such/folder/x.json"], "no/such/folder/x.json: No such file or directory"),
        (["prepare", "quickstart", "data.path=nowhere.jsonl", "data.cache=cache"], "nowhere.jsonl does not exist"),
        (
            ["prepare", "quickstart", "--doctor", "model.overrides.vocab_size=200", "data.validation=0",
             "data.path=shipped:arithmetic?rows=9", "data.cache=cache"],
            "the data hold token id 261, the model's embedding has 200 rows",
        ),
    ],
)  # fmt: skip
def test_mistakes_get_one_line_and_status_2(words, message, tmp_path):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("trainwright: ")
    assert done.stderr.count("\n") == 1


def test_a_full_disk_is_one_line(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "trainwright", "models"], stdout=full, stderr=-1, text=True)
    assert (done.returncode, done.stderr) == (2, "trainwright: No space left on device\n")


def test_no_words_at_all_is_a_wish_for_help():
    done = run()
    assert (done.returncode, "Usage" in done.stdout + done.stderr) == (2, True)


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
    done = run("recipes", "schema", "mine.yaml", cwd=tmp_path)
    assert (done.returncode, "exists" in done.stderr) == (2, True)


def test_a_recipe_is_written_as_yaml_and_named_so(tmp_path):
    for words in (["copy", "quickstart", "mine.json"], ["import", "any.json", "--write", "mine.json"]):
        done = run("recipes", *words, cwd=tmp_path)
        assert (done.returncode, "name it mine.yaml" in done.stderr) == (2, True)
    assert not (tmp_path / "mine.json").exists()
