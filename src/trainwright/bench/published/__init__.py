"""The five published tables as data: what each row ran, what it printed, and how that system works. No torch.

One YAML file a document. A row is a recipe (the file's `recipe` with the row's `set`), so that the planner estimates it
and `trainwright bench` runs it. `program` says how that system does the work (`planner/program.py`); rows of use
`calibration` were looked at while its numbers were chosen, `held out` ones were not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainwright.errors import UserError
from trainwright.planner.hardware import GIB, Cluster, card_named
from trainwright.planner.plan import Plan, plan
from trainwright.planner.program import Program
from trainwright.recipe.load import load_recipe
from trainwright.recipe.schema import Recipe

FOLDER = Path(__file__).parent
MEMORY_UNITS = {"GiB": GIB, "MiB": 2**20, "1000 MiB": 1000 * 2**20}


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table. `figures`: what it printed, in the columns of DESIGN section 6."""

    seed: str
    system: str
    name: str
    use: str
    gpu: str
    gpus: int
    recipe: Recipe
    program: Program
    figures: dict[str, Any]
    whole_card: bool = False
    """Whether its memory is all that is taken of the card (nvidia-smi), not what torch or Paddle gave out."""

    @property
    def cluster(self) -> Cluster:
        """The cards it ran on; all five tables are of one machine."""
        return Cluster(card_named(self.gpu), self.gpus, gpus_per_node=max(8, self.gpus))

    @property
    def memory_gib(self) -> float | None:
        value: float | None = self.figures.get("peak_memory_gib")
        return value

    def plan(self) -> Plan:
        """What the planner says of it."""
        return plan(self.recipe, self.cluster, program=self.program)

    def planned_memory_gib(self, made: Plan) -> float:
        """The plan's figure of what that document shows."""
        memory = made.memory
        return (memory.reserved + memory.context if self.whole_card else memory.allocated) / GIB

    def speeds(self, made: Plan) -> tuple[float, float | None]:
        """(planned, printed) in the row's own unit: tokens a second and GPU, or samples a second; None: none printed"""
        figures, speed = self.figures, made.speed
        if "tokens_per_second_per_gpu" in figures:
            return speed.tokens_per_second_per_gpu, figures["tokens_per_second_per_gpu"]
        if "seconds_per_sample" in figures:
            return speed.samples_per_second, 1 / figures["seconds_per_sample"]
        return speed.samples_per_second, figures.get("samples_per_second")

    @property
    def out_of_memory(self) -> bool:
        return bool(self.figures.get("oom"))


@dataclass(frozen=True)
class Published:
    """One document."""

    seed: str
    title: str
    source: str
    system: str
    gpu: str
    counts: dict[str, str]
    """What its figures count: speed, flops, memory."""
    rows: tuple[PublishedRow, ...]


def load_published() -> list[Published]:
    """All documents, by seed."""
    return [read_published(path) for path in sorted(FOLDER.glob("*.yaml"))]


def published_rows() -> Iterator[PublishedRow]:
    """The rows of all documents."""
    for document in load_published():
        yield from document.rows


def read_published(path: Path) -> Published:
    """One file. Raises UserError that names the row that is wrong."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    program = Program().with_values(values["program"])
    rows = tuple(_row(values, row, program, path) for row in values["rows"])
    heads = {key: values[key] for key in ("seed", "title", "source", "system", "gpu", "counts")}
    return Published(rows=rows, **heads)


def _row(values: dict[str, Any], row: dict[str, Any], program: Program, path: Path) -> PublishedRow:
    figures, units = dict(row["published"]), values.get("units", {})
    unit = MEMORY_UNITS[units.get("memory", "GiB")]
    if "memory" in figures:
        figures["peak_memory_gib"] = figures.pop("memory") * unit / GIB
    overrides = [f"{key}={'null' if value is None else value}" for key, value in row["set"].items()]
    try:
        recipe = load_recipe(values["recipe"], overrides)
    except UserError as error:
        raise UserError(f"{path.name}, row {row['name']}: {error}") from None
    own = program.with_values(row.get("program", {}))
    place = {"gpu": values["gpu"], "gpus": row["gpus"], "use": row["use"], "whole_card": units.get("of") == "the card"}
    return PublishedRow(
        values["seed"], values["system"], row["name"], recipe=recipe, program=own, figures=figures, **place
    )
