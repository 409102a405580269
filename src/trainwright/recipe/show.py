"""A recipe as text: every value with its meaning, and the JSON Schema that editors complete from. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from trainwright.recipe.load import library_names
from trainwright.recipe.schema import Recipe

SCHEMA_FILE = Path(__file__).with_name("recipe.schema.json")
COLUMN = 46  # where comments start


def to_yaml(recipe: Recipe, *, comments: bool = True) -> str:
    """The whole recipe, every default written out; with `comments`, each key says what it means."""
    if not comments:
        return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    lines: list[str] = []
    _write(recipe, 0, lines)
    return "\n".join(lines) + "\n"


def _write(section: BaseModel, depth: int, lines: list[str]) -> None:
    pad = "  " * depth
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        about = f"# {field.description}" if field.description else ""
        if isinstance(value, BaseModel):
            lines.append(f"{pad}{name}:".ljust(COLUMN) + about)
            _write(value, depth + 1, lines)
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            lines.append(f"{pad}{name}:".ljust(COLUMN) + about)
            for item in value:
                inner: list[str] = []
                _write(item, depth + 2, inner)
                lines += [f"{pad}  - {inner[0].lstrip()}", *inner[1:]]
        else:
            lines.append(f"{pad}{name}: {_scalar(value)} ".ljust(COLUMN) + about)
    lines[:] = [line.rstrip() for line in lines]


def _scalar(value: Any) -> str:
    """One value in YAML's flow style, on one line."""
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, with `base` and the shipped names."""
    schema = Recipe.model_json_schema()
    schema["title"] = "Trainwright recipe"
    schema["properties"]["base"] = {
        "type": "string",
        "description": "inherit from a shipped recipe or a file beside this one",
        "examples": library_names(),
    }
    schema.pop("required", None)  # a recipe with a base may leave any section to it
    for part in schema["$defs"].values():
        part.pop("required", None)
    return schema


def write_schema(path: Path = SCHEMA_FILE) -> None:
    """Writes the schema file that ships with the package; a test keeps it current."""
    path.write_text(json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_text(name: str, recipe_file: Path) -> str:
    """A recipe to edit: its own text, with the line that lets editors complete keys."""
    header = f"# yaml-language-server: $schema={SCHEMA_FILE}\n# copied from {name}\n"
    return header + recipe_file.read_text(encoding="utf-8")
