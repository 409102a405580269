"""A recipe as text: complete, commented, and the same recipe when read back."""

import json

import pytest
import yaml
from pydantic import BaseModel

from trainwright.recipe.load import library_names, load_recipe
from trainwright.recipe.show import SCHEMA_FILE, json_schema, to_yaml


@pytest.mark.parametrize("name", library_names())
@pytest.mark.parametrize("comments", [True, False])
def test_shown_recipe_reads_back_the_same(tmp_path, name, comments):
    recipe = load_recipe(name)
    (tmp_path / "r.yaml").write_text(to_yaml(recipe, comments=comments), encoding="utf-8")
    assert load_recipe(tmp_path / "r.yaml") == recipe


def test_every_key_is_explained():
    def leaves(section):
        for name, field in type(section).model_fields.items():
            assert field.description, f"{type(section).__name__}.{name} has no description"
            if isinstance(getattr(section, name), BaseModel):
                leaves(getattr(section, name))

    leaves(load_recipe("quickstart", ["adapter.rank=4"]))


def test_several_sources_are_shown_as_a_list(tmp_path):
    values = {"model": {"config": "x"}, "train": {"steps": 1}, "data": {"sources": [{"path": "a"}, {"path": "b"}]}}
    recipe = load_recipe(values)
    assert load_recipe(yaml.safe_load(to_yaml(recipe))) == recipe


def test_the_shipped_schema_is_current():
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == json_schema(), (
        "write it anew: trainwright recipes schema > src/trainwright/recipe/recipe.schema.json"
    )
