"""`trainwright prepare`: data to packed tokens, once."""

from typing import TYPE_CHECKING, Annotated

import typer

from trainwright.cli.options import Overrides, RecipeName

if TYPE_CHECKING:
    from trainwright.recipe.schema import Recipe


def prepare(
    recipe: RecipeName,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(min=0, help="print this many decoded samples, trained tokens in colour")] = 0,
    doctor: Annotated[bool, typer.Option("--doctor", help="check the data for what silently ruins a run")] = False,
) -> None:
    """Tokenizes and packs the data once; training then starts at once."""
    from trainwright.data.command import prepare_command
    from trainwright.recipe.load import load_recipe

    asked = load_recipe(recipe, overrides or ())
    prepare_command(asked, show=show, doctor=doctor, vocab_size=_vocab_size(asked))


def _vocab_size(recipe: "Recipe") -> int | None:
    """Rows of the model's embedding; None where the model is not at hand, which data need not wait for."""
    from trainwright import hub
    from trainwright.errors import UserError
    from trainwright.planner.build import model_config

    model = recipe.model
    try:
        if model.path and hub.is_id(model.path):  # its config.json alone: weights come when they are trained
            model = model.model_copy(update={"path": str(hub.fetch(model.path, ["config.json"]))})
        return model_config(recipe.model_copy(update={"model": model})).vocab_size
    except UserError:
        return None
