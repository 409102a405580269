"""`trainwright align`: do two loss curves agree?"""

import json
from pathlib import Path
from typing import Annotated

import typer

from trainwright.cli.options import Json


def align(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder, or a JSON, CSV or text file of losses")],
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE", help="what it is compared with, likewise")],
    from_step: Annotated[int, typer.Option(help="first step that counts")] = 21,
    tolerance: Annotated[float, typer.Option(help="largest mean relative difference that agrees")] = 0.02,
    as_json: Json = False,
) -> None:
    """Compares two loss curves; exit status 0 when they agree, 1 when not."""
    from trainwright.bench.align import align as compare

    found = compare(run, reference, from_step=from_step, tolerance=tolerance)
    print(json.dumps(found.as_dict()) if as_json else found)
    raise typer.Exit(0 if found.aligned else 1)
