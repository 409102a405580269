"""`trainwright train`: one run from one recipe, in one process or in as many as asked or found."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainwright.cli.options import Overrides, RecipeName
from trainwright.errors import UserError

if TYPE_CHECKING:
    from trainwright.recipe.schema import Recipe


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest good checkpoint")] = False,
    force: Annotated[bool, typer.Option("--force", help="try also what the plan says cannot fit")] = False,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="processes to start on this machine; CPU processes where it has no GPU")
    ] = None,
) -> None:
    """Trains a recipe; the run's folder holds everything it did.

    Under torchrun, srun or a Kubernetes job it joins the processes that it finds.
    """
    from trainwright.recipe.load import load_recipe

    asked = load_recipe(recipe, overrides or ())
    if (resume or asked.train.resume is not False) and Path(recipe).is_dir():
        asked = _this_run(asked, Path(recipe), overrides or [])
    from trainwright.parallel import launch  # torch comes in here, after the recipe is known to be good

    found = launch.join_environment(os.environ)
    if found and gpus is not None and gpus != int(os.environ["WORLD_SIZE"]):
        raise UserError(f"--gpus {gpus}, but {found} started {os.environ['WORLD_SIZE']} processes: leave --gpus out")
    ranks = Path(asked.output) / asked.name / "ranks"
    if found:
        _as_one_of_many(asked, resume, force, ranks)
    elif gpus is not None and gpus > 1:
        _check(asked, gpus)
        options = [word for word, given in (("--resume", resume), ("--force", force)) if given]
        command = [sys.executable, "-m", "trainwright", "train", recipe, *(overrides or ()), *options]
        sys.exit(launch.run_processes(gpus, command, ranks))
    else:
        from trainwright.train.trainer import train as run

        run(asked, resume=resume or None, force=force)


def _this_run(recipe: "Recipe", folder: Path, overrides: list[str]) -> "Recipe":
    """The run that goes on is this folder, wherever it was moved to or is seen from. Words that say otherwise count."""
    here = {"output": str(folder.resolve().parent), "name": folder.resolve().name}
    told = {word.partition("=")[0].strip() for word in overrides}
    written = (Path(recipe.output) / recipe.name).resolve()
    if told & here.keys() or written == folder.resolve():
        return recipe
    return recipe.model_copy(update=here)


def _check(recipe: "Recipe", gpus: int) -> None:
    """What can be said before anything starts: devices and degrees."""
    import torch

    from trainwright.parallel.layout import Layout

    count = torch.accelerator.device_count() if os.environ.get("TRAINWRIGHT_DEVICE") != "cpu" else 0
    if 0 < count < gpus:
        raise UserError(f"--gpus {gpus}, but this machine has {count}: use --gpus {count}, or several machines")
    if count == 0:
        print(f"no GPU here: {gpus} CPU processes, which talk through gloo", file=sys.stderr)
    Layout.of(recipe.parallel, gpus)


def _as_one_of_many(recipe: "Recipe", resume: bool, force: bool, ranks: Path) -> None:
    """One rank: when it fails, it leaves one line and no traceback on the screen."""
    from trainwright.parallel import watch
    from trainwright.train.trainer import train as run

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    watch.leave_with_launcher()
    try:
        run(recipe, resume=resume or None, force=force)
    except Exception as error:
        status = watch.report_failure(ranks, error, rank, size)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # other threads may wait for ranks that are gone
