"""`made`: any recipe with random weights and made tokens of its own shapes, which trains from its own file."""

import json

import pytest

from trainwright.bench.made import made
from trainwright.errors import UserError
from trainwright.planner.build import model_config
from trainwright.recipe.load import load_recipe
from trainwright.recipe.show import to_yaml
from trainwright.train.trainer import Trainer

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
ASKED = {
    "model": {"path": "hf:nobody/tiny"},
    "adapter": {"rank": 2, "path": "an/adapter"},
    "data": {"path": "hf:nobody/data", "template": "llama3", "seq_len": 32, "packing": False, "validation": 0.1},
    "train": {"steps": 3, "micro_batch_size": 2, "precision": "fp32"},
    "evaluation": {"generate": 5},
}


def test_a_shipped_recipe_keeps_its_shapes():
    asked = load_recipe("llama3_8b/qlora_alpaca_8k")
    recipe = made(asked, rows=7)
    assert recipe.model.path is None
    assert recipe.model.config == "meta-llama/Meta-Llama-3-8B"
    assert recipe.data.path == "made:tokens?rows=7&length=8192&vocab=128256&seed=0"
    assert (recipe.adapter, recipe.quantize, recipe.parallel) == (asked.adapter, asked.quantize, asked.parallel)
    assert recipe.train == asked.train
    assert model_config(recipe).vocab_size == 128256


def test_it_trains_from_its_own_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    recipe = made(load_recipe({**ASKED, "model": {"path": str(tmp_path)}, "output": str(tmp_path / "runs")}), rows=6)
    file = tmp_path / "made.yaml"
    file.write_text(to_yaml(recipe), encoding="utf-8")
    again = load_recipe(file, [f"data.cache={tmp_path}/cache"])
    assert made(again).data == again.data  # what is made stays
    Trainer(again).run()
    lines = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["supervised_tokens"] for line in lines][:1] == [2 * 31]
    assert len(lines) == 3


def test_a_vocabulary_that_the_tokenizer_decides_stays():
    recipe = made(load_recipe("quickstart"))
    assert isinstance(recipe.model.config, dict)
    assert recipe.model.config["vocab_size"] == 320
    assert "vocab=320" in str(recipe.data.path)


def test_a_shape_that_is_not_known_is_refused():
    with pytest.raises(UserError, match=r"hf:nobody/tiny: its shape is not known here.*set model\.config"):
        made(load_recipe(ASKED))
