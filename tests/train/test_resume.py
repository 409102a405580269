"""A run that was killed with `kill -9` and resumed ends as the run that was not, bit for bit: losses and weights."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.warm import python

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Several killed runs, one that was left alone, and one that forgets its random numbers."""
    folder = tmp_path_factory.mktemp("killed")
    command = [python(), "-m", "tests.train.kill_runs", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_same(run, whole):
    assert [line[0] for line in run["lines"]] == list(range(1, 17))
    assert run["lines"] == whole["lines"]
    assert run["evaluations"] == whole["evaluations"]
    assert run["weights"] == whole["weights"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_runs_end_alike(runs, seed):
    run = runs[f"killed-{seed}"]
    assert run["kills"] >= 1
    check_same(run, runs["whole"])


def test_the_test_catches_stale_random_numbers(runs):
    """Mutant: resuming without putting the random number generators back."""
    assert runs["stale"]["kills"] >= 1
    with pytest.raises(AssertionError):
        check_same(runs["stale"], runs["whole"])


def test_the_runs_do_learn(runs):
    losses = [line[1] for line in runs["whole"]["lines"]]
    assert losses[-1] < 0.8 * losses[0]
