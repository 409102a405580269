"""TensorBoard where it is installed, and one more tracker by one key of the recipe.

Owns the few calls that differ between them. Nothing here runs, or reaches the network, unless the recipe says so:
TensorBoard writes files only, the others are asked for by name.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from trainwright.errors import UserError

# How each names its run folder and its run; all have init, log and finish.
INIT: dict[str, Callable[[str, str, Path], dict[str, Any]]] = {
    "wandb": lambda name, run, folder: {"name": name, "dir": str(folder), "resume": "allow", "id": run},
    "trackio": lambda name, run, folder: {"name": f"{name}-{run}", "resume": "allow"},
    "swanlab": lambda name, run, folder: {"experiment_name": f"{name}-{run}", "logdir": str(folder / "swanlab")},
}


class Tracker(Protocol):
    """Takes figures of a step."""

    def log(self, step: int, figures: dict[str, float]) -> None: ...
    def close(self) -> None: ...


def check_tracker(name: str | None) -> None:
    """Raises UserError for a tracker that is not installed, before anything heavy has begun."""
    if name is not None and find_spec(name) is None:
        raise UserError(f"tracking.tracker={name} is not installed: pip install {name}, or set tracking.tracker=null")


def open_trackers(
    folder: Path,
    name: str,
    run_id: str,
    *,
    tensorboard: bool,
    tracker: str | None,
    project: str,
    settings: dict[str, Any],
    step: int,
) -> list[Tracker]:
    """The trackers of a run that stands at `step`; on resume, TensorBoard drops what it has beyond.

    `run_id` is the same before and after a resume, so a service goes on with the same curve.
    """
    found: list[Tracker] = []
    if tensorboard and find_spec("tensorboard") is not None:
        found.append(_TensorBoard(folder / "tensorboard", step))
    if tracker is not None:
        found.append(_Service(tracker, project, settings, INIT[tracker](name, run_id, folder)))
    return found


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(self, step: int, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Service:
    def __init__(self, module: str, project: str, settings: dict[str, Any], run: dict[str, Any]) -> None:
        self._module: Any = import_module(module)
        try:
            self._module.init(project=project, config=settings, **run)
        except Exception as error:  # a service has its own kinds: no login, no network, a full disk
            raise UserError(
                f"tracking.tracker={module} did not start ({error}): log in to it, or set tracking.tracker=null"
            ) from error

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._module.log(figures, step=step)

    def close(self) -> None:
        self._module.finish()
