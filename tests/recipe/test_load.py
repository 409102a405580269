"""Recipes: inheritance, overrides, and one clear line for every fault."""

import json

import pytest

from trainwright.errors import UserError
from trainwright.recipe.load import LIBRARY, library_names, load_recipe

MINIMAL = {"model": {"config": "llama-7b"}, "data": {"path": "a.jsonl"}, "train": {"steps": 3}}


def refusal(values, *overrides):
    with pytest.raises(UserError) as caught:
        load_recipe(values, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", library_names())
def test_every_shipped_recipe_loads(name):
    recipe = load_recipe(name)
    assert recipe.description


def test_there_are_shipped_recipes():
    assert {"quickstart", "smollm2_135m/sft"} <= set(library_names())


def test_unknown_key_names_the_nearest():
    assert "train.learning_rat is not a key: did you mean learning_rate?" in refusal(MINIMAL, "train.learning_rat=1")


def test_unknown_key_that_is_named_like_a_type():
    assert "train.int is not a key" in refusal(MINIMAL, "train.int=5")


def test_unknown_key_without_a_neighbour_lists_what_is_known():
    assert "known keys there: kind, rank" in refusal({**MINIMAL, "adapter": {"zzz": 1}})


def test_unknown_key_in_a_list_of_sources():
    message = refusal({**MINIMAL, "data": {"sources": [{"path": "a", "wieght": 2}]}})
    assert "data.sources.0.wieght is not a key: did you mean weight?" in message


def test_overrides_reach_any_depth_and_read_scientific_numbers():
    recipe = load_recipe(MINIMAL, ["train.learning_rate=3e-4", "data.filter.min_tokens=7", "name=a-b"])
    assert recipe.train.learning_rate == 3e-4
    assert recipe.data.filter.min_tokens == 7
    assert recipe.name == "a-b"


def test_an_override_may_change_one_entry_of_a_list():
    values = {**MINIMAL, "data": {"sources": [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}]}}
    assert load_recipe(values, ["data.sources.1.weight=5"]).data.sources[1].weight == 5
    assert "the list has 2 entries" in refusal(values, "data.sources.2.weight=5")


@pytest.mark.parametrize(
    ("override", "gone", "kept"),
    [("train.tokens=1e9", "steps", "tokens"), ("train.epochs=2", "steps", "epochs")],
)
def test_an_alternative_takes_the_place_of_what_it_replaces(override, gone, kept):
    train = load_recipe(MINIMAL, [override]).train
    assert getattr(train, gone) is None
    assert getattr(train, kept) is not None


def test_model_path_replaces_model_config():
    model = load_recipe(MINIMAL, ["model.path=weights"]).model
    assert (model.path, model.config) == ("weights", None)


def test_both_alternatives_in_one_file_are_refused():
    assert "exactly one of `path`" in refusal({**MINIMAL, "model": {"path": "a", "config": "b"}})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=0", "train.steps=0: input should be greater than or equal to 1"),
        ("train.schedule=cosin", "train.schedule='cosin'"),
        ("parallel.zero=4", "parallel.zero=4"),
        ("quantize=nf4", "add an adapter"),
        ("data.validation=1.5", "use 0 <= fraction < 1"),
        ("name=../escape", "name='../escape'"),
        ("train.min_learning_rate=1", "lower it"),
        ("train.micro_batch_size=auto", "set it to the rows of one optimizer step"),
        ("train", "is not key.path=value"),
        ("task=pretraining", "task='pretraining'"),
        ("train.steps=yes", "train.steps=True: input should be a number"),
        ("train.learning_rate=.inf", "train.learning_rate=inf: input should be a finite number"),
        ("train.epochs=.inf", "train.epochs=inf: input should be a finite number"),
        ("train.betas=[0.9, 1.0]", "train.betas.1=1.0: input should be less than 1"),
        (f"train.seed={2**63}", "train.seed=9223372036854775808"),
        (f"name={'a' * 201}", "at most 200 characters"),
        ("train.micro_batch_size=huge", "train.micro_batch_size='huge'"),
        ("train=", "train='': it holds keys of its own: steps, epochs"),
        ("train..steps=3", "is not key.path=value"),
        ("base=quickstart", "name quickstart in place of the recipe"),
        ("train.steps=2024-13-45", "train.steps='2024-13-45'"),
        (f"train.steps={'[' * 2000}", "train.steps='[[["),
    ],
)
def test_bad_values_say_the_value_and_the_fix(override, words):
    assert words in refusal(MINIMAL, override)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "clipping needs the norm of all gradients first: set train.max_grad_norm=0"),
        (("train.max_grad_norm=0", "train.precision=fp16"), "set train.precision=bf16"),
        (("train.max_grad_norm=0", "train.cuda_graph=true"), "set train.cuda_graph=false"),
        (("train.max_grad_norm=0", "train.gradient_accumulation_steps=2"), "set train.gradient_accumulation_steps=1"),
        (("train.max_grad_norm=0", "parallel.tp=2"), "parallel.tp=2 completes or moves gradients"),
        (("train.max_grad_norm=0", "parallel.offload=all"), "parallel.offload=all completes or moves gradients"),
    ],
)
def test_updates_within_the_backward_pass_say_what_they_cannot_have(overrides, words):
    assert words in refusal(MINIMAL, "train.optimizer_in_backward=true", *overrides)


def test_base_is_inherited_and_overridden(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: quickstart\nname: mine\ntrain: {steps: 7}\n")
    mine, shipped = load_recipe(tmp_path / "mine.yaml"), load_recipe("quickstart")
    assert (mine.name, mine.train.steps) == ("mine", 7)
    assert mine.train.learning_rate == shipped.train.learning_rate


def test_base_may_be_a_file_beside(tmp_path):
    (tmp_path / "a.yaml").write_text("base: quickstart\ntrain: {seed: 5}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ntrain: {steps: 9}\n")
    train = load_recipe(tmp_path / "b.yaml").train
    assert (train.seed, train.steps) == (5, 9)


def test_a_loop_of_bases_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    assert "inherits from itself" in refusal_of_file(tmp_path / "a.yaml")


def test_json_recipes(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(MINIMAL))
    assert load_recipe(tmp_path / "r.json").train.steps == 3


def refusal_of_file(path):
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: 1", "not YAML"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "given twice"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("base: no_such_recipe\n", "no recipe no_such_recipe"),
        (f"base: {'long' * 100}\n", "no recipe long"),
        ("model: {{ path }}\n", "a key is one word"),
        ("name: 2024-13-45\n", "cannot be read as a recipe: month must be"),
        ("name: !!int ten\n", "cannot be read as a recipe: invalid literal"),
        ("{a: " * 3000, "cannot be read as a recipe: maximum recursion depth"),
    ],
)
def test_bad_files_get_one_line(tmp_path, text, words):
    (tmp_path / "r.yaml").write_text(text)
    assert words in refusal_of_file(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as a recipe: Expecting property name"),
        ('{"task": "sft", "task": "pretrain"}', "key 'task' is given twice"),
        ('{"base": "quickstart", "train": {"learning_rate": Infinity}}', "input should be a finite number"),
        ("[" * 100_000, "cannot be read as a recipe: maximum recursion depth"),
    ],
)
def test_bad_json_gets_one_line(tmp_path, text, words):
    (tmp_path / "r.json").write_text(text)
    assert words in refusal_of_file(tmp_path / "r.json")


def test_a_byte_order_mark_is_no_hindrance(tmp_path):
    (tmp_path / "r.json").write_text('\ufeff{"base": "quickstart"}', encoding="utf-8")
    assert load_recipe(tmp_path / "r.json") == load_recipe("quickstart")


def test_yaml_anchors_merge(tmp_path):
    (tmp_path / "r.yaml").write_text("base: quickstart\ntrain:\n  <<: {steps: 7, seed: 9}\n  seed: 5\n")
    train = load_recipe(tmp_path / "r.yaml").train
    assert (train.steps, train.seed) == (7, 5)


@pytest.mark.parametrize("empty", ["train:", "train: # steps: 3"])
def test_a_section_left_empty_can_be_filled_from_the_command_line(tmp_path, empty):
    (tmp_path / "r.yaml").write_text(f"model: {{config: llama-7b}}\ndata: {{path: a.jsonl}}\n{empty}\n")
    assert "train=None: it holds keys of its own" in refusal_of_file(tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml", ["train.steps=3"]).train.steps == 3


def test_a_binary_file_is_no_recipe(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "cannot be read" in refusal_of_file(tmp_path / "r.yaml")


def test_a_misspelt_name_gets_the_nearest():
    assert "did you mean quickstart?" in refusal_of_file("quikstart")


def test_names_cannot_leave_the_library():
    assert LIBRARY.exists()
    assert "no recipe" in refusal_of_file("../load")
