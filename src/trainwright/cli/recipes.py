"""`trainwright recipes` and `trainwright models`: what there is to train."""

import json
from pathlib import Path
from typing import Annotated

import typer

from trainwright.cli.options import Json, Overrides, RecipeName, print_table, refuse_existing

app = typer.Typer(help="Shipped recipes: list, show with every default, copy to edit.", invoke_without_command=True)


@app.callback()
def recipes(context: typer.Context, as_json: Json = False) -> None:
    """Lists the shipped recipes."""
    if context.invoked_subcommand:
        return
    from trainwright.recipe.load import library_names, load_recipe

    rows = [(name, load_recipe(name)) for name in library_names()]
    if as_json:
        print(json.dumps([{"name": name, **recipe.model_dump(mode="json")} for name, recipe in rows]))
        return
    from rich.table import Table

    table = Table("recipe", "task", "model", "seq_len", "what it does", box=None, header_style="bold")
    for name, recipe in rows:
        model = recipe.model.path or recipe.model.config
        method = recipe.task + (f" + {recipe.adapter.kind}" if recipe.adapter else "")
        method += f" {recipe.quantize}" if recipe.quantize else ""
        shape = model if isinstance(model, str) else "random weights"
        table.add_row(name, method, shape, str(recipe.data.seq_len), recipe.description)
    print_table(table)


@app.command()
def show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Prints a recipe with every default and what each key means."""
    from trainwright.recipe.load import load_recipe
    from trainwright.recipe.show import to_yaml

    print(to_yaml(load_recipe(recipe, overrides or ())), end="")


@app.command()
def copy(recipe: RecipeName, file: Annotated[Path, typer.Argument(help="the new recipe file")]) -> None:
    """Copies a shipped recipe to a file of yours; editors complete its keys."""
    from trainwright.recipe.load import find
    from trainwright.recipe.show import copy_text

    refuse_existing(file)
    text = copy_text(recipe, find(recipe))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    print(f"wrote {file}; train it with: trainwright train {file}")


@app.command()
def schema(file: Annotated[Path | None, typer.Argument(help="where to write it; default: print")] = None) -> None:
    """The JSON Schema of a recipe, for editors and other tools."""
    from trainwright.recipe.show import json_schema, write_schema

    if file is not None:
        write_schema(file)
    else:
        print(json.dumps(json_schema(), indent=1, ensure_ascii=False))


def models(as_json: Json = False) -> None:
    """The named models: family, exact parameter count, context, licence, template."""
    from trainwright.model.named import named_models

    rows = named_models()
    if as_json:
        print(json.dumps([row.as_dict() for row in rows]))
        return
    from rich.table import Table

    table = Table("name", "family", "parameters", "context", "licence", "template", box=None, header_style="bold")
    table.columns[2].justify = table.columns[3].justify = "right"
    for column in table.columns[:4]:
        column.no_wrap = True
    for row in rows:
        table.add_row(row.name, row.family, f"{row.parameters:,}", f"{row.context:,}", row.licence, row.template)
    print_table(table)
