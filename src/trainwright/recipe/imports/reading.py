"""Reading one argument file: every key is carried, known to change nothing, or listed with a reason. No torch.

Owns that count, the conversions of plain values and the words of refusals. What keys mean is in each tool's file.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainwright.errors import UserError


@dataclass(frozen=True)
class NotCarried:
    """A key that has no place in a recipe, and why, with what is nearest."""

    key: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key} = {json.dumps(self.value, ensure_ascii=False, default=str)}: {self.why}"

    def as_dict(self) -> dict[str, Any]:
        return {"key": self.key, "value": self.value, "why": self.why}


@dataclass(frozen=True)
class Ignored:
    """A known key that a recipe has no place for. `fine`: values that change nothing here, so nobody needs to hear."""

    why: str
    fine: tuple[Any, ...] | None = ()

    def concerns(self, value: Any) -> bool:
        """Whether this value should be heard of. `fine=None`: no value does."""
        return self.fine is not None and not any(value == each and type(value) is type(each) for each in self.fine)


def quiet(keys: str) -> dict[str, Ignored]:
    """Keys that change nothing here whatever they say: files, logs, kernels that compute the same."""
    return dict.fromkeys(keys.split(), Ignored("", fine=None))


def unless(why: str, *fine: Any, keys: str) -> dict[str, Ignored]:
    """Keys that are reported unless they have one of the values `fine`."""
    return dict.fromkeys(keys.split(), Ignored(why, fine))


class Reading:
    """One file on its way to a recipe: `take` what is understood, `put` what it becomes, `drop` what it cannot.

    Keys that are null count as not there. `flatten` makes keys like training.seq_len of tables.
    """

    def __init__(
        self,
        found: Mapping[str, Any],
        kind: str,
        file: Path,
        gpus: int | None,
        ignored: Mapping[str, Ignored],
        overrides: Iterable[str] = (),
    ) -> None:
        self.kind, self.file, self.gpus = kind, file, gpus
        self.told = {word.partition("=")[0] for word in overrides}
        self.ignored = ignored
        self.left = {key: value for key, value in found.items() if value is not None}
        self.asked = set(ignored)
        self.recipe: dict[str, Any] = {}
        self.dropped: list[NotCarried] = []

    # ---- what the file says

    def take(self, key: str, usual: Any = None) -> Any:
        """A value, no longer left; `usual` is what the tool does where the file is silent."""
        self.asked.add(key)
        return self.left.pop(key, usual)

    def has(self, key: str) -> bool:
        return key in self.left

    def number(self, key: str, usual: float | None = None) -> float | None:
        """A number, also where it is written as text, which YAML 1.1 makes of 2e-5."""
        value = self.take(key, usual)
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            return value
        try:
            return float(value)
        except (TypeError, ValueError):
            raise UserError(f"{self.file}: {key}={value!r} is no number") from None

    def whole(self, key: str, usual: int | None = None) -> int | None:
        """A whole number."""
        value = self.number(key, usual)
        if value is not None and value != int(value):
            raise UserError(f"{self.file}: {key}={value!r} is no whole number")
        return None if value is None else int(value)

    def flag(self, key: str, usual: bool = False) -> bool:
        """True or false, also as 1, 0 or text."""
        value = self.take(key, usual)
        if isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "1", "0"):
            return value.lower() in ("true", "yes", "1")
        if not isinstance(value, (bool, int)):
            raise UserError(f"{self.file}: {key}={value!r} is neither true nor false")
        return bool(value)

    def flatten(self, *sections: str) -> None:
        """Turns the tables `sections` into keys such as training.seq_len, and tables inside them likewise."""

        def flat(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
            if isinstance(value, Mapping):
                for key, inner in value.items():
                    yield from flat(f"{prefix}.{key}", inner)
            elif value is not None:
                yield prefix, value

        for section in sections or tuple(self.left):
            if isinstance(self.left.get(section), Mapping):
                self.left.update(flat(section, self.left.pop(section)))

    # ---- what becomes of it

    def put(self, path: str, value: Any) -> None:
        """Sets a key of the recipe; None sets nothing."""
        if value is None:
            return
        *sections, name = path.split(".")
        inner = self.recipe
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value

    def drop(self, key: str, value: Any, why: str) -> None:
        """Lists a key that could not be carried."""
        self.dropped.append(NotCarried(key, value, why))

    def needs(self, key: str, value: Any, why: str, *paths: str) -> None:
        """Refuses what there is no recipe without, unless one of `paths` is given on the command line instead."""
        if not self.told & set(paths):
            raise self.refuse(key, value, f"{why}; say {paths[0]}=... behind the file")
        if value is not None:
            self.drop(key, value, why)

    def refuse(self, key: str, value: Any, why: str) -> UserError:
        """The error for what there is no recipe for at all."""
        return UserError(f"{self.file}: {key}={value}: {why}")

    def finish(self) -> list[NotCarried]:
        """Accounts for the keys that nobody took; -> everything that was not carried."""
        for key, value in self.left.items():
            known = self.ignored.get(key)
            if known is not None:
                if known.concerns(value):
                    self.drop(key, value, known.why)
                continue
            nearest = difflib.get_close_matches(key, sorted(self.asked), n=1, cutoff=0.8)
            hint = f", near its {nearest[0]}" if nearest else ""
            self.drop(key, value, f"no key of {self.kind} that is known here{hint}")
        self.left = {}
        return self.dropped


# ---- values that several tools spell alike


def hub_or_folder(name: str, revision: str | None = None) -> str:
    """A model or data set as the tools write it: a folder or file stays, owner/name is a hub id."""
    local = name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).exists()
    if local or re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None or Path(name).suffix in (".json", ".jsonl", ".parquet"):
        return name
    return f"hf:{name}" + (f"@{revision}" if revision else "")


def put_sources(reading: Reading, sources: list[dict[str, Any]]) -> None:
    """Data sets as a recipe has them: one plain file as data.path, all else as data.sources."""
    if len(sources) == 1 and set(sources[0]) <= {"path", "format"}:
        for key, value in sources[0].items():
            reading.put(f"data.{key}", value)
    elif sources:
        reading.put("data.sources", sources)


def put_output(reading: Reading, folder: str | None, run_name: str | None = None) -> None:
    """`saves/llama3/sft` is the run `sft` in the folder `saves/llama3`."""
    if folder:
        path = Path(str(folder).rstrip("/"))
        reading.put("name", _name(run_name or path.name))
        if str(path.parent) not in (".", "/"):
            reading.put("output", str(path.parent))
    elif run_name:
        reading.put("name", _name(run_name))


def _name(text: str) -> str:
    """A run's name: letters, digits, dots, dashes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "run"
