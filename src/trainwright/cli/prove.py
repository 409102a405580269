"""`trainwright prove`: does a recipe compute in its layout what it computes on one process?"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from trainwright.cli.options import Json, Overrides, RecipeName, print_table
from trainwright.errors import UserError


def prove(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=2, help="processes of the layout; default: what it divides")] = None,
    steps: Annotated[int, typer.Option(min=2, help="optimizer steps of each run")] = 4,
    layers: Annotated[int | None, typer.Option(min=1, help="only the first layers, with random weights")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16: 1e-5 or half a percent is the bound")] = "fp32",
    keep: Annotated[Path | None, typer.Option(help="keep the runs in this new folder")] = None,
    as_json: Json = False,
) -> None:
    """Trains a few steps in the recipe's layout and plainly, and compares; exit status 0 when all bounds hold, else 1.

    Accumulation, packing, resume and export are compared too. The runs go into a temporary folder.
    """
    from trainwright.bench.prove import BOUNDS, Proof, processes_needed, with_layers
    from trainwright.recipe.load import load_recipe

    if precision not in BOUNDS:
        raise UserError(f"--precision {precision} has no bounds: use {', '.join(BOUNDS)}")
    if keep is not None and keep.exists():
        raise UserError(f"{keep} exists: choose another name, nothing was written")
    asked = load_recipe(recipe, overrides or ())
    import torch

    count = gpus or processes_needed(asked, torch.accelerator.device_count())
    small = with_layers(asked, layers) if layers is not None else asked
    with tempfile.TemporaryDirectory(prefix="trainwright-prove-") as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        proof = Proof(small, count, folder.absolute(), steps=steps, precision=precision)
        said = [] if as_json else [lambda line: print(f"... {line}", file=sys.stderr, flush=True)]
        checks = list(proof.checks(*said))
    holds = all(check.holds for check in checks)
    if as_json:
        rows = [check.as_dict() for check in checks]
        print(json.dumps({"holds": holds, "layout": str(proof.layout), "processes": count, "checks": rows}))
    else:
        _print(checks)
        print(f"{proof.layout} on {count} processes: " + ("proved" if holds else "NOT the same as one process"))
    raise typer.Exit(0 if holds else 1)


def _print(checks: list) -> None:
    """The table."""
    from rich.table import Table

    table = Table("check", "what is compared", "difference", "bound", "", box=None, header_style="bold")
    for check in checks:
        compared = check.difference is not None
        figures = (f"{check.difference:.1e}" if check.difference else "0", f"{check.bound:.0e}" if check.bound else "0")
        verdict = ("[green]holds[/green]" if check.holds else "[red]FAILS[/red]") if compared else "-"
        table.add_row(check.name, check.what, *(figures if compared else ("", "")), verdict)
    print_table(table)
