"""`trainwright align`: reads every form of a loss curve, and says 1 when the curves part."""

import json
import math
import subprocess
import sys

import pytest

from trainwright.bench.align import align, read_losses
from trainwright.errors import UserError

LOSSES = [4.0 / (1 + step / 10) for step in range(40)]


def write(folder, name, losses):
    file = folder / name
    if name.endswith(".jsonl"):
        rows = [{"step": s, "loss": x} for s, x in enumerate(losses, 1)] + [{"step": 20, "validation_loss": 9.0}]
        file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    elif name == "list.json":
        file.write_text(json.dumps(losses))
    elif name == "rows.json":
        file.write_text(json.dumps([{"iteration": s, "train_loss": x} for s, x in enumerate(losses, 1)]))
    elif name == "columns.json":
        file.write_text(json.dumps({"loss": losses}))
    elif name == "steps.json":
        file.write_text(json.dumps({str(s): x for s, x in enumerate(losses, 1)}))
    elif name == "header.csv":
        file.write_text("Step,lr,Loss\n" + "".join(f"{s},1e-3,{x}\n" for s, x in enumerate(losses, 1)))
    elif name == "pairs.csv":
        file.write_text("".join(f"{s},{x}\n" for s, x in enumerate(losses, 1)))
    else:
        file.write_text("# a comment\n" + "".join(f"{x}\n" for x in losses))
    return file


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "list.json", "rows.json", "columns.json", "steps.json", "header.csv", "pairs.csv", "plain.txt"],
)
def test_every_form_reads_the_same(tmp_path, name):
    assert read_losses(write(tmp_path, name, LOSSES)) == pytest.approx(dict(enumerate(LOSSES, 1)))


def test_a_run_folder_and_a_resumed_run(tmp_path):
    write(tmp_path, "metrics.jsonl", LOSSES)
    assert len(read_losses(tmp_path)) == 40
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 40, "loss": 1.5}) + "\n")
    assert read_losses(tmp_path)[40] == 1.5


def test_the_mean_counts_from_the_step_on(tmp_path):
    """Before step 21 the curves may be anything."""
    reference = write(tmp_path, "list.json", LOSSES)
    ours = write(tmp_path, "plain.txt", [9.0] * 20 + [1.01 * x for x in LOSSES[20:]])
    found = align(ours, reference)
    assert (found.aligned, found.steps, found.from_step, found.last_step) == (True, 20, 21, 40)
    assert found.mean_relative_difference == pytest.approx(0.01)
    assert not align(ours, reference, tolerance=0.0099).aligned
    assert not align(ours, reference, from_step=20).aligned


def test_the_difference_is_of_single_losses_not_of_means(tmp_path):
    wobble = [x * (1.1 if step % 2 else 0.9) for step, x in enumerate(LOSSES)]
    found = align(write(tmp_path, "plain.txt", wobble), write(tmp_path, "list.json", LOSSES))
    assert found.mean_relative_difference == pytest.approx(0.1)


def test_nan_never_agrees(tmp_path):
    broken = write(tmp_path, "plain.txt", [*LOSSES[:30], math.nan, *LOSSES[31:]])
    found = align(broken, write(tmp_path, "list.json", LOSSES))
    assert not found.aligned
    assert json.loads(json.dumps(found.as_dict()))["mean_relative_difference"] is None
    assert not align(broken, broken).aligned


def test_a_step_that_training_skipped_is_nan(tmp_path):
    """JSON has no NaN: metrics.jsonl says null and that the step was skipped."""
    write(tmp_path, "metrics.jsonl", LOSSES)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 30, "loss": None, "grad_norm": None, "skipped": True}) + "\n")
    found = align(tmp_path, write(tmp_path, "list.json", LOSSES))
    assert (found.aligned, found.worst_step, found.steps) == (False, 30, 20)


def test_a_last_line_that_is_cut_off_is_left_out(tmp_path):
    """A run that goes on, or was killed, may be in the middle of a line."""
    write(tmp_path, "metrics.jsonl", LOSSES)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    assert list(read_losses(tmp_path)) == list(range(1, 41))


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "empty.txt", "holds no loss"),
        ("one\ntwo\n", "words.txt", "cannot be read as losses"),
        ("1,2,3\n", "three.csv", "cannot be read as losses"),
        ('{"a": [1]}', "odd.json", "cannot be read as losses"),
        ("[1.0, 2.0]", "short.json", "no step from 21 on"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, name, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        align(tmp_path / name, write(tmp_path, "list.json", LOSSES))


def test_exit_status(tmp_path):
    reference = write(tmp_path, "list.json", LOSSES)
    other = write(tmp_path, "plain.txt", [2 * x for x in LOSSES])

    def run(*words):
        command = [sys.executable, "-m", "trainwright", "align", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True)

    assert run(reference, reference).returncode == 0
    done = run(other, reference, "--json")
    assert (done.returncode, json.loads(done.stdout)["aligned"]) == (1, False)
    assert run(other, reference, "--tolerance", 2).returncode == 0
    assert (missing := run(tmp_path / "none", reference)).returncode == 2
    assert "is not there" in missing.stderr
