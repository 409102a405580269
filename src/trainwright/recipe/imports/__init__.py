"""Other tools' argument files to recipes: finds the tool by looking, and says what could not be carried. No torch.

One file a tool, each with a table of its keys; `reading.py` keeps count of what became of every key, so that none is
lost in silence. `trainwright recipes import` is the verb.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainwright.errors import UserError
from trainwright.recipe.imports import axolotl, llamafactory, paddlenlp, torchtitan
from trainwright.recipe.imports.reading import NotCarried, Reading
from trainwright.recipe.load import load_recipe, read_mapping
from trainwright.recipe.schema import Recipe

TOOLS = {tool.NAME: tool for tool in (paddlenlp, llamafactory, axolotl, torchtitan)}


@dataclass(frozen=True)
class Imported:
    """A recipe made of another tool's file. `values`: what differs from the defaults, `recipe`: all of it."""

    kind: str
    file: Path
    values: dict[str, Any]
    recipe: Recipe
    not_carried: list[NotCarried]

    def to_yaml(self) -> str:
        """The recipe file: what was carried, and behind it, as comments, what was not."""
        head = f"# imported from {self.file.name} ({self.kind})\n"
        body = yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True, width=120)
        lines = [f"#   {each}\n" for each in self.not_carried]
        return head + body + ("# not carried:\n" + "".join(lines) if lines else "")


def import_file(
    file: Path, kind: str | None = None, *, gpus: int | None = None, overrides: Iterable[str] = ()
) -> Imported:
    """Reads an argument file of PaddleNLP, LLaMA-Factory, axolotl or torchtitan.

    Args:
        kind: the tool's name; None looks at the keys.
        gpus: processes it ran on, for files whose degrees follow from them.
        overrides: words like `data.path=FILE`, applied last.

    Raises:
        UserError: the file cannot be read, belongs to no known tool, or asks for what there is no recipe for.
    """
    found = _read(file)
    kind = kind or _kind_of(found, file)
    if kind not in TOOLS:
        raise UserError(f"--kind {kind} is no tool that is read: use {', '.join(TOOLS)}")
    if gpus is not None and gpus < 1:
        raise UserError(f"--gpus {gpus}: say how many processes the file was for, 1 or more")
    overrides = tuple(overrides)
    reading = Reading(found, kind, file, gpus, TOOLS[kind].IGNORED, overrides)
    TOOLS[kind].read(reading)
    not_carried = reading.finish()
    try:
        recipe = load_recipe(reading.recipe, overrides)
    except UserError as error:
        words = str(error).removeprefix("the recipe: ")
        raise UserError(f"{file}: as a recipe: {words}; mend it behind the file, such as data.path=FILE") from None
    values = {"name": recipe.name, "task": recipe.task, **recipe.model_dump(mode="json", exclude_defaults=True)}
    return Imported(kind, file, _plain(values), recipe, not_carried)


def _plain(value: Any) -> Any:
    """Whole numbers without a point, as people write them."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value == int(value) and abs(value) >= 1 else value


def _read(file: Path) -> dict[str, Any]:
    """The keys of a JSON, YAML or TOML file."""
    if file.suffix != ".toml":
        return read_mapping(file, "argument file", "model_name_or_path")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{file}: cannot be read as an argument file: {error}") from None


def _kind_of(found: Mapping[str, Any], file: Path) -> str:
    """The tool whose own keys the file has. Raises UserError where none or several fit."""
    looks: dict[str, Callable[[Mapping[str, Any]], bool]] = {name: tool.looks_like for name, tool in TOOLS.items()}
    fitting = [name for name, looks_like in looks.items() if looks_like(found)]
    if len(fitting) == 1:
        return fitting[0]
    if "task" in found or {"data", "train"} <= set(found):
        raise UserError(f"{file} is a recipe already: train it with `trainwright train {file}`")
    keys = json.dumps(sorted(map(str, found))[:8])
    what = f"may be of {' or '.join(fitting)}" if fitting else f"has the keys of no known tool ({keys} ...)"
    raise UserError(f"{file} {what}: say --kind {', '.join(TOOLS)}")
