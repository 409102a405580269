"""Arguments and options that several verbs share."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch
    from rich.table import Table

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="a shipped name, a file, or a run's folder")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="values that replace the recipe's")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]

DTYPES = ("float32", "bfloat16", "float16")
INTERRUPTED = 130  # what a shell says of a program that Ctrl-C ended


def finite(value: float | None) -> float | None:
    """A callback of options with a least value, which NaN is not below."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number that can be counted with")
    return value


class Interrupted(SystemExit):
    """Ctrl-C ended a verb that has said itself what is left to do."""

    def __init__(self) -> None:
        super().__init__(INTERRUPTED)


def torch_dtype(name: str) -> "torch.dtype":
    """The torch type of a --dtype word. Raises UserError for any other."""
    import torch

    from trainwright.errors import UserError

    if name not in DTYPES:
        raise UserError(f"--dtype {name} is not a type for weights: use {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def refuse_existing(target: Path) -> None:
    """Nothing that was saved is written over. Raises UserError where `target` exists."""
    from trainwright.errors import UserError

    if target.exists():
        raise UserError(f"{target} exists: choose another name, nothing was written")


def check_new_recipe(file: Path) -> None:
    """Before the work whose end is a recipe file. Raises UserError for a file that exists, or is named as JSON."""
    from trainwright.errors import UserError

    refuse_existing(file)
    if file.suffix.lower() == ".json":
        raise UserError(f"{file}: recipes are written as YAML, with comments: name it {file.with_suffix('.yaml')}")


def print_table(table: "Table") -> None:
    """A table as wide as it needs where nobody's terminal limits it."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=250)
    console.print(table)
