"""A recipe whose weights and data need not be there: its shapes and lengths, random weights, made tokens. No torch.

Owns what `made: true` of a matrix and `trainwright recipes copy --made` mean. The made recipe says everything itself,
so it runs again from its own file; `data/made.py` draws the tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainwright.errors import UserError
from trainwright.model import named
from trainwright.planner.build import model_config
from trainwright.recipe.load import load_recipe
from trainwright.recipe.model import ModelRecipe
from trainwright.recipe.schema import Recipe

TOKENS = 1 << 24  # made in all at most; a longer run goes round again


def made(recipe: Recipe, *, rows: int | None = None) -> Recipe:
    """The recipe with random weights of its model's shape and made tokens in rows of its own length.

    Rows are full: each holds one document of `data.seq_len` tokens, all of which are trained. What the recipe says of
    templates, filters and held-out data belongs to the data it had and is dropped; the tokenizer is `byte`, which is
    part of the package. Data that are `made:` already stay. `rows`: how many rows are enough.

    Raises UserError where the shape is neither in a folder nor a named model's.
    """
    values = recipe.model_dump(mode="json")
    config = shape(recipe.model)
    values["model"] |= {"path": None, "config": config, "tokenizer": "byte"}
    if recipe.adapter is not None:
        values["adapter"]["path"] = None
    plain = {"adapter": None, "quantize": None, "quantize_tables": None}
    vocabulary = model_config(recipe.model_copy(update=plain)).vocab_size
    if isinstance(config, dict):  # what it left to its tokenizer
        values["model"]["config"] = {"vocab_size": vocabulary, **config}
    if not all(source.path.startswith("made:") for source in recipe.data.all_sources):
        values["data"] |= _made_data(recipe, rows, vocabulary)
    values["evaluation"] |= {"every": 0, "generate": 0}
    return load_recipe(values)


def shape(model: ModelRecipe) -> str | dict[str, Any]:
    """`model.config` of a model without its weights: nothing is read from a network."""
    if model.config is not None:
        return model.config
    path = str(model.path)
    if found := named.of_hub(path):
        return found.name
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return str(folder / "config.json")
    raise UserError(
        f"model.path={path}: its shape is not known here, since it is neither a folder nor a hub id of a named model: "
        "set model.config to a name of `trainwright models`, a config.json, or its keys"
    )


def _made_data(recipe: Recipe, rows: int | None, vocabulary: int) -> dict[str, Any]:
    data = recipe.data
    most = max(1, TOKENS // data.seq_len)
    count = min(rows or most, most)
    tokens = f"made:tokens?rows={count}&length={data.seq_len}&vocab={vocabulary}&seed={recipe.train.seed}"
    return {
        "path": tokens, "format": "auto", "sources": [], "validation": 0.0, "template": None, "system": None,
        "loss_on": "all", "filter": {}, "streaming": False,
        "accept": ["missing_eos", "double_bos"],  # nothing speaks in made tokens
    }  # fmt: skip
