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

CARDS = {8: "A100-40", 10: "A100-40", 12: "A100-40", 24: "RTX 3090", 40: "A100-40", 64: "BI-V150", 80: "A100-80"}
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
