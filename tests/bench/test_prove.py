"""`trainwright prove`: a real proof holds, and whatever differs is found."""

from __future__ import annotations

import json
import math
import os
import subprocess
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.train.small import CONFIG, small_recipe
from tests.warm import python
from trainwright.bench import prove
from trainwright.bench.prove import Proof, RunFailed, processes_needed, with_layers
from trainwright.bench.whole_rows import documents
from trainwright.data.loader import Batch
from trainwright.data.tokenizer import load_tokenizer
from trainwright.errors import UserError
from trainwright.model.checkpoint import load_config, save_model
from trainwright.model.transformer import Transformer
from trainwright.recipe.load import load_recipe
from trainwright.train.metrics import read_lines
from trainwright.train.trainer import train

SMALL = [
    "train.micro_batch_size=2", "train.global_batch_size=8",
    "data.path=shipped:arithmetic?rows=200", "data.seq_len=128",
]  # fmt: skip


@pytest.mark.slow
def test_a_layout_is_proved(tmp_path):
    command = [python(), "-m", "trainwright", "prove", "quickstart", "parallel.cp=2", *SMALL, "--json"]
    environment = {**os.environ, "TRAINWRIGHT_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--steps", "2", "--layers", "2", "--keep", str(tmp_path / "runs")],
        capture_output=True, text=True, env={**environment, "TRAINWRIGHT_DEVICE": "cpu"}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["holds"], found["layout"], found["processes"]) == (True, "TP1PP1DP1CP2", 2)
    names = {check["name"]: check for check in found["checks"]}
    assert set(names) == {
        "layout: loss", "layout: gradient norm", "accumulation: loss", "resume: loss",
        "resume on one process: loss", "export: loss", "packing: loss",
    }  # fmt: skip
    assert all(check["compared"] for check in names.values())
    assert names["resume: loss"]["difference"] == 0
    layers = json.loads((tmp_path / "runs" / "layout" / "model" / "config.json").read_text())["num_hidden_layers"]
    assert layers == 2


def test_adapters_beside_four_bits_are_loaded_and_compared(tmp_path):
    """Adapter and base say what the plain run said of the next rows, packed and document by document."""
    base = Transformer(load_config({**CONFIG, "vocab_size": 320})).init_weights(0)
    save_model(base, tmp_path / "base")
    load_tokenizer("byte").save(tmp_path / "base")
    recipe = small_recipe(
        tmp_path,
        "quantize=nf4",
        model={"path": str(tmp_path / "base"), "config": None, "tokenizer": None},
        adapter={"rank": 4, "dropout": 0.2},
    )
    proof = Proof(recipe, 2, tmp_path / "runs", steps=2, precision="fp32")
    for name, steps in (("layout", 2), ("plain", 3)):
        change = {"name": name, "train": {"steps": steps}}
        result = train(load_recipe(prove.merged(proof.recipe.model_dump(mode="json"), change)))
    reference = {line["step"]: line for line in read_lines(result.folder / "metrics.jsonl")}
    checks = list(proof._model_checks(reference))
    assert [check.name for check in checks] == ["export: loss", "packing: loss"]
    assert all(check.holds and check.difference is not None for check in checks), checks
    adapter = tmp_path / "runs" / "layout" / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * 1.2 for name, tensor in load_file(adapter).items()}, adapter)
    assert not next(iter(proof._model_checks(reference))).holds


class Canned(Proof):
    """Runs that were never made: `wrong` says by how much each run's figures are off."""

    def __init__(self, folder: Any, wrong: dict[str, float]) -> None:
        recipe = load_recipe("quickstart", ["parallel.pp=2", *SMALL])
        super().__init__(recipe, 2, folder, steps=4, precision="fp32")
        self.wrong = wrong

    def _model_checks(self, reference: Any) -> Any:
        return iter(())

    def _train(self, name: str, change: Any, count: int, *, resume: bool = False) -> Any:
        off = self.wrong.get(name, 0.0)
        if math.isnan(off):
            raise RunFailed("parallel.pp=2 has a bad day")
        checkpoints = self.folder / name / "checkpoints"
        for step in (2, 4):
            (checkpoints / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
        return {step: {"step": step, "loss": (4.0 - step / 10) * (1 + off), "grad_norm": 2.0} for step in range(1, 6)}


@pytest.mark.parametrize(
    ("wrong", "failed"),
    [
        ({}, set()),
        ({"layout": 1e-7, "resumed": 1e-7}, set()),
        ({"layout": 1e-4, "resumed": 1e-4}, {"layout: loss"}),
        ({"accumulation": 1e-3}, {"accumulation: loss"}),
        ({"resumed": 1e-12}, {"resume: loss"}),  # the same layout repeats bit for bit
        ({"resumed-plain": 1e-4}, {"resume on one process: loss"}),
        ({"accumulation": math.nan}, {"accumulation: loss"}),
        ({"layout": math.nan}, {"layout"}),
    ],
)
def test_differences_are_found(tmp_path, wrong, failed):
    checks = list(Canned(tmp_path, wrong).checks())
    assert {check.name for check in checks if not check.holds} == failed
    assert json.loads(json.dumps([check.as_dict() for check in checks]))


def test_the_runs_change_nothing_but_what_they_compare(tmp_path):
    recipe = load_recipe("quickstart", ["parallel.pp=2", *SMALL])
    short = Proof(recipe, 2, tmp_path, steps=4, precision="fp32").recipe
    assert short.model == recipe.model
    assert short.data == recipe.data
    assert short.parallel == recipe.parallel
    assert short.train.learning_rate == recipe.train.learning_rate
    assert (short.train.steps, short.train.schedule, short.train.global_batch_size) == (4, "constant", 8)


@pytest.mark.parametrize(
    ("words", "available", "count"),
    [
        ([], 0, 2),
        ([], 8, 8),
        (["parallel.tp=2", "parallel.pp=2"], 0, 4),
        (["parallel.tp=2", "parallel.pp=2"], 8, 8),
        (["parallel.tp=2", "parallel.pp=2"], 6, 4),
        (["parallel.ep=2", "parallel.tp=2"], 1, 4),
        (["parallel.ep=4", "parallel.cp=2"], 1, 4),
    ],
)
def test_how_many_processes(words, available, count):
    assert processes_needed(load_recipe("quickstart", words), available) == count


def test_fewer_layers_keep_the_shape():
    recipe = with_layers(load_recipe("quickstart"), 1)
    assert recipe.model.config["num_hidden_layers"] == 1
    assert recipe.model.config["hidden_size"] == 128
    assert recipe.model.tokenizer == "byte"
    with pytest.raises(UserError, match="use 1 to 4"):
        with_layers(load_recipe("quickstart"), 5)


def test_documents_alone():
    ids = torch.arange(16).view(2, 8)
    numbers = torch.tensor([[0, 0, 0, 1, 1, 2, -1, -1], [5, 5, 5, 5, 5, 5, 5, 5]])
    found = documents(Batch(ids, ids + 1, ids, numbers))
    assert [one.input_ids.tolist() for one in found] == [[[0, 1, 2]], [[3, 4]], [[5]], [list(range(8, 16))]]
    assert found[1].labels.tolist() == [[4, 5]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "fp8"], "has no bounds"),
        (["--gpus", "3"], "do not divide the 3"),
        (["train.micro_batch_size=auto", "train.global_batch_size=8"], "give prove a number of rows"),
        (["--layers", "9"], "use 1 to 4"),
    ],
)
def test_mistakes_are_one_line(words, message):
    command = [python(), "-m", "trainwright", "prove", "quickstart", "parallel.pp=2"]
    done = subprocess.run([*command, *words], capture_output=True, text=True)
    assert (done.returncode, message in done.stderr, done.stderr.count("\n")) == (2, True, 1), done.stderr


def test_bounds_are_those_that_are_promised():
    assert prove.BOUNDS["fp32"].loss == 1e-5
    assert prove.BOUNDS["bf16"].loss == 0.005
