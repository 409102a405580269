"""Whole runs with adapters: what is trained, what is kept, how they go on, and that they learn in every format."""

import json
import signal
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from tests.adapt.models import golden_model
from tests.train.small import CONFIG, small_recipe
from tests.warm import python
from trainwright.adapt.merge import merge_adapter
from trainwright.adapt.peft import adapters_of
from trainwright.errors import UserError
from trainwright.model.checkpoint import load_model, save_model
from trainwright.recipe.load import load_recipe
from trainwright.recipe.model import AdapterRecipe
from trainwright.recipe.show import to_yaml
from trainwright.train.build import move_buffers
from trainwright.train.metrics import read_lines
from trainwright.train.trainer import Trainer, train

LORA = {"rank": 8, "alpha": 16.0}


def recipe(folder, base, *overrides, **sections):
    sections.setdefault("adapter", LORA)
    model = {"path": str(base), "config": None, "tokenizer": None}
    return small_recipe(folder, "train.learning_rate=1e-2", *overrides, model=model, **sections)


def losses(result):
    return [line["loss"] for line in read_lines(result.folder / "metrics.jsonl")]


def held_out(result, when):
    return result.evaluation[when]["loss"]


@pytest.mark.parametrize("quantize", [None, "nf4", "int8", "fp8"])
def test_runs_learn_and_train_the_adapter_alone(tmp_path, base, quantize):
    settings = recipe(tmp_path, base, f"quantize={quantize or 'null'}", "train.steps=30")
    trainer = Trainer(settings)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    result = trainer.run()
    trainer.close()
    after = dict(trainer.model.named_parameters())
    for name, tensor in frozen.items():  # as bytes: codes held as float8 have values that equal nothing
        assert torch.equal(after[name].detach().view(torch.uint8), tensor.view(torch.uint8)), name
    assert all(m.lora_b.abs().max() > 0 for m in adapters_of(trainer.model).values())
    assert held_out(result, "after") < 0.995 * held_out(result, "before")
    checkpoint = load_file(next((result.folder / "checkpoints").glob("step-*/tensors*.safetensors")))
    kept = {name.partition("@")[0] for name in checkpoint if name.startswith("model.")}
    assert kept == {f"model.{n}" for n in after if n.endswith(("lora_a", "lora_b"))}
    assert not (result.folder / "model").exists()
    settings = json.loads((result.folder / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert settings["r"] == 8


def test_a_run_in_two_parts_is_the_run_in_one(tmp_path, base):
    whole = losses(train(recipe(tmp_path / "whole", base, "quantize=nf4", adapter=LORA | {"dropout": 0.1})))
    first = recipe(tmp_path / "parts", base, "quantize=nf4", "checkpoint.every=5", adapter=LORA | {"dropout": 0.1})
    trainer = Trainer(first)
    trainer.total_steps = 5
    trainer.run()
    trainer.close()
    assert losses(train(first, resume=True)) == whole


def test_fewer_bits_cost_less_than_a_hundredth_of_the_loss(tmp_path, base):
    """The short form of benchmarks/quality.py, which does it with a real model for 200 steps."""
    after = {}
    for quantize in ("null", "nf4", "int8", "fp8"):
        settings = recipe(tmp_path / quantize, base, f"quantize={quantize}", "train.steps=40")
        after[quantize] = held_out(train(settings), "after")
    for quantize, loss in after.items():
        assert loss == pytest.approx(after["null"], rel=0.01), quantize
    assert len(set(after.values())) == 4


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion", "adafactor", "muon"])
def test_adapters_and_their_states_are_float32_beside_a_base_in_16_bits(tmp_path, base, optimizer):
    words = ("quantize=nf4", "train.precision=bf16", f"train.optimizer={optimizer}", "train.steps=3")
    trainer = Trainer(recipe(tmp_path, base, *words))
    before = {path: module.lora_a.detach().clone() for path, module in adapters_of(trainer.model).items()}
    trainer.run()
    trainer.close()
    types = {name: tensor.dtype for name, tensor in trainer.model.named_parameters()}
    assert types["norm.weight"] == types["embed_tokens.weight"] == torch.bfloat16
    for path, module in adapters_of(trainer.model).items():
        assert types[f"{path}.lora_a"] == types[f"{path}.lora_b"] == torch.float32
        assert module.lora_b.abs().max() > 0
        assert not torch.equal(module.lora_a, before[path])
    states = {n: t for n, t in trainer.optimizers.state_tensors().items() if t.numel() > 1}
    assert all("lora_" in name for name in states)
    if optimizer != "adamw8bit":
        assert {tensor.dtype for tensor in states.values()} == {torch.float32}


KILLED = """
import os, signal, sys
from trainwright.recipe.load import load_recipe
from trainwright.train.trainer import Trainer
trainer = Trainer(load_recipe(sys.argv[1]))
step = trainer.take_step
def take_step(*arguments):
    if trainer.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments)
trainer.take_step = take_step
trainer.run()
"""


def test_a_killed_run_ends_bit_for_bit_as_one_that_was_not(tmp_path, base):
    changes = {"adapter": LORA | {"dropout": 0.1}, "checkpoint": {"every": 3}}
    whole = train(recipe(tmp_path / "whole", base, "quantize=nf4", "train.optimizer=adamw8bit", **changes))
    killed = recipe(tmp_path / "killed", base, "quantize=nf4", "train.optimizer=adamw8bit", **changes)
    file = tmp_path / "killed.yaml"
    file.write_text(to_yaml(killed, comments=False), encoding="utf-8")
    done = subprocess.run([python(), "-c", KILLED, str(file)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    result = train(killed, resume=True)
    assert losses(result) == losses(whole)
    names = [result.model / "adapter_model.safetensors", whole.model / "adapter_model.safetensors"]
    one, other = map(load_file, names)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_going_on_from_an_adapter_folder(tmp_path, base):
    result = train(recipe(tmp_path / "a", base, "train.steps=20"))
    trainer = Trainer(recipe(tmp_path / "b", base, adapter={"path": str(result.model)}))
    stored = load_file(result.model / "adapter_model.safetensors")
    one = adapters_of(trainer.model)["layers.0.mlp.up_proj"]
    assert torch.equal(one.lora_b, stored["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"])
    trainer.close()
    again = train(recipe(tmp_path / "c", base, "train.steps=1", adapter={"path": str(result.model)}))
    assert held_out(again, "before") == pytest.approx(held_out(result, "after"))


def test_the_merged_model_goes_on_where_the_adapted_one_was(tmp_path, base):
    result = train(recipe(tmp_path, base, "train.steps=20"))
    check = merge_adapter(result.model, tmp_path / "merged", verify=True)
    assert check.holds
    assert load_model(tmp_path / "merged").config.num_parameters() == load_model(base).config.num_parameters()


@pytest.mark.parametrize("tables", ["nf4", "int8"])
def test_token_table_and_head_in_fewer_bits(tmp_path, base, tables):
    model = load_model(base)
    untied = CONFIG | {"tie_word_embeddings": False}
    folder = tmp_path / "untied"
    from trainwright.model.checkpoint import load_config
    from trainwright.model.transformer import Transformer

    other = Transformer(load_config(untied | {"vocab_size": model.config.vocab_size})).init_weights(0)
    save_model(other, folder)
    changed = ["quantize=nf4", f"quantize_tables={tables}", "model.tokenizer=byte", "train.steps=20"]
    found = losses(train(recipe(tmp_path, folder, *changed)))
    plain = losses(train(recipe(tmp_path / "plain", folder, "quantize=nf4", "model.tokenizer=byte", "train.steps=20")))
    assert found[-1] < found[0]
    assert abs(found[0] - plain[0]) < 0.05 * plain[0]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapter": {"targets": ["no_such"]}}, "'no_such' names no linear layer"),
        ({"adapter": {"rank": 64}}, "adapter.rank=64 is more than"),
    ],
)
def test_wrong_adapters_are_refused_before_anything_is_done(tmp_path, base, sections, message):
    with pytest.raises(UserError, match=message):
        train(recipe(tmp_path, base, **sections))
    assert not (tmp_path / "cache").exists()


def test_tables_that_are_one_cannot_be_in_fewer_bits(tmp_path, base):
    with pytest.raises(UserError, match="shares the token table"):
        train(recipe(tmp_path, base, "quantize_tables=nf4"))


def test_fewer_bits_need_an_adapter(base):
    with pytest.raises(UserError, match="add an adapter"):
        load_recipe({"model": {"path": str(base)}, "data": {"path": "x"}, "train": {"steps": 1}, "quantize": "nf4"})


def test_buffers_are_where_they_are_used_though_weights_wait_in_host_memory():
    model = golden_model("llama", AdapterRecipe(rank=4), quantize="nf4")
    move_buffers(model, torch.device("meta"))
    nested = {name: buffer.device.type for name, buffer in model.named_buffers() if "nested" in name}
    assert set(nested.values()) == {"meta"}
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_full_fine_tuning_with_frozen_parts(tmp_path, base):
    settings = small_recipe(
        tmp_path,
        "train.steps=4",
        model={"path": str(base), "config": None, "tokenizer": None, "frozen": ["embed_tokens*", "layers.0.*"]},
    )
    trainer = Trainer(settings)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.run()
    trainer.close()
    for name, tensor in trainer.model.named_parameters():
        frozen = name.startswith(("embed_tokens", "layers.0."))
        assert torch.equal(tensor, before[name]) == frozen, name
