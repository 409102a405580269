"""Adapters that begin as a part of the base: together they are the original, and what is exported is used beside it."""

import pytest
import torch
from safetensors.torch import load_file

from tests.adapt.models import adapted_model, adapter, golden_model
from tests.adapt.test_peft import logits, published
from tests.adapt.test_training import held_out, losses, recipe
from tests.golden import golden_dir
from trainwright.adapt.merge import load_adapted, merge_adapter
from trainwright.adapt.peft import adapters_of, load_adapter, save_adapter
from trainwright.adapt.starts import first_factors
from trainwright.errors import UserError
from trainwright.model.checkpoint import load_model
from trainwright.recipe.load import load_recipe
from trainwright.train.trainer import Trainer, train

STARTS = ["pissa", "pissa_niter_8", "olora", "loftq"]
FROM_BASE = STARTS[:-1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mixtral"])
@pytest.mark.parametrize("init", FROM_BASE)
def test_base_and_adapter_are_the_original(family, init):
    mine = golden_model(family, adapter(init=init), trained=False)
    assert all(module.lora_b.abs().max() > 0 for module in adapters_of(mine).values())
    torch.testing.assert_close(logits(mine), logits(load_model(golden_dir(family))), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])  # a randomized SVD of random weights is each library's own
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_the_start_is_that_of_peft(init, more):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=init, **more)
    theirs = dict(peft.get_peft_model(published("llama"), config).named_parameters())
    ours = {key.removeprefix("use_"): value for key, value in more.items()}
    mine = golden_model("llama", adapter(init=init, **ours), trained=False)
    near = {"atol": 1e-5, "rtol": 1e-4}
    for path, module in adapters_of(mine).items():
        name = f"base_model.model.model.{path}"
        a, b = (theirs[f"{name}.lora_{letter}.default.weight"] for letter in "AB")
        torch.testing.assert_close(module.lora_b @ module.lora_a, b @ a, **near)
        torch.testing.assert_close(module.weight, theirs[f"{name}.base_layer.weight"], **near)
        if module.magnitude is not None:
            lengths = theirs[f"{name}.lora_magnitude_vector.default.weight"]
            torch.testing.assert_close(module.magnitude, lengths, **near)


@pytest.mark.parametrize("init", FROM_BASE)
def test_what_peft_converted_is_read(init, tmp_path):
    """PEFT's own way: the start kept in a folder, the change since then saved as an adapter of twice the rank."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    theirs = peft.get_peft_model(published("llama"), config).eval()
    theirs.peft_config["default"].init_lora_weights = True  # as its documentation says, so that a load keeps the base
    theirs.save_pretrained(tmp_path / "start")
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    theirs.peft_config["default"].init_lora_weights = init
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    mine = golden_model("llama", adapter(path=str(tmp_path / "adapter")), trained=False)
    load_adapter(mine, tmp_path / "adapter")
    torch.testing.assert_close(logits(mine), expected, atol=2e-5, rtol=1e-4)


def test_a_randomized_svd_finds_the_largest_values():
    weight = torch.randn(96, 40) @ torch.diag(0.8 ** torch.arange(40)) @ torch.randn(40, 200)
    exact, near = (b @ a for a, b in (first_factors(init, weight, 6, 1.0) for init in ("pissa", "pissa_niter_8")))
    assert (near - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_what_is_left_is_rounded_with_less_error(init, quantize):
    """The point of QPiSSA and LoftQ; here the error is 0.82 to 0.90 of the plain one."""
    plain = adapters_of(load_model_with(quantize, "kaiming"))
    begun = adapters_of(load_model_with(quantize, init))
    whole = adapters_of(load_model_with(None, "kaiming"))

    def error(found):
        apart = [m.merged_weight(torch.float32) - whole[path].merged_weight(torch.float32) for path, m in found.items()]
        return float(torch.stack([each.norm() for each in apart]).norm())

    assert 0 < error(begun) < 0.93 * error(plain)


def load_model_with(quantize, init):
    return adapted_model(golden_dir("llama"), adapter(init=init, rank=8), quantize, trained=False)


def test_a_format_is_rounded_once_and_stored_the_same():
    module = adapters_of(load_model_with("nf4", "loftq"))["layers.0.mlp.up_proj"]
    whole = adapters_of(load_model_with(None, "kaiming"))["layers.0.mlp.up_proj"].weight
    assert torch.equal(module.rounded(whole), module.whole_weight(torch.float32))


@pytest.mark.parametrize(("init", "quantize"), [("pissa", "nf4"), ("olora", "null"), ("loftq", "int8")])
def test_a_run_in_two_parts_is_the_run_in_one(tmp_path, base, init, quantize):
    lora = {"rank": 8, "alpha": 16.0, "init": init}
    words = (f"quantize={quantize}", "train.learning_rate=1e-3", "checkpoint.every=5")
    result = train(recipe(tmp_path / "whole", base, *words, adapter=lora))
    first = recipe(tmp_path / "parts", base, *words, adapter=lora)
    trainer = Trainer(first)
    trainer.total_steps = 5
    trainer.run()
    trainer.close()
    again = train(first, resume=True)
    assert losses(again) == losses(result)
    one, other = (load_file(each.model / "adapter_model.safetensors") for each in (again, result))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    (tmp_path / "parts/runs/small/adapter_began/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="adapter_began"):
        train(first, resume=True)


@pytest.mark.parametrize("init", ["pissa_niter_4", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_exported_adapter_is_used_beside_the_original_base(tmp_path, base, init, dora):
    lora = {"rank": 12, "alpha": 24.0, "init": init, "dora": dora}
    result = train(recipe(tmp_path, base, "train.learning_rate=1e-3", "train.steps=20", adapter=lora))
    assert held_out(result, "after") < held_out(result, "before")
    model = load_adapted(result.model)
    assert all(module.lora.rank == 24 for module in adapters_of(model).values())  # more than k_proj is wide: 16
    again = train(recipe(tmp_path / "again", base, "train.steps=1", adapter={"path": str(result.model)}))
    assert held_out(again, "before") == pytest.approx(held_out(result, "after"), rel=1e-4)
    assert merge_adapter(result.model, tmp_path / "merged", verify=True).holds


def test_peft_reads_what_a_run_exports(tmp_path):
    peft = pytest.importorskip("peft")
    from dataclasses import replace

    from trainwright.adapt.peft import beside_original, write_adapter
    from trainwright.model.init import normal

    mine = golden_model("gpt2", adapter(init="pissa"), trained=False)
    save_adapter(mine, tmp_path / "began")
    for path, module in adapters_of(mine).items():
        module.lora_b.data += normal(module.lora_b.shape, 0.05, path, torch.device("cpu"))
    parameters = dict(mine.named_parameters())
    config, whole = beside_original(mine.config, lambda name: parameters[name].detach(), tmp_path / "began")
    write_adapter(config, whole, tmp_path / "adapter", base="somewhere")
    theirs = peft.PeftModel.from_pretrained(published("gpt2"), tmp_path / "adapter").eval()
    assert (logits(mine) - logits(published("gpt2"))).abs().max() > 1e-2
    torch.testing.assert_close(logits(theirs), logits(mine), atol=2e-5, rtol=1e-4)
    assert replace(config, layers=()) == replace(mine.config, layers=())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"init": "svd"}, "adapter.init=svd is no start: use kaiming.*pissa_niter_N"),
        ({"init": "loftq"}, "loftq makes up for what rounding.*set quantize"),
        ({"init": "pissa", "path": "x"}, "leave one out"),
    ],
)
def test_starts_that_cannot_be_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        load_recipe({"model": {"config": "llama3-8b"}, "data": {"path": "x"}, "train": {"steps": 1}, "adapter": words})


def test_another_rank_does_not_go_on(tmp_path, base):
    first = recipe(tmp_path, base, "train.steps=2", adapter={"rank": 8, "init": "olora"})
    train(first)
    with pytest.raises(UserError, match=r"began with rank 8, adapter\.rank says 4"):
        train(recipe(tmp_path, base, "train.steps=3", adapter={"rank": 4, "init": "olora"}), resume=True)
