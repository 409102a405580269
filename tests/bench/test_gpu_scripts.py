"""The scripts for GPUs, without any: every line divides its cards and is planned to fit them, and what is given up
leaves nobody behind."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainwright.parallel.split import check_micro_batches
from trainwright.planner.hardware import cluster_of
from trainwright.planner.plan import plan
from trainwright.recipe.load import load_recipe

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for their module
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(SCRIPTS))  # as Python does for the script that it runs
speed, layouts = script("speed_gpu"), script("layouts_gpu")


def check(recipe, gpus):
    """Divides, orders its micro batches, fits."""
    made = plan(recipe, cluster_of("H200", gpus))
    check_micro_batches(recipe.parallel.pp_schedule, made.job.layout.pp, made.job.accumulation)
    assert made.fits, f"{made.memory.allocated / 2**30:.0f} GiB"


@pytest.mark.parametrize("name", speed.ROWS)
def test_a_row_of_the_speed_table(name, tmp_path):
    row, options = speed.ROWS[name], argparse.Namespace(profile=False, small=False, layers=None, folder=tmp_path)
    assert row.limit <= 565  # a call has ten minutes, and ending a line takes up to 35 seconds
    for words in row.ours.values():
        check(load_recipe(speed.ours(row, words, options)["recipe"]), row.gpus or 4)


@pytest.mark.parametrize("card", ["H100", "H200"])
@pytest.mark.parametrize("name", speed.ROWS)
def test_every_row_has_lines_that_fit_the_card(name, card, tmp_path, monkeypatch):
    """The machine may have smaller cards than those that a row was written for: then spare lines take their place."""
    monkeypatch.setattr("trainwright.planner.hardware.this_machine", lambda gpus=None: cluster_of(card, gpus))
    row = speed.ROWS[name]
    options = argparse.Namespace(profile=False, small=False, layers=None, folder=tmp_path, gpus=4)
    chosen = speed.fitting(row, options)
    assert chosen
    for words in chosen.values():
        made = plan(load_recipe(speed.ours(row, words, options)["recipe"]), cluster_of(card, row.gpus or 4))
        assert made.fits
    if card == "H200":
        assert chosen == row.ours
    assert speed.memory_gib(options) == pytest.approx({"H100": 80, "H200": 141}[card], rel=0.1)


@pytest.mark.parametrize("name", [*layouts.FOUR, *layouts.TWO, *layouts.MORE, *layouts.STARTS])
def test_a_layout(name, tmp_path):
    options = argparse.Namespace(small=False, seq_len=1024, steps=100, folder=tmp_path, learning_rate=1e-4)
    gpus = 2 if name in layouts.TWO else 4
    check(layouts.recipe_of(options, name, gpus), gpus)


def test_a_launcher_is_asked_before_it_is_killed(tmp_path):
    """torchrun ends its ranks, which are sessions of their own, only when it is asked."""
    listens = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))"
    code = f"import signal, sys, time; {listens}; print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline()
    layouts.end(process)
    process.stdout.close()
    assert process.returncode == 7 != -signal.SIGKILL
