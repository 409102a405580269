"""Adapter folders: ours with the library `peft` on the published model, theirs with us, equal logits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.adapt.models import adapted_model, adapter, golden_model
from tests.golden import golden_dir
from trainwright.adapt.peft import adapters_of, load_adapter, save_adapter
from trainwright.errors import UserError
from trainwright.model import families

IN_TRANSFORMERS = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "bloom", "opt", "mixtral", "qwen3_moe"]
WITH_EXPERTS = ["mixtral", "qwen3_moe"]


def ids(vocab=150):
    return torch.randint(0, vocab, (2, 12), generator=torch.Generator().manual_seed(0))


def published(family):
    """The same folder as transformers' model."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        golden_dir(family), dtype=torch.float32, attn_implementation="eager"
    ).eval()


def randomize(model):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05, generator=generator)
        if "magnitude" in name:
            parameter.data.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)


def logits(model):
    with torch.no_grad():
        out = model(ids())
    return out if isinstance(out, torch.Tensor) else out.logits


SETTINGS = [
    {},
    {"targets": ["q_proj", "v_proj"], "rslora": True},
    {"targets": "layers.0.*", "rank": 3, "alpha": 5.0},
    {"dora": True},
]


@pytest.mark.parametrize("family", IN_TRANSFORMERS)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "all-linear")
def test_peft_reads_ours(family, settings, tmp_path):
    peft = pytest.importorskip("peft")
    if settings.get("dora") and family in WITH_EXPERTS:
        settings = settings | {"targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    mine = golden_model(family, adapter(**settings))
    save_adapter(mine, tmp_path / "adapter", base="somewhere")
    theirs = peft.PeftModel.from_pretrained(published(family), tmp_path / "adapter").eval()
    base = logits(published(family))
    assert (logits(mine) - base).abs().max() > 1e-2
    torch.testing.assert_close(logits(theirs), logits(mine), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", IN_TRANSFORMERS)
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_we_read_peft(family, more, tmp_path):
    peft = pytest.importorskip("peft")
    if more.get("use_dora") and family in WITH_EXPERTS:
        more = more | {"target_modules": ["q_proj", "v_proj"]}
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | more
    theirs = peft.get_peft_model(published(family), peft.LoraConfig(**config)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    mine = golden_model(family, adapter(path=str(tmp_path / "adapter")))
    load_adapter(mine, tmp_path / "adapter")
    torch.testing.assert_close(logits(mine), logits(theirs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_we_read_experts_that_peft_adapts_as_one_parameter(family, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    theirs = peft.get_peft_model(published(family), config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    mine = golden_model(family, adapter(path=str(tmp_path / "adapter")))
    load_adapter(mine, tmp_path / "adapter")
    torch.testing.assert_close(logits(mine), logits(theirs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", families.names())
def test_what_we_wrote_comes_back_as_it_was(family, tmp_path):
    mine = golden_model(family, adapter(targets=["q_proj", "v_proj", "up_proj", "down_proj"]))
    save_adapter(mine, tmp_path / "adapter")
    again = golden_model(family, adapter(path=str(tmp_path / "adapter")))
    load_adapter(again, tmp_path / "adapter")
    before, after = adapters_of(mine), adapters_of(again)
    assert before.keys() == after.keys()
    for path, module in before.items():
        assert torch.equal(module.lora_a, after[path].lora_a)
        assert torch.equal(module.lora_b, after[path].lora_b)
        assert module.lora.scale == pytest.approx(after[path].lora.scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights"),
    ],
)
def test_what_an_adapter_cannot_be_is_said(change, message, tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(golden_model("llama", adapter()), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        golden_model("llama", adapter(path=str(folder)))


def test_an_adapter_of_another_model_is_refused(tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(golden_model("llama", adapter()), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name.replace("layers.0", "layers.77")] = tensors[name].clone()
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"layers\.77.*adapts nothing"):
        golden_model("llama", adapter(path=str(folder)))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        golden_model("llama", adapter(path=str(folder)))


def test_a_saved_base_is_never_one_in_fewer_bits(tmp_path):
    from trainwright.model.checkpoint import save_model

    model = adapted_model(golden_dir("llama"), adapter(), quantize="nf4")
    with pytest.raises(UserError, match="merge"):
        save_model(model, tmp_path / "model")
