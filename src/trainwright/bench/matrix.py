"""A benchmark matrix: which variations of which recipes are run, how long, and what stands beside them. No torch.

    title: Llama-2-7B LoRA in fp16 over batch and length
    recipe: llama2_7b/lora_512            # a shipped name, a file (also beside the matrix), or a mapping
    axes: {train.micro_batch_size: [4, 8, 16], data.seq_len: [512, 1024]}     # crossed; `gpus` and `recipe` may be axes
    rows:                                 # listed; each is crossed with the axes where there are both
      - {name: "fp16 4 x 512", set: {train.micro_batch_size: 4}, published: "fp16 4 x 512"}
    exclude: [{train.micro_batch_size: 16, data.seq_len: 1024}]

Owns the file's keys and their expansion into named settings; `cell.py` makes recipes of them. What is wrong with a
matrix is one `UserError`, before anything runs.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from trainwright.errors import UserError
from trainwright.recipe.load import problems, read_mapping
from trainwright.recipe.strict import Section

MATRICES = Path(__file__).parent / "matrices"
RecipeSource = str | dict[str, Any]
PLACE = ("gpus", "recipe")  # axes that are keys of a row and not of a recipe


class MatrixRow(Section):
    """One listed row. Whatever it leaves out is the matrix's."""

    name: str | None = Field(None, description="names the row in tables; default: what was set")
    recipe: RecipeSource | None = Field(None, description="instead of the matrix's")
    gpus: int | None = Field(None, ge=1, description="processes")
    set: dict[str, Any] = Field(default_factory=dict, description="keys of the recipe, such as train.micro_batch_size")
    warmup_steps: int | None = Field(None, ge=0, description="steps that are not measured")
    measured_steps: int | None = Field(None, ge=1, description="steps that are")
    time_limit_seconds: float | None = Field(None, gt=0, description="a cell that takes longer is ended")
    memory_gib: float | None = Field(None, gt=0, description="act as a card with this much memory")
    published: str | None = Field(None, description="the row of the published table that this one is")
    align_with: str | None = Field(None, description="the row, or the run's folder, whose losses these must follow")
    note: str = Field("", description="what one must know of this row, such as what was scaled; printed beside it")


class Matrix(Section):
    """A file of bench/matrices, or a user's own."""

    title: str = Field(description="heads the tables")
    recipe: RecipeSource | None = Field(None, description="a shipped name, a file, or a mapping")
    gpus: int = Field(1, ge=1, description="processes of a cell")
    set: dict[str, Any] = Field(default_factory=dict, description="keys of the recipe for every cell")
    axes: dict[str, list[Any]] = Field(default_factory=dict, description="keys of the recipe, gpus, recipe: crossed")
    rows: list[MatrixRow] = Field(default_factory=list, description="listed cells")
    exclude: list[dict[str, Any]] = Field(default_factory=list, description="combinations that are left out")
    warmup_steps: int = Field(3, ge=0, description="steps that are not measured: they compile and fill caches")
    measured_steps: int = Field(10, ge=1, description="steps that are measured")
    time_limit_seconds: float = Field(600, gt=0, description="a cell that takes longer is ended")
    memory_gib: float | None = Field(None, gt=0, description="act as a card with this much memory")
    made: bool = Field(False, description="random weights and made tokens instead of model.path and data")
    published: str | None = Field(None, description="the published document that stands beside, such as 002")

    @model_validator(mode="after")
    def _whole(self) -> Matrix:
        for key, values in self.axes.items():
            if not values:
                raise ValueError(f"axes.{key} has no values: list some, or leave the axis out")
        for number, row in enumerate(self.rows):
            where = row.name or f"rows.{number}"
            both = [key for key in self.axes if key in row.set or (key in PLACE and getattr(row, key) is not None)]
            if both:
                raise ValueError(f"{where} sets {both[0]}, which is an axis too: keep one")
            if row.recipe is None and self.recipe is None and "recipe" not in self.axes:
                raise ValueError(f"{where} has no recipe: set one there, or for the whole matrix")
            if row.published is not None and self.published is None:
                raise ValueError(f"{where}: published={row.published!r} needs the matrix's published, such as '002'")
        if not self.rows and self.recipe is None and "recipe" not in self.axes:
            raise ValueError("the matrix has no recipe: set one, for all cells or in each row")
        return self


class Setting(Section):
    """One cell of an expanded matrix, not yet a recipe: everything that a row may leave out is said."""

    name: str
    recipe: RecipeSource
    gpus: int = Field(ge=1)
    set: dict[str, Any]
    warmup_steps: int
    measured_steps: int
    time_limit_seconds: float
    memory_gib: float | None
    made: bool
    published: str | None
    align_with: str | None
    note: str
    overrides: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """`set` as a command line has it, and what a command line said."""
        return [*(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in self.set.items()), *self.overrides]


def expand(matrix: Matrix) -> list[Setting]:
    """Rows x axes less exclusions, rows first, the last axis fastest.

    Raises UserError for an exclusion that meets nothing, for two cells of one name, and where nothing is left.
    """
    settings = [setting for setting in _crossed(matrix) if not _excluded(setting, matrix)]
    if not settings:
        raise UserError(f"{matrix.title}: no cell is left: exclude less")
    names = [setting.name for setting in settings]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{matrix.title}: two cells are called {twice!r}: give rows names of their own")
    for combination in matrix.exclude:
        _check_exclusion(combination, matrix)
    return settings


def _crossed(matrix: Matrix) -> Iterator[Setting]:
    for row in matrix.rows or [MatrixRow()]:
        for values in itertools.product(*matrix.axes.values()):
            yield _setting(matrix, row, dict(zip(matrix.axes, values, strict=True)))


def _setting(matrix: Matrix, row: MatrixRow, chosen: Mapping[str, Any]) -> Setting:
    """A row at one point of the axes."""
    keys = ("warmup_steps", "measured_steps", "time_limit_seconds", "memory_gib", "gpus", "recipe")
    own = {key: getattr(row, key) if getattr(row, key) is not None else getattr(matrix, key) for key in keys}
    place = {key: value for key, value in chosen.items() if key in PLACE}
    point = {key: value for key, value in chosen.items() if key not in PLACE}
    words = " ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in chosen.items())
    set_here = {} if row.name else row.set
    spelled = " ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in set_here.items())
    recipe = {**own, **place}["recipe"]
    plain = recipe if isinstance(recipe, str) else str(recipe.get("name", "recipe"))
    try:
        return Setting.model_validate(
            {
                **own,
                **place,
                "name": " ".join(word for word in (row.name or spelled, words) if word) or plain,
                "set": {**matrix.set, **row.set, **point},
                "made": matrix.made,
                "published": row.published,
                "align_with": row.align_with,
                "note": row.note,
            }
        )
    except ValidationError as error:
        raise UserError(f"{matrix.title}: {problems(error, Setting)}") from None


def _short(value: Any) -> str:
    return str(value.get("name", "recipe")) if isinstance(value, Mapping) else str(value)


def _values(setting: Setting) -> dict[str, Any]:
    """What an exclusion is compared with."""
    return {**setting.set, "gpus": setting.gpus, "recipe": setting.recipe}


def _excluded(setting: Setting, matrix: Matrix) -> bool:
    return any(_meets(each, _values(setting)) for each in matrix.exclude)


def _meets(combination: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    return all(key in values and values[key] == value for key, value in combination.items())


def _check_exclusion(combination: Mapping[str, Any], matrix: Matrix) -> None:
    """An exclusion that meets no cell is a slip of the pen."""
    everything = [_values(setting) for setting in _crossed(matrix)]
    known = sorted({key for values in everything for key in values})
    for key in combination:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            fix = f"did you mean {nearest[0]}?" if nearest else f"cells differ in {', '.join(known)}"
            raise UserError(f"{matrix.title}: exclude names {key}, which no cell sets: {fix}")
    if not any(_meets(combination, values) for values in everything):
        raise UserError(f"{matrix.title}: exclude {dict(combination)} meets no cell: leave it out, or mend its values")


# ---- finding and reading files


def matrix_names() -> list[str]:
    """The shipped matrices."""
    return sorted(path.stem for path in MATRICES.glob("*.yaml"))


def find_matrix(name: str) -> Path:
    """The file of a shipped matrix (`002_peft`, or `002` where it is the only one), or a path."""
    path = Path(name)
    if path.is_file():
        return path
    names = matrix_names()
    if name in names:
        return MATRICES / f"{name}.yaml"
    started = [each for each in names if each.startswith(name)] if name else []
    if len(started) == 1:
        return MATRICES / f"{started[0]}.yaml"
    if started:
        raise UserError(f"{name} may be {' or '.join(started)}: say which")
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise UserError(
        f"no matrix {name}: it is neither a file nor a shipped name; {hint}`trainwright bench --list` has them"
    )


def read_matrix(path: Path) -> Matrix:
    """A checked matrix. Its recipes that are files are found beside it. Raises UserError with one line."""
    values = read_mapping(path, "matrix", "title")
    try:
        matrix = Matrix.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {problems(error, Matrix)}") from None

    def beside(source: RecipeSource | None) -> RecipeSource | None:
        near = path.parent / source if isinstance(source, str) else None
        return str(near) if near is not None and near.is_file() else source

    rows = [row.model_copy(update={"recipe": beside(row.recipe)}) for row in matrix.rows]
    axes = {
        key: [beside(each) for each in values] if key == "recipe" else values for key, values in matrix.axes.items()
    }
    return matrix.model_copy(update={"recipe": beside(matrix.recipe), "rows": rows, "axes": axes})
