"""Every family against the numbers of its original implementation, and back to the same bytes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.golden import golden_dir
from tests.model.golden_case import GoldenCase, errors
from trainwright.errors import UserError
from trainwright.model import families
from trainwright.model.checkpoint import load_config, load_model, save_model
from trainwright.model.transformer import Transformer

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


def test_save_gives_the_same_back(case: GoldenCase, tmp_path: Path) -> None:
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


def test_shards_hold_the_same(case: GoldenCase, tmp_path: Path) -> None:
    target = tmp_path / "sharded"
    save_model(case.model, target, shard_gib=40_000 / 2**30)
    assert len(list(target.glob("*.safetensors"))) > 3
    again = load_model(target, family=case.config.family)
    for (name, one), (_, two) in zip(case.model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("family", ["chatglm", "glm_130b"])
def test_unrounded_frequencies_are_the_reference_s_too(family: str) -> None:
    """`exactfreq.*` of the golden folders; also shows that the rounding is seen at 1e-4."""
    case = GoldenCase(golden_dir(family), family)
    exact = case.io["exactfreq.logits"]
    with torch.no_grad():
        rounded = case.model(case.input_ids, **case.inputs())
        change_rope(case.model, float16_frequencies=False)
        unrounded = case.model(case.input_ids, **case.inputs())
    assert (rounded - exact).abs().max() > 1e-4
    assert (unrounded - exact).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("llama", {"scaling": None}),
        ("llama", {"layout": "interleaved"}),
        ("llama", {"theta": 10100.0}),
        ("chatglm2", {"layout": "half"}),
        ("chatglm2", {"rotary_dim": 16}),
        ("qwen", {"layout": "interleaved"}),
    ],
)
def test_a_wrong_rotation_is_noticed(family: str, wrong: dict[str, object]) -> None:
    """Mutants of the rotary part: the golden numbers tell them all from the right one."""
    case = GoldenCase(golden_dir(family), family)
    change_rope(case.model, **wrong)
    with torch.no_grad():
        logits = case.model(case.input_ids, **case.inputs())
    assert (logits - case.io["logits"]).abs().max() > 1e-4


def change_rope(model: Transformer, **changes: object) -> None:
    """Another RopeConfig in every layer of a model that is built."""
    layers = []
    for block, module in zip(model.config.layers, model.layers.values(), strict=True):
        rope = replace(block.self_attn.rope, **changes)
        module.self_attn.rope = rope
        layers.append(replace(block, self_attn=replace(block.self_attn, rope=rope)))
    model.config = replace(model.config, layers=tuple(layers))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_router_and_load_balancing_loss(family: str) -> None:
    case = GoldenCase(golden_dir(family), family)
    seen: list[torch.Tensor] = []
    for layer in case.model.layers.values():
        layer.mlp.gate.register_forward_hook(lambda _m, _a, out: seen.append(out))
    out = case.model(case.input_ids, **case.inputs(), labels=case.labels)
    for n, logits in enumerate(seen):
        assert (logits.view_as(case.io[f"router_logits.{n}"]) - case.io[f"router_logits.{n}"]).abs().max() < 1e-4
    assert abs(out.aux_loss.item() / case.config.aux_loss_coef - case.io["aux_loss"].item()) < 1e-5
    out.aux_loss.backward()
    assert case.model.layers["0"].mlp.gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_found(family: str) -> None:
    """From config.json, or refused with the key that says it: first-generation Baichuan has no mark of its own."""
    config = json.loads((golden_dir(family) / "config.json").read_text())
    if family in ("baichuan_7b", "baichuan_13b"):
        with pytest.raises(UserError, match=f"model.family={family}"):
            load_config(config)
        config["vocab_size"] = 64000
    assert load_config(config).family == family


@pytest.mark.parametrize(("hidden", "family"), [(4096, "baichuan_7b"), (5120, "baichuan_13b")])
def test_baichuan_is_told_apart_by_size(hidden: int, family: str) -> None:
    """Even where someone added max_position_embeddings to a 13B config."""
    config = json.loads((golden_dir("baichuan_7b") / "config.json").read_text())
    config |= {"hidden_size": hidden, "num_attention_heads": hidden // 128, "vocab_size": 64000}
    assert load_config(config).family == family
