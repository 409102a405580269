"""The plan in training: auto micro batches, the refusal of what cannot fit, and the account of memory that ran out."""

import inspect
import json
import os
import pkgutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from tests.train.small import small_recipe
from trainwright.errors import UserError
from trainwright.planner import hardware
from trainwright.planner.compare import Measured, compare, out_of_memory, read_metrics
from trainwright.planner.hardware import GIB, Cluster, card_named, cluster_of
from trainwright.planner.plan import plan
from trainwright.recipe.load import load_recipe
from trainwright.train import planned
from trainwright.train.trainer import Trainer, train

RECIPE = {
    "task": "pretrain",
    "model": {"config": "meta-llama/Meta-Llama-3-8B", "tokenizer": "byte"},
    "data": {"path": "shipped:arithmetic", "seq_len": 8192},
    "train": {"steps": 100, "global_batch_size": 32, "master_weights": False},
}


def small_machine(monkeypatch, gib: float) -> None:
    """This machine with less memory."""
    monkeypatch.setattr(planned, "cpu_card", lambda: replace(hardware.cpu_card(), memory_gib=gib))


def test_auto_takes_the_largest_micro_batch_and_keeps_the_global_batch(tmp_path):
    batch = ["train.gradient_accumulation_steps=null", "train.global_batch_size=8", "train.micro_batch_size=auto"]
    result = train(small_recipe(tmp_path, *batch, "train.steps=2"))
    written = yaml.safe_load((result.folder / "recipe.yaml").read_text())
    assert written["train"]["micro_batch_size"] == 8
    assert written["train"]["global_batch_size"] == 8


def test_what_surely_does_not_fit_is_refused_and_forced(tmp_path, monkeypatch):
    small_machine(monkeypatch, 0.2)
    with pytest.raises(UserError, match=r"GiB a GPU.*--force to try"):
        Trainer(small_recipe(tmp_path))
    result = train(small_recipe(tmp_path, "train.steps=2"), force=True)
    assert result.step == 2


FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. "
    "GPU 0 has a total capacity of 139.81 GiB of which 512.00 MiB is free."
)
PLACES = {
    "build": "trainwright.model.transformer.Transformer.init_weights",
    "loss": "trainwright.model.kernels.cross_entropy._LinearCrossEntropy.forward",
    "backward": "trainwright.model.kernels.gated._GatedSilu.backward",
    "optimizer": "torch.optim.AdamW.step",
    "evaluation": "trainwright.train.evaluate.HeldOut.loss",
    "save": "trainwright.train.checkpoint.Checkpoints.save",
}


@pytest.mark.parametrize("phase", PLACES)
def test_out_of_memory_ends_with_the_plans_account(phase, tmp_path, monkeypatch):
    """Memory runs out deep inside a real step: the account says where, what was there, and what to change."""

    def too_much(*_, **__):
        raise torch.OutOfMemoryError(FULL)

    # A frame of the real file has to be in the traceback, as it is when torch itself raises there.
    place, name = PLACES[phase].rsplit(".", 1)
    owner = pkgutil.resolve_name(place)
    real = getattr(owner, name)

    def inside(*arguments, **words):
        return too_much()

    where = inspect.getfile(inspect.unwrap(real))
    code = inside.__code__.replace(co_filename=where, co_name=name)
    fake = types.FunctionType(code, globals(), name, closure=inside.__closure__)
    monkeypatch.setattr(owner, name, staticmethod(fake) if name in ("forward", "backward") else fake)
    with pytest.raises(UserError) as caught:
        train(small_recipe(tmp_path, "train.steps=2", *([] if phase == "evaluation" else ["data.validation=0"])))
    line = str(caught.value)
    start = "before the first step" if phase == "build" else ("step 3" if phase == "save" else "step 1")
    assert line.startswith(f"{start}: out of memory in {phase}, 2.00 GiB asked and 0.50 free; the plan has")
    assert "\n" not in line


def test_a_full_host_is_told_likewise(tmp_path, monkeypatch):
    def too_much(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("trainwright.train.step.TrainStep.__call__", too_much)
    with pytest.raises(UserError, match=r"step 1: out of memory in loss; the plan has .* GiB there"):
        train(small_recipe(tmp_path))


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("trainwright.train.step.TrainStep.__call__", broken)
    with pytest.raises(RuntimeError, match="shapes cannot"):
        train(small_recipe(tmp_path))


@pytest.mark.slow
def test_of_many_processes_the_one_that_ran_out_tells(tmp_path):
    """Two processes, one of which has no memory at its second step: the run ends with its account, and at once."""
    (tmp_path / "sitecustomize.py").write_text(FULL_AT_RANK_1, encoding="utf-8")
    recipe = small_recipe(tmp_path, "parallel.zero=2", "train.steps=4")
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.model_dump(mode="json")), encoding="utf-8")
    here = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{here / 'src'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainwright", "train", str(file), "--gpus", "2"]
    environment["TRAINWRIGHT_DEVICE"] = "cpu"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "rank 1 of 2, step 2: out of memory in loss, 2.00 GiB asked and 0.50 free; the plan has" in last
    assert "Traceback" not in done.stderr


FULL_AT_RANK_1 = f"""
import os, sys
if os.environ.get("RANK") == "1":
    import importlib.abc, importlib.util

    class Watch(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "trainwright.train.step":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                import torch
                real, count = module.TrainStep.__call__, []

                def step(self, *arguments):
                    count.append(1)
                    if len(count) == 2:
                        raise torch.OutOfMemoryError({FULL!r})
                    return real(self, *arguments)

                module.TrainStep.__call__ = step

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Watch())
"""


def test_a_run_keeps_what_was_planned_beside_what_it_took(tmp_path):
    result = train(small_recipe(tmp_path, "train.steps=5"))
    kept = json.loads((result.folder / "planned.json").read_text())
    assert kept["step_seconds"] > 0
    assert kept["time_error"] == pytest.approx(kept["predicted_step_seconds"] / kept["step_seconds"] - 1)
    assert kept["peak_memory_gib"] is None  # of a processor only the process's memory is known
    assert kept["plan"]["memory"]["peak_memory_gib"] == pytest.approx(kept["predicted_memory_gib"])
    page = (result.folder / "report.html").read_text()
    assert "Planned and taken" in page
    assert f"{kept['time_error']:+.1%}" in page


def test_account_names_the_smallest_change():
    made = plan(load_recipe(RECIPE, ["train.micro_batch_size=8"]), cluster_of("H200", 1))
    line = out_of_memory(made, "loss", asked_gib=4.0, free_gib=1.0)
    assert not made.fits
    assert "activations" in line
    assert "the smallest change that fits: " in line
    fitting = plan(load_recipe(RECIPE, ["train.micro_batch_size=2"]), cluster_of("H200", 1))
    assert fitting.fits
    assert "the smallest change that fits: " in out_of_memory(fitting, "backward", asked_gib=3.0, free_gib=1.0)


def test_a_run_is_compared_with_its_plan():
    made = plan(load_recipe(RECIPE), cluster_of("H200", 1))
    memory, seconds = made.memory.allocated / GIB, made.speed.step_seconds
    slow_start = [{"step_seconds": 50 * seconds, "peak_memory_gib": memory}] * 3
    steady = [{"step_seconds": 1.02 * seconds, "peak_memory_gib": 0.99 * memory, "data_wait_seconds": 0.0}] * 5
    near = compare(made, read_metrics([*slow_start, *steady]))
    assert near.time_error == pytest.approx(1 / 1.02 - 1)
    assert near.memory_error == pytest.approx(0.0)
    assert near.missed == ()


def test_a_miss_says_which_part():
    made = plan(load_recipe(RECIPE), cluster_of("H200", 1))
    memory, seconds = made.memory.allocated / GIB, made.speed.step_seconds
    states = made.memory.fullest.states
    standing = (states.total - states.gradients) / GIB
    found = compare(made, Measured(1.3 * memory, 1.3 * seconds, standing, data_wait_seconds=0.2 * seconds))
    assert [line.split(":")[0] for line in found.missed] == ["what a step adds missed", "data missed"]
    found = compare(made, Measured(memory + standing, seconds, 2 * standing))
    assert [line.split(":")[0] for line in found.missed] == ["weights and optimizer missed"]


def test_cards_that_are_not_in_the_table_lend_their_memory(monkeypatch):
    world = type("World", (), {"device": torch.device("cuda", 0), "size": 2})()
    properties = type("Properties", (), {"total_memory": 48 * GIB})()
    module = type("Module", (), {"get_device_properties": staticmethod(lambda device: properties)})()
    monkeypatch.setattr(planned, "device_name", lambda device: "Nobody's Card 7")
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    cluster = planned.cluster_of_world(world)
    assert cluster.card.memory_gib == 48
    assert isinstance(cluster, Cluster)
    assert cluster.card.name != card_named("H200").name
