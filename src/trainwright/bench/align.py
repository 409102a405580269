"""Do two loss curves agree? Seed 004's check: the mean relative difference of the losses from step 21 on.

Owns reading losses (a run's folder, metrics.jsonl, JSON, CSV, a plain list) and the verdict. Printing is the verb's. No
torch.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainwright.errors import UserError

STEP_COLUMNS = ("step", "steps", "global_step", "iteration", "iter")
LOSS_COLUMNS = ("loss", "train_loss", "lm_loss", "lm loss", "training_loss")


@dataclass(frozen=True)
class Alignment:
    """How far `run` is from `reference` on the steps that both have, from `from_step` on."""

    aligned: bool
    mean_relative_difference: float
    max_relative_difference: float
    worst_step: int
    steps: int
    from_step: int
    last_step: int
    tolerance: float

    def as_dict(self) -> dict[str, Any]:
        """What --json prints: a difference that is infinite is null."""
        return {key: None if value == math.inf else value for key, value in asdict(self).items()}

    def __str__(self) -> str:
        verdict = "aligned" if self.aligned else "NOT aligned"
        return (
            f"{verdict}: mean relative difference {self.mean_relative_difference:.3%} "
            f"(tolerance {self.tolerance:.3%}) over {self.steps} steps {self.from_step} to {self.last_step}, "
            f"largest {self.max_relative_difference:.3%} at step {self.worst_step}"
        )


def align(run: Path, reference: Path, *, from_step: int = 21, tolerance: float = 0.02) -> Alignment:
    """Compares two files or run folders.

    mean over steps s >= from_step of |loss_run(s) - loss_reference(s)| / |loss_reference(s)|. A loss that is not a
    finite number does not agree with anything. Raises UserError for files without losses or without common steps.
    """
    if from_step < 0 or not tolerance > 0:
        raise UserError(f"--from-step {from_step} and --tolerance {tolerance} must be at least 0 and above 0")
    ours, theirs = read_losses(run), read_losses(reference)
    steps = sorted(step for step in ours.keys() & theirs.keys() if step >= from_step)
    if not steps:
        raise UserError(
            f"no step from {from_step} on is in both: {run} has {_span(ours)}, {reference} has {_span(theirs)}; "
            f"use a lower --from-step"
        )
    differences = {step: _relative(ours[step], theirs[step]) for step in steps}
    mean = sum(differences.values()) / len(differences)
    worst = max(differences, key=differences.__getitem__)
    return Alignment(mean <= tolerance, mean, differences[worst], worst, len(steps), steps[0], steps[-1], tolerance)


def _relative(value: float, reference: float) -> float:
    """Relative difference; infinite where either is not finite or the reference is 0 and the value is not."""
    if not (math.isfinite(value) and math.isfinite(reference)):
        return math.inf
    if value == reference:
        return 0.0
    return abs(value - reference) / abs(reference) if reference else math.inf


def _span(losses: dict[int, float]) -> str:
    return f"steps {min(losses)} to {max(losses)}"


def read_losses(path: Path) -> dict[int, float]:
    """Step -> loss, steps counted from 1 where the file does not say them.

    `path` is a run's folder, metrics.jsonl, a JSON list (numbers or objects with step and loss) or object ({"loss":
    [...]} or {"1": 2.3}), a CSV with a loss column, or a text file with one number a line.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} is not there: give a run's folder, or a JSON, CSV or text file of losses")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not text ({error.reason}): give a JSON, CSV or text file of losses") from None
    try:
        losses = _parse(file, text)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read as losses ({error}): give JSON, CSV or one number a line") from None
    if not losses:
        raise UserError(f"{file} holds no loss: give a file with a `loss` column or key, or one number a line")
    return losses


def _parse(file: Path, text: str) -> dict[int, float]:
    """By the file's ending; a text file of numbers is a CSV without a header."""
    if file.suffix == ".jsonl":
        lines = [line for line in text.splitlines() if line.strip()]
        if lines and not text.endswith("\n") and not lines[-1].rstrip().endswith("}"):
            lines.pop()  # cut off by a crash, or being written
        return _from_rows(json.loads(line) for line in lines)
    if file.suffix == ".json":
        return _from_json(json.loads(text))
    return _from_table(text)


def _from_json(value: Any) -> dict[int, float]:
    if isinstance(value, dict):
        column = next((value[name] for name in LOSS_COLUMNS if isinstance(value.get(name), list)), None)
        if column is None:
            return {int(step): float(loss) for step, loss in value.items()}
        steps = next((value[name] for name in STEP_COLUMNS if isinstance(value.get(name), list)), None)
        return dict(zip(map(int, steps or range(1, len(column) + 1)), map(float, column), strict=True))
    if value and isinstance(value[0], dict):
        return _from_rows(value)
    return {step: float(loss) for step, loss in enumerate(value, 1)}


def _from_rows(rows: Iterable[dict[str, Any]]) -> dict[int, float]:
    """Rows without a loss (evaluation, notes) are passed over; a repeated step counts as last written (a resume).

    A step that metrics.jsonl marks as skipped had a loss that JSON cannot write: NaN.
    """
    losses: dict[int, float] = {}
    for row in rows:
        loss = next((row[name] for name in LOSS_COLUMNS if row.get(name) not in (None, "")), None)
        if loss is None and not row.get("skipped"):
            continue
        loss = math.nan if loss is None else loss
        step = next((row[name] for name in STEP_COLUMNS if row.get(name) not in (None, "")), len(losses) + 1)
        losses[int(float(step))] = float(loss)
    return losses


def _from_table(text: str) -> dict[int, float]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        return {}
    delimiter = "\t" if "\t" in lines[0] else ","
    first = [cell.strip().lower() for cell in next(csv.reader(lines[:1], delimiter=delimiter))]
    if any(name in first for name in LOSS_COLUMNS):
        return _from_rows(csv.DictReader(lines[1:], fieldnames=first, delimiter=delimiter))
    numbers = [[float(cell) for cell in row if cell.strip()] for row in csv.reader(lines, delimiter=delimiter)]
    if all(len(row) == 2 for row in numbers):
        return {int(step): loss for step, loss in numbers}
    if any(len(row) != 1 for row in numbers):
        raise ValueError("rows of numbers without a header must be `loss` or `step,loss`")
    return {step: row[0] for step, row in enumerate(numbers, 1)}
