"""The plan in training: auto micro batches, the refusal of what cannot fit, and the account of memory that ran out."""

from dataclasses import replace

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


def test_out_of_memory_ends_with_the_plans_account(tmp_path, monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 512.00 "
            "MiB is free."
        )

    monkeypatch.setattr("trainwright.train.step.TrainStep.__call__", too_much)
    with pytest.raises(UserError) as caught:
        train(small_recipe(tmp_path))
    line = str(caught.value)
    assert line.startswith("step 1: out of memory in loss, 2.00 GiB asked and 0.50 free; the plan has")
    assert "\n" not in line


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
