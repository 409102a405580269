"""The phases of a run's start: all of them, in order, in environment.json, and nothing counted twice."""

import json
import time

from tests.train.small import small_recipe
from trainwright.train.startup import Startup, process_age
from trainwright.train.trainer import train

PHASES = [
    "imports", "tokenizer", "process group", "data", "attention kernels", "layout", "model", "weights",
    "optimizer and restore", "first answers",
]  # fmt: skip


def test_a_run_says_where_its_start_went(tmp_path):
    began = process_age()
    result = train(small_recipe(tmp_path, "train.steps=2"))
    found = json.loads((result.folder / "environment.json").read_text())["startup_seconds"]
    assert list(found) == [*PHASES, "first step", "compile"]
    assert began <= found["imports"]
    assert sum(found.values()) < process_age()
    assert found["first step"] > 0
    assert found["compile"] == 0


def test_phases_take_the_time_between_them():
    startup = Startup()
    time.sleep(0.06)
    startup.done("waiting")
    startup.done("nothing")
    startup.first_step_done()
    assert startup.phases["waiting"] >= 0.06 > startup.phases["nothing"]
    assert "waiting 0.1" in str(startup)
