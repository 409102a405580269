"""The shipped recipes do what they say: what they need, and that their data are read as they stand."""

import json
import re

import pytest
import yaml

from trainwright.cli.recipes import NEEDS
from trainwright.data.prepare import prepare
from trainwright.data.tokenizer import load_tokenizer
from trainwright.planner.hardware import Cluster, card_named
from trainwright.planner.plan import plan
from trainwright.recipe.load import LIBRARY, library_names, load_recipe

CARDS = {8: "A100-40", 10: "A100-40", 12: "A100-40", 24: "RTX 3090", 32: "BI-V150", 40: "A100-40", 80: "A100-80"}
ON_A_CPU = {"quickstart", "smollm2_135m/sft"}
SCHOOL = [
    ("小明有3个苹果，又买了4个，一共几个？", "3+4=7，一共7个。"),
    ("Tom has 5 pens and loses 2. How many?", "5-2=3"),
]


@pytest.mark.parametrize("name", sorted(set(library_names()) - ON_A_CPU))
def test_it_fits_where_it_says(name):
    recipe = load_recipe(name)
    said = NEEDS.search(recipe.description)
    assert said, f"{name} does not say on how many GPUs with how many GB it runs"
    gigabytes = int(said[3])
    for word in said.groups()[:2]:
        if word is None:
            continue
        count = 1 if word == "one" else int(word)
        memory = card_named(CARDS[gigabytes]).memory_gib
        card = card_named(CARDS[gigabytes], min(memory, gigabytes * 1e9 / 2**30 if gigabytes < 24 else memory))
        made = plan(recipe, Cluster(card, count, gpus_per_node=max(8, count)))
        assert made.fits, f"{name} needs {made.memory.needed / 2**30:.1f} GiB"


def test_names_follow_the_folder():
    for name in library_names():
        assert load_recipe(name).name == name.replace("/", "-")


def test_recipes_do_not_repeat_each_other():
    """A recipe with a base says only what is different."""
    for name in library_names():
        own = yaml.safe_load((LIBRARY / f"{name}.yaml").read_text(encoding="utf-8"))
        if "base" in own:
            base = load_recipe(own["base"]).model_dump(mode="json")
            for section, keys in own.items():
                if isinstance(keys, dict):
                    same = [key for key, value in keys.items() if base[section] and base[section].get(key) == value]
                    assert not same, f"{name} repeats {section}.{same}"


@pytest.mark.parametrize("form", ["conversation", "alpaca"])
def test_school_math_is_read_in_both_of_its_forms(tmp_path, form):
    """One padded row a sample, the answer trained; the answer's tokens are the same whichever copy was fetched."""
    rows = {
        "conversation": lambda ask, answer: {"conversation_id": 1, "category": "school math", "conversation": [
            {"human": ask, "assistant": answer}]},
        "alpaca": lambda ask, answer: {"instruction": ask, "input": "", "output": answer},
    }  # fmt: skip
    file = tmp_path / "school_math_0.25M.jsonl"
    lines = [json.dumps(rows[form](*sample), ensure_ascii=False) for sample in SCHOOL]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = [f"data.path={file}", f"data.cache={tmp_path}/cache", "data.template=null", "data.seq_len=512"]
    recipe = load_recipe("llama3_8b/sft_school_math_3d", words)
    tokenizer = load_tokenizer("byte")
    rows_found = prepare(recipe, tokenizer, progress=False).train
    assert len(rows_found) == len(SCHOOL)
    trained = [ids[1:][labels[:-1] >= 0] for ids, labels in zip(*_arrays(rows_found), strict=True)]
    texts = {tokenizer.decode(ids.tolist()) for ids in trained}
    assert texts == {answer for _, answer in SCHOOL}


def _arrays(rows):
    found = rows.cursor(0, False).read(range(len(rows)))
    return found.input_ids, found.labels


def test_the_line_of_needs_is_one_form():
    assert re.fullmatch(NEEDS, "4 or 8 GPUs with 80 GB")
    assert re.fullmatch(NEEDS, "one GPU with 24 GB")


TINY = (
    "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, vocab_size: 320, max_position_embeddings: 128}"
)
ALONE = ["parallel.tp=1", "parallel.pp=1", "parallel.cp=1", "data.seq_len=64", "train.precision=fp32"]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("llama2_7b/pretrain_tp2sd4_stage2", {"text": "a page of text " * 40}),
        ("llama3_8b/full_alpaca_128k", {"instruction": "Add 1 and 2", "input": "", "output": "3"}),
        ("llama2_7b/qlora_512", {"instruction": "Read " * 420, "input": "", "output": "Yes"}),
    ],
)
def test_it_runs_as_it_stands_where_weights_and_data_are_there(tmp_path, name, row):
    """Every key but sizes, paths and degrees is the recipe's own."""
    from trainwright.train.trainer import Trainer

    file = tmp_path / "rows.jsonl"
    file.write_text((json.dumps(row) + "\n") * 12, encoding="utf-8")
    places = [f"data.path={file}", f"data.cache={tmp_path}/cache", f"output={tmp_path}/runs"]
    words = [*ALONE, *places, f"model.config={TINY}", "model.tokenizer=byte", "data.template=null", "train.steps=2"]
    small = ["train.warmup=0", "train.gradient_accumulation_steps=2", "train.micro_batch_size=1"]
    if "qlora" in name:
        words += ["data.too_long=split"]  # the answer of a row of 2048 characters lies behind 64 tokens
    Trainer(load_recipe(name, [*words, *small])).run()
    lines = (tmp_path / "runs" / name.replace("/", "-") / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == [1, 2]
