"""`trainwright prepare`: data to packed tokens, once."""

from typing import Annotated

import typer

from trainwright.cli.options import Overrides, RecipeName


def prepare(
    recipe: RecipeName,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(help="print this many decoded samples, trained tokens in colour")] = 0,
    doctor: Annotated[bool, typer.Option("--doctor", help="check the data for what silently ruins a run")] = False,
) -> None:
    """Tokenizes and packs the data once; training then starts at once."""
    from trainwright.data.command import prepare_command
    from trainwright.recipe.load import load_recipe

    prepare_command(load_recipe(recipe, overrides or ()), show=show, doctor=doctor)
