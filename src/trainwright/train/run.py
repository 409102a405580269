"""A run's folder: `output`/`name`, which holds the whole truth of a run.

Owns its names, what may be written over, recipe.yaml and environment.json. The files inside are written by their rooms:
`metrics.py`, `checkpoint.py`, `report.py`, `model/checkpoint.py`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainwright import __version__
from trainwright.device import describe_devices
from trainwright.errors import UserError
from trainwright.recipe.load import load_recipe
from trainwright.recipe.schema import Recipe
from trainwright.recipe.show import to_yaml
from trainwright.store import read_json, write_json, write_text
from trainwright.train.checkpoint import list_checkpoints

PACKAGES = (
    "torch", "numpy", "safetensors", "tokenizers", "pydantic", "pyarrow", "triton", "liger-kernel", "bitsandbytes",
    "torchao",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluation.jsonl"

    @property
    def answers(self) -> Path:
        return self.path / "answers.json"

    @property
    def ranks(self) -> Path:
        """What each of several processes says of itself (parallel/watch.py)."""
        return self.path / "ranks"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def adapter_began(self) -> Path:
        """Adapters that began as a part of the base, as they began."""
        return self.path / "adapter_began"


@dataclass(frozen=True)
class RunResult:
    """What a run came to. `stopped`: the signal that ended it early, None when it went to its end."""

    folder: Path
    step: int
    total_steps: int
    loss: float | None
    evaluation: dict[str, Any] = field(default_factory=dict)
    stopped: str | None = None
    checkpoint: Path | None = None
    model: Path | None = None
    report: Path | None = None


def check_folder(recipe: Recipe, resume: bool) -> RunFolder:
    """The folder of this recipe's run. Raises UserError rather than writing over another run's work.

    A folder in which no step was ever finished is taken again; so is any folder when resuming, also one that is empty,
    so that a job that is queued again and again may always say --resume. A model without a checkpoint is left alone.
    """
    folder = RunFolder(Path(recipe.output) / recipe.name)
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"{folder.path} is a file: choose another name or output")
    above = next(path for path in (folder.path, *folder.path.parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{folder.path}: nothing can be written in {above}: set output to a folder of yours")
    if not folder.path.is_dir():
        return folder
    saved = list_checkpoints(folder.checkpoints)
    result = next((path for path in (folder.model, folder.adapter) if path.exists()), None)
    if resume and result is not None and not saved:
        raise UserError(
            f"{result} is a finished run's and no checkpoint is left to go on from: keep it and start anew with "
            f"name={_free_name(recipe)}"
        )
    if resume:
        return folder
    if saved or result is not None or (folder.metrics.exists() and folder.metrics.stat().st_size):
        reached = f"a run with a checkpoint at step {saved[-1].step}" if saved else "a run's metrics"
        raise UserError(
            f"{folder.path} holds {reached}: go on with --resume, or keep it and start anew with "
            f"name={_free_name(recipe)}"
        )
    strangers = sorted({item.name for item in folder.path.iterdir()} - OURS)
    if strangers:
        raise UserError(f"{folder.path} holds {strangers[0]}, which is no run's: choose another name or output")
    return folder


OURS = {
    "ranks", "recipe.yaml", "environment.json", "metrics.jsonl", "evaluation.jsonl", "answers.json", "checkpoints",
    "tensorboard", "swanlab", "wandb", "log.txt", "adapter_began", ".adapter_began.partial",
}  # fmt: skip


def _free_name(recipe: Recipe) -> str:
    number = 2
    while (Path(recipe.output) / f"{recipe.name}-{number}").exists():
        number += 1
    return f"{recipe.name}-{number}"


def changed_keys(folder: RunFolder, recipe: Recipe) -> list[str]:
    """What differs from the recipe that this folder was written with, as "train.learning_rate 0.001 -> 0.0005"."""
    path = folder.path / "recipe.yaml"
    if not path.exists():
        return []
    before, now = (_flat(item.model_dump(mode="json")) for item in (load_recipe(path), recipe))
    silent = {"train.resume", "output", "name", "description"}
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in silent]
    return [f"{key} {before.get(key)} -> {now.get(key)}" for key in keys]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def write_recipe(folder: RunFolder, recipe: Recipe) -> None:
    """The recipe as resolved: running it again repeats the run."""
    folder.path.mkdir(parents=True, exist_ok=True)
    write_text(folder.path / "recipe.yaml", to_yaml(recipe))


def write_environment(folder: RunFolder, recipe: Recipe, **more: Any) -> str:
    """Where and with what the run runs. Returns the run's id, which a resume keeps."""
    path = folder.path / "environment.json"
    before = read_json(path)
    run_id = before.get("run_id") if isinstance(before, dict) else None
    run_id = run_id or uuid.uuid4().hex[:8]
    environment = {
        "run_id": run_id,
        "trainwright": __version__,
        "git_commit": _git_commit(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _installed(name))},
        "devices": describe_devices(),
        "seed": recipe.train.seed,
        **more,
    }
    write_json(path, environment)
    return run_id


def add_to_environment(folder: RunFolder, **more: Any) -> None:
    """Facts that are known only later, such as how long the start took."""
    path = folder.path / "environment.json"
    write_json(path, (read_json(path) or {}) | more)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of a development checkout; None for an installed package."""
    here = Path(__file__).resolve().parents[3]
    if not (here / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
