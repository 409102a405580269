"""A matrix is read strictly and expanded as written: rows, crossed axes, exclusions."""

from __future__ import annotations

import json
from itertools import product

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.bench.matrix import Matrix, expand, find_matrix, matrix_names, read_matrix
from trainwright.errors import UserError
from trainwright.recipe.load import load_recipe

KEYS = ("train.micro_batch_size", "data.seq_len", "train.seed", "gpus")
axes = st.dictionaries(st.sampled_from(KEYS), st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True))
PRINTED = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp")), max_size=8)
names = st.lists(st.sampled_from("abcde"), max_size=4, unique=True)


@settings(max_examples=60, deadline=None)
@given(axes=axes, names=names, data=st.data())
def test_an_expansion_is_rows_by_axes_less_exclusions(axes, names, data):
    points = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    excluded = data.draw(st.sampled_from(points)) if axes and len(points) > 1 else None
    matrix = Matrix(
        title="t", recipe="quickstart", axes=axes, rows=[{"name": name} for name in names],
        exclude=[excluded] if excluded else [],
    )  # fmt: skip
    cells = expand(matrix)
    kept = [point for point in points if point != excluded]
    assert len(cells) == max(1, len(names)) * len(kept)
    assert len({cell.name for cell in cells}) == len(cells)
    found = [({**cell.set, "gpus": cell.gpus}, cell.name) for cell in cells]
    wanted = [({"gpus": 1, **point}, name) for name in (names or [""]) for point in kept]
    assert [values for values, _ in found] == [values for values, _ in wanted]
    assert all(name.startswith(first) for (_, name), (_, first) in zip(found, wanted, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    st.one_of(
        st.none(), st.booleans(), st.integers(-5, 5), st.floats(1e-9, 1e9), PRINTED,
        st.lists(st.integers(0, 3), max_size=3), st.dictionaries(st.sampled_from("xyz"), st.integers(0, 3), max_size=2),
    )
)  # fmt: skip
def test_a_value_reaches_the_recipe_as_it_was_written(value):
    setting = expand(Matrix(title="t", recipe="quickstart", set={"model.overrides.a_key": value}))[0]
    recipe = load_recipe("quickstart", setting.words)
    if value == {}:
        assert recipe.model.overrides["a_key"] == {}
    else:
        assert recipe.model.overrides["a_key"] == (pytest.approx(value) if isinstance(value, float) else value)


def test_a_row_overrides_the_matrix():
    matrix = Matrix(
        title="t", recipe="quickstart", gpus=2, set={"train.seed": 1, "train.eps": 1e-8}, warmup_steps=5,
        memory_gib=8, rows=[
            {"set": {"train.seed": 7}, "gpus": 1, "warmup_steps": 0, "recipe": {"base": "quickstart"}}, {"name": "b"},
        ],
    )  # fmt: skip
    first, second = expand(matrix)
    assert (first.gpus, first.warmup_steps, first.set) == (1, 0, {"train.seed": 7, "train.eps": 1e-8})
    assert (first.recipe, first.name, first.memory_gib) == ({"base": "quickstart"}, "seed=7", 8)
    assert (second.gpus, second.warmup_steps, second.recipe) == (2, 5, "quickstart")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"recip": "quickstart"}, "recip is not a key: did you mean recipe?"),
        ({"recipe": "quickstart", "rows": [{"nam": "a"}]}, "rows.0.nam is not a key: did you mean name?"),
        ({}, "the matrix has no recipe"),
        ({"rows": [{"name": "a"}]}, "a has no recipe"),
        ({"recipe": "quickstart", "measured_steps": 0}, "measured_steps=0: input should be greater than or equal to 1"),
        ({"recipe": "quickstart", "axes": {"train.seed": []}}, "axes.train.seed has no values"),
        (
            {"recipe": "q", "axes": {"train.seed": [1]}, "rows": [{"set": {"train.seed": 2}}]},
            "rows.0 sets train.seed, which is an axis too",
        ),
        ({"recipe": "q", "rows": [{"published": "x"}]}, "needs the matrix's published"),
        ({"recipe": "q", "rows": [{"name": "a"}, {"name": "a"}]}, "two cells are called 'a'"),
        (
            {"recipe": "q", "axes": {"train.seed": [1]}, "exclude": [{"train.sed": 1}]},
            "exclude names train.sed, which no cell sets: did you mean train.seed?",
        ),
        ({"recipe": "q", "axes": {"train.seed": [1, 2]}, "exclude": [{"train.seed": 3}]}, "meets no cell"),
        ({"recipe": "q", "axes": {"train.seed": [1]}, "exclude": [{"train.seed": 1}]}, "no cell is left"),
        ({"recipe": "q", "axes": {"gpus": ["two"]}}, "gpus='two'"),
        ({"recipe": "q", "axes": {"gpus": [1, 0]}}, "gpus=0: input should be greater than or equal to 1"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, values, words):
    file = tmp_path / "m.yaml"
    file.write_text(yaml.safe_dump({"title": "t", **values}))
    with pytest.raises(UserError) as error:
        expand(read_matrix(file))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_files_are_found(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: quickstart\n")
    file = tmp_path / "m.json"
    file.write_text(json.dumps({"title": "t", "axes": {"recipe": ["mine.yaml", "quickstart"]}}))
    cells = expand(read_matrix(file))
    assert [cell.recipe for cell in cells] == [str(tmp_path / "mine.yaml"), "quickstart"]
    with pytest.raises(UserError, match="neither a file nor a shipped name"):
        find_matrix("no_such_matrix")
    (tmp_path / "m.txt").write_text("- 1\n")
    with pytest.raises(UserError, match="a matrix is a mapping of keys, this is list"):
        read_matrix(tmp_path / "m.txt")


def test_a_start_of_a_name_is_enough_where_one_begins_so():
    for name in matrix_names():
        assert find_matrix(name).stem == name
    starts = [name for name in matrix_names() if sum(other.startswith(name[:3]) for other in matrix_names()) == 1]
    for name in starts:
        assert find_matrix(name[:3]).stem == name
    shared = next(name for name in matrix_names() if sum(other.startswith(name[:3]) for other in matrix_names()) > 1)
    with pytest.raises(UserError, match="say which"):
        find_matrix(shared[:3])
