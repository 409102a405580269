"""Adapters into the full-precision base: equal logits live, merged and reloaded, in every family."""

import json
import shutil

import pytest
import torch

from tests.adapt.models import adapter, golden_model
from tests.golden import golden_dir
from trainwright.adapt.linear import LoraLinear
from trainwright.adapt.merge import find_base, load_adapted, merge_adapter
from trainwright.adapt.peft import save_adapter
from trainwright.errors import UserError
from trainwright.model import families
from trainwright.model.checkpoint import load_model


def saved(family, tmp_path, **settings):
    model = golden_model(family, adapter(**settings))
    save_adapter(model, tmp_path / "adapter", base=str(golden_dir(family)))
    return model, tmp_path / "adapter"


def ids(model):
    return torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", families.names())
def test_merged_says_what_the_adapted_model_says(family, tmp_path):
    model, folder = saved(family, tmp_path)
    result = merge_adapter(folder, tmp_path / "merged", family=family, verify=True)
    assert result.holds
    assert result.live_to_merged < 1e-5
    with torch.no_grad():
        merged = load_model(tmp_path / "merged", family=family)(ids(model))
        torch.testing.assert_close(merged, model(ids(model)), atol=2e-5, rtol=1e-4)
        assert (merged - load_model(golden_dir(family), family=family)(ids(model))).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_rounds_once(dtype, tmp_path):
    model, folder = saved("llama", tmp_path, dora=True)
    result = merge_adapter(folder, tmp_path / "merged", dtype=dtype, verify=True)
    assert result.holds
    assert result.merged_to_reloaded == 0
    with torch.no_grad():
        merged = load_model(tmp_path / "merged", dtype=torch.float32)(ids(model))
    assert (merged - model(ids(model))).abs().max() / merged.abs().max() < 0.05


def test_a_wrong_merge_is_noticed(tmp_path, monkeypatch):
    _, folder = saved("llama", tmp_path)
    right = LoraLinear.give_weight
    monkeypatch.setattr(LoraLinear, "give_weight", lambda self: right(self) + 0.01)
    assert not merge_adapter(folder, tmp_path / "merged", verify=True).holds


def test_what_was_trained_beside_four_bits_is_merged_into_full_precision(tmp_path):
    from trainwright.adapt.peft import adapters_of
    from trainwright.adapt.rewrite import adapted_config
    from trainwright.model.checkpoint import load_config, load_weights
    from trainwright.model.transformer import Transformer

    recipe = adapter()
    config = adapted_config(load_config(golden_dir("llama")), recipe, "nf4")
    model = Transformer(config)
    load_weights(model, golden_dir("llama"))
    for module in adapters_of(model).values():
        torch.nn.init.normal_(module.lora_a, std=0.1)
        torch.nn.init.normal_(module.lora_b, std=0.1)
    save_adapter(model, tmp_path / "adapter", base=str(golden_dir("llama")))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    base = load_model(golden_dir("llama"))
    merged = load_model(tmp_path / "merged")
    layer = adapters_of(model)["layers.0.mlp.up_proj"]
    expected = base.layers["0"].mlp.up_proj.weight + layer.lora.scale * layer.lora_b @ layer.lora_a
    torch.testing.assert_close(merged.layers["0"].mlp.up_proj.weight, expected)


def test_a_base_in_fewer_bits_is_refused(tmp_path):
    _, folder = saved("llama", tmp_path)
    base = tmp_path / "base"
    shutil.copytree(golden_dir("llama"), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(UserError, match="full-precision base only"):
        find_base(folder, str(base))


def test_a_base_must_be_known(tmp_path):
    save_adapter(golden_model("llama", adapter()), tmp_path / "adapter")
    with pytest.raises(UserError, match="--base"):
        find_base(tmp_path / "adapter")


def test_live_adapters_on_a_base_in_fewer_bits(tmp_path):
    model, folder = saved("llama", tmp_path)
    live = load_adapted(folder, quantize="int8")
    with torch.no_grad():
        assert (live(ids(model)) - model(ids(model))).abs().max() < 0.2 * model(ids(model)).abs().max()
