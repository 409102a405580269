"""`trainwright recipes` and `trainwright models`: what there is to train."""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from trainwright.cli.options import Json, Overrides, RecipeName, check_new_recipe, print_table, refuse_existing

if TYPE_CHECKING:
    from trainwright.recipe.schema import Recipe

app = typer.Typer(
    help="Shipped recipes: list, show with every default, copy to edit; import other tools' files.",
    invoke_without_command=True,
)
NEEDS = re.compile(r"(one|\d+)(?: or (\d+))? GPUs? with (\d+) GB")


@app.callback()
def recipes(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="only models whose name holds this")] = None,
    task: Annotated[str | None, typer.Option(help="only this: pretrain, full, lora, qlora, int8")] = None,
    gpus: Annotated[int | None, typer.Option(help="only those that run on so many GPUs")] = None,
    memory_gib: Annotated[float | None, typer.Option(help="only those that need no more a GPU")] = None,
    as_json: Json = False,
) -> None:
    """Lists the shipped recipes by model, task, GPUs and memory a GPU, as they are planned."""
    if context.invoked_subcommand:
        return
    from trainwright.recipe.load import library_names, load_recipe

    rows = [_listed(name, load_recipe(name)) for name in library_names()]
    rows = [
        row
        for row in rows
        if (model is None or model.lower() in f"{row['recipe']} {row['model_name']}".lower())
        and task in (None, row["method"])
        and (gpus is None or gpus in row["gpus"])
        and (memory_gib is None or (row["memory_gib"] or float("inf")) <= memory_gib)
    ]
    if as_json:
        for row in rows:
            row["name"] = row.pop("recipe")
        print(json.dumps([{**row.pop("whole").model_dump(mode="json"), **row} for row in rows]))
        return
    from rich.table import Table

    table = Table("recipe", "model", "task", "seq_len", "GPUs", "GiB a GPU", "what it does", box=None)
    table.header_style = "bold"
    for column in (3, 4, 5):
        table.columns[column].justify = "right"
    table.columns[0].no_wrap = True
    for row in sorted(rows, key=lambda row: (row["model_name"].lower(), row["method"], row["seq_len"])):
        count = " or ".join(map(str, row["gpus"])) or "CPU"
        memory = f"{row['memory_gib']:.1f}" if row["memory_gib"] else "-"
        about = row["whole"].description
        table.add_row(row["recipe"], row["model_name"], row["method"], str(row["seq_len"]), count, memory, about)
    print_table(table)


def _listed(name: str, recipe: "Recipe") -> dict[str, Any]:
    """A recipe's line: GPUs as its description says, memory as planned for the fewest of them."""
    from trainwright.bench.cell import model_name, task_name
    from trainwright.errors import UserError
    from trainwright.planner.hardware import GIB, cluster_of
    from trainwright.planner.plan import plan

    said = NEEDS.search(recipe.description)
    counts = [1 if word == "one" else int(word) for word in said.groups()[:2] if word] if said else []
    try:
        made = plan(recipe, cluster_of("A100-80" if counts else "cpu", counts[0] if counts else 1))
        memory = round(made.memory.needed / GIB, 1)
    except UserError:  # a model in a folder that is not there
        memory = None
    return {
        "recipe": name,
        "model_name": model_name(recipe),
        "method": task_name(recipe),
        "seq_len": recipe.data.seq_len,
        "gpus": counts,
        "memory_gib": memory,
        "whole": recipe,
    }


@app.command()
def show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Prints a recipe with every default and what each key means."""
    from trainwright.recipe.load import load_recipe
    from trainwright.recipe.show import to_yaml

    print(to_yaml(load_recipe(recipe, overrides or ())), end="")


@app.command()
def copy(
    recipe: RecipeName,
    file: Annotated[Path, typer.Argument(help="the new recipe file")],
    made: Annotated[bool, typer.Option("--made", help="random weights and made tokens of the same shapes")] = False,
) -> None:
    """Copies a recipe to a file of yours; editors complete its keys."""
    from trainwright.recipe.load import find, load_recipe
    from trainwright.recipe.show import copy_text, to_yaml

    check_new_recipe(file)
    if made:
        from trainwright.bench.made import made as make

        text = f"# {recipe} with random weights and made tokens\n" + to_yaml(make(load_recipe(recipe)))
    else:
        text = copy_text(recipe, find(recipe))
    _write(file, text)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="JSON, YAML or TOML of another tool")],
    overrides: Overrides = None,
    kind: Annotated[
        str | None, typer.Option(help="paddlenlp, llamafactory, axolotl or torchtitan; default: by its keys")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="processes it ran on, where its degrees depend on that")] = None,
    write: Annotated[Path | None, typer.Option(help="the recipe file; default: print it")] = None,
    as_json: Json = False,
) -> None:
    """Turns another tool's argument file into a recipe, and lists every key that could not be carried."""
    from trainwright.recipe.imports import import_file

    if write is not None:
        check_new_recipe(write)
    found = import_file(file, kind, gpus=gpus, overrides=overrides or ())
    if write is not None:
        _write(write, found.to_yaml(), to=sys.stderr)
    elif not as_json:
        print(found.to_yaml(), end="")
    if as_json:
        listed = [each.as_dict() for each in found.not_carried]
        print(json.dumps({"kind": found.kind, "recipe": found.values, "not_carried": listed}, default=str))
        return
    for each in found.not_carried:
        print(f"not carried: {each}", file=sys.stderr)
    count = len(found.not_carried)
    verdict = f"{count} key{'s' if count > 1 else ''} not carried" if count else "every key carried"
    print(f"{found.kind}: {verdict}", file=sys.stderr)


def _write(file: Path, text: str, to: TextIO | None = None) -> None:
    """A recipe file, and what to do with it."""
    from trainwright.store import write_text

    write_text(file, text)
    print(f"wrote {file}; train it with: trainwright train {file}", file=to)


@app.command()
def schema(file: Annotated[Path | None, typer.Argument(help="where to write it; default: print")] = None) -> None:
    """The JSON Schema of a recipe, for editors and other tools."""
    from trainwright.recipe.show import json_schema, write_schema

    if file is not None:
        refuse_existing(file)
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
