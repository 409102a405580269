"""From a name, a file or a mapping to a checked `Recipe`. No torch.

Owns finding recipes, inheritance (`base:`), `key.path=value` overrides, and turning every fault into one line that
names the key, the value and the nearest thing that works. What the keys mean is in `schema.py`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from trainwright.errors import UserError
from trainwright.recipe.schema import Recipe

LIBRARY = Path(__file__).parent / "library"

# Keys that say the same thing in different ways: setting one in a later layer (a file over its base, an override over
# the file) takes the others of its group away, so `train.tokens=1e9` works on a recipe that counts steps.
ALTERNATIVES = [
    {"model.path", "model.config"},
    {"data.path", "data.sources"},
    {"train.steps", "train.epochs", "train.tokens"},
    {"train.global_batch_size", "train.gradient_accumulation_steps"},
]


# What the readers of YAML and JSON let through besides their own errors: 2024-13-45 is no date, 0b_ no number, and a
# thousand brackets are too deep.
UNREADABLE = (ValueError, TypeError, AttributeError, RecursionError)
TRIED = (["bool"], ["int"], ["float"], ["str"])  # ends of pydantic's locations that are no keys


class _RecipeYaml(yaml.SafeLoader):
    """Safe YAML that reads 2e-5 as a number, and refuses a key given twice."""


def _mapping_without_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]  # `<<: *other` may repeat a key
    keys = [loader.construct_object(key, deep=True) for key in own]
    for key in keys:
        if not isinstance(key, Hashable):
            problem = f"a key is one word, this is {key!r}: quote it if it is text"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        if keys.count(key) > 1:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=node.start_mark)
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node, deep=True))


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"key {twice!r} is given twice")
    return dict(pairs)


_RecipeYaml.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)
# YAML 1.1 wants a dot and a sign in 2.0e-5; people write 2e-5 and 1e9.
_RecipeYaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:float"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeYaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*([eE][-+]?\d+)|\d[\d_]*\.[\d_]*|\.\d[\d_]*([eE][-+]?\d+)?|\.(inf|nan))$"),
    list("-+0123456789."),
)


def library_names() -> list[str]:
    """The shipped recipes, by the name that `load_recipe` takes."""
    return sorted(str(path.relative_to(LIBRARY).with_suffix("")) for path in LIBRARY.rglob("*.yaml"))


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """A checked recipe from a shipped name, a YAML or JSON file, or a mapping.

    `overrides` are words like `train.steps=10`, applied last. Raises UserError with one line for any fault.
    """
    if isinstance(source, Mapping):
        origin, layers = "the recipe", [dict(source)]
        layers = _with_bases(layers[0], Path.cwd(), ())
    else:
        path = find(str(source))
        origin, layers = str(source), _with_bases(_own(path), path.parent, (path,))
    layers += [_override(word) for word in overrides]
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(_without_replaced(merged, layer), layer)
    return validate(merged, origin)


def validate(values: dict[str, Any], origin: str) -> Recipe:
    """Checks a whole tree of values; `origin` names it in errors."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{origin}: {problems(error, Recipe)}") from None


def find(name: str) -> Path:
    """The file of a shipped name or a path. Raises UserError that names the nearest shipped recipe."""
    if name in library_names():
        return LIBRARY / f"{name}.yaml"
    path = Path(name)
    if os.path.isdir(name):  # of os: a name that no file can have is no error there
        path = path / "recipe.yaml"  # a run's folder: run it again
    if os.path.isfile(path):
        return path
    nearest = difflib.get_close_matches(name, library_names(), n=1, cutoff=0.3)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise UserError(
        f"no recipe {name[:200]}: it is neither a file nor a shipped name; {hint}`trainwright recipes` lists them"
    )


def _own(path: Path) -> dict[str, Any]:
    """The keys of a recipe file. Raises UserError for files of other tools, which `recipes import` reads."""
    values = {} if path.suffix == ".toml" else read_mapping(path)
    if path.suffix == ".toml" or {"model_name_or_path", "base_model"} & set(values):
        raise UserError(f"{path} is another tool's file: `trainwright recipes import {path}` makes a recipe of it")
    return values


def read_mapping(path: Path, what: str = "recipe", first: str = "task") -> dict[str, Any]:
    """The keys of a YAML or JSON file, `what` in errors. Raises UserError that says where the file is wrong."""
    named = f"{'an' if what[0] in 'aeiou' else 'a'} {what}"
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            values = json.loads(text, object_pairs_hook=_object_without_duplicates)
        else:
            values = yaml.load(text, Loader=_RecipeYaml)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except (OSError, *UNREADABLE) as error:
        raise UserError(f"{path}: cannot be read as {named}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: {named} is a mapping of keys, this is {type(values).__name__}: start with `{first}:`")
    return values


def _with_bases(values: dict[str, Any], folder: Path, seen: tuple[Path, ...]) -> list[dict[str, Any]]:
    """The layers of a recipe, deepest base first."""
    values = dict(values)
    base = values.pop("base", None)
    if base is None:
        return [values]
    beside = folder / str(base)
    path = beside if os.path.isfile(beside) else find(str(base))
    if path in seen:
        raise UserError(
            f"base: {base} inherits from itself ({' -> '.join(p.name for p in (*seen, path))}): break the loop"
        )
    return [*_with_bases(read_mapping(path), path.parent, (*seen, path)), values]


def _override(word: str) -> dict[str, Any]:
    """`train.steps=10` as a nested mapping."""
    key, equals, text = word.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"override {word!r} is not key.path=value: write it like train.steps=10")
    if parts == ["base"]:
        raise UserError(f"override {word!r}: a base is named in a recipe file; name {text} in place of the recipe")
    try:
        value = yaml.load(text, Loader=_RecipeYaml) if text else ""
    except (yaml.YAMLError, *UNREADABLE):
        value = text
    nested: Any = value
    for part in reversed(parts):
        nested = {part: nested}
    return dict(nested)


def _without_replaced(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` without the keys whose alternative `above` sets."""
    kept = dict(below)
    for group in ALTERNATIVES:
        section = next(iter(group)).partition(".")[0]
        names = {path.partition(".")[2] for path in group}
        changes, old = above.get(section), kept.get(section)
        if not isinstance(changes, Mapping) or not isinstance(old, Mapping):
            continue
        chosen = {name for name in names if changes.get(name)}
        if chosen:
            kept[section] = {key: value for key, value in old.items() if key not in names - chosen}
    return kept


def _merge(below: Mapping[str, Any], above: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`above` over `below`: mappings join, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, list) and all(str(index).isdecimal() for index in value):
            merged[key] = _merge_list(old, value, f"{prefix}{key}")
        elif isinstance(value, Mapping):
            merged[key] = _merge(old if isinstance(old, Mapping) else {}, value, f"{prefix}{key}.")
        else:
            merged[key] = value
    return merged


def _merge_list(items: list[Any], changes: Mapping[str, Any], path: str) -> list[Any]:
    """Overrides such as data.sources.0.weight=2 on a list."""
    merged = list(items)
    for index, value in changes.items():
        if int(index) >= len(merged):
            raise UserError(f"{path}.{index}: the list has {len(merged)} entries: use an index below that")
        old = merged[int(index)]
        merged[int(index)] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def problems(error: ValidationError, root: type[BaseModel]) -> str:
    """Everything that pydantic found wrong in a tree of `root`, on one line."""
    return "; ".join(dict.fromkeys(_one_line(dict(problem), root) for problem in error.errors()))


def _one_line(problem: dict[str, Any], root: type[BaseModel]) -> str:
    """One pydantic problem as key, value, limit and fix."""
    location = [part for part in problem["loc"] if not str(part).startswith(("function-", "literal[", "constrained-"))]
    if location[-1:] in TRIED and problem["type"] not in ("extra_forbidden", "missing"):
        location.pop()
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        section = _section_at(location[:-1], root)
        known = list(section.model_fields) if section else []
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
        fix = f"did you mean {nearest[0]}?" if nearest else f"known keys there: {', '.join(known)}"
        return f"{key} is not a key: {fix}"
    if problem["type"] == "missing":
        return f"{key} is missing: it has no default"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return message
    given = repr(problem["input"])
    given = given if len(given) <= 200 else f"{given[:200]}..."
    section = _section_at(location, root) if problem["type"] == "model_type" else None
    if section is not None:
        return f"{key}={given}: it holds keys of its own: {', '.join(section.model_fields)}"
    return f"{key}={given}: {message[:1].lower()}{message[1:]}"


def _section_at(location: list[Any], root: type[BaseModel]) -> type[BaseModel] | None:
    """The section of `root` that a location of pydantic's leads to."""
    section: type[BaseModel] | None = root
    for part in location:
        if section is None or isinstance(part, int) or part not in section.model_fields:
            continue
        section = _section_in(section.model_fields[part].annotation)
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType, list, dict, tuple):
        return next((found for arg in get_args(annotation) if (found := _section_in(arg))), None)
    return None
