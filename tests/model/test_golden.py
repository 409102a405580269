"""Every family against the numbers of its original implementation, and back to the same bytes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.golden import golden_dir
from tests.model.golden_case import GoldenCase, errors
from trainwright.model import families
from trainwright.model.checkpoint import load_config, load_model, save_model

FAMILIES = families.names()


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return GoldenCase(golden_dir(request.param), request.param)


def test_numbers(case: GoldenCase) -> None:
    found = errors(case)
    assert found["logits"] < 1e-4
    assert found["hidden"] < 1e-4
    assert found["loss"] < 1e-4
    assert found["gradients"] < 1e-4


def test_save_gives_the_same_back(case: GoldenCase, tmp_path: pytest.TempPathFactory) -> None:
    target = tmp_path / "saved"
    save_model(case.model, target)
    before, after = (load_file(folder / "model.safetensors") for folder in (case.folder, target))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    assert (target / "model.safetensors").read_bytes() == (case.folder / "model.safetensors").read_bytes()
    assert json.loads((target / "config.json").read_text()) == json.loads((case.folder / "config.json").read_text())


def test_config_without_its_source_means_the_same(case: GoldenCase) -> None:
    spelled = families.get(case.config.family).to_hf(case.config)
    assert load_config(spelled, case.config.family) == case.config
    original = json.loads((case.folder / "config.json").read_text())
    assert spelled["architectures"] == original["architectures"]
    assert spelled.get("model_type") == original.get("model_type")


def test_shards_hold_the_same(case: GoldenCase, tmp_path: pytest.TempPathFactory) -> None:
    target = tmp_path / "sharded"
    save_model(case.model, target, shard_gib=40_000 / 2**30)
    assert len(list(target.glob("*.safetensors"))) > 3
    again = load_model(target, family=case.config.family)
    for (name, one), (_, two) in zip(case.model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), name
