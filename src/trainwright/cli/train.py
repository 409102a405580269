"""`trainwright train`: one run from one recipe."""

from typing import Annotated

import typer

from trainwright.cli.recipes import Overrides, RecipeName


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest good checkpoint")] = False,
) -> None:
    """Trains a recipe; the run's folder holds everything it did."""
    from trainwright.recipe.load import load_recipe

    asked = load_recipe(recipe, overrides or ())
    from trainwright.train.trainer import train as run  # torch comes in here, after the recipe is known to be good

    run(asked, resume=resume or None)
