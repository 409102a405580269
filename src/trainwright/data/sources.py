"""A source of the recipe to the files behind it, with their format: `resolve`.

Owns paths, folders, globs, `datasets` folders, hub ids, the shipped data set and made tokens, finding the format by
looking at the first row, and the fingerprint of a source. Reading rows is in readers.py; Megatron's .bin/.idx in
indexed.py.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from trainwright import hub
from trainwright.data.arithmetic import Arithmetic
from trainwright.data.formats import BadRow, check_columns, detect
from trainwright.data.made import MadeTokens
from trainwright.data.readers import DataFile, RowReader, look, places
from trainwright.errors import UserError

if TYPE_CHECKING:
    from trainwright.recipe.data import SourceRecipe  # worker processes start faster without pydantic

HUB_ID = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<glob>.+))?")
DATA_NAMES = ("*.jsonl*", "*.ndjson*", "*.json", "*.json.*", "*.txt*", "*.parquet", "*.arrow")
# Files that describe a data set and hold none of it.
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
WHOLE_DIGEST_BYTES = 64 * 2**20
LOOKED_AT = 100


@dataclass(frozen=True)
class Source:
    """Where rows come from and how to read them. `indexed` are prefixes of .bin/.idx pairs; else `files` is filled."""

    name: str
    format: str
    files: tuple[DataFile, ...] = ()
    indexed: tuple[str, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)
    empty_files: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Source:
        files = tuple(DataFile(*file) for file in stored["files"])
        return cls(**{**stored, "files": files, "indexed": tuple(stored["indexed"])})

    def fingerprint(self) -> list[Any]:
        """What decides the rows of this source: equal fingerprints give equal rows."""
        read = [[*file[1:], _digest(file.path)] for file in self.files]
        indexed = [[_digest(f"{prefix}.idx"), _digest(f"{prefix}.bin")] for prefix in self.indexed]
        return [self.format, sorted(self.columns.items()), read, indexed]


def resolve(source: SourceRecipe, shipped: Path, max_line_bytes: int) -> Source:
    """Finds the files and the format of a source. The shipped data set is written into folder `shipped` first.

    Raises:
        UserError: nothing is there, it is empty, or no format fits.
    """
    spec, path = source.path, source.path
    check_columns(source.columns)
    if spec.startswith("made:"):
        return Source(spec, "indexed", indexed=(str(_write_made(spec, shipped)),))
    if spec.startswith("shipped:"):
        path = str(_write_shipped(spec, source.split, shipped))
    elif spec.startswith("hf:"):
        path = str(_download(spec))
    elif re.match(r"[a-z]+:", spec) and not os.path.exists(spec):
        raise UserError(f"data path {spec!r}: {spec.partition(':')[0]}: is unknown, use a path, shipped:, made: or hf:")
    if source.format == "indexed" or path.endswith((".bin", ".idx")):
        return Source(spec, "indexed", indexed=_indexed_prefixes(path))

    hub = spec.startswith("hf:")
    files = [_look(name, source) for name in _paths(path, source, hub)]
    kinds = {"JSON" if file.kind in ("lines", "array") else file.kind for file in files}
    if len(kinds) > 1:
        raise UserError(f"{spec} mixes {' and '.join(sorted(kinds))} files: name one kind with a glob such as *.jsonl")
    filled = [file for file in files if os.path.getsize(file.path) > 0]
    if not filled:
        raise UserError(f"{spec} is empty: {len(files)} file(s) of 0 bytes")
    form, columns = _look_for_format(spec, source, filled, max_line_bytes)
    return Source(spec, form, tuple(filled), columns=columns, empty_files=len(files) - len(filled))


# ---- files ----


def _paths(path: str, source: SourceRecipe, hub: bool) -> list[Path]:
    """The data files that `path` names, in sorted order."""
    expanded = Path(os.path.expanduser(path))  # which leaves an unknown ~user as it is
    if expanded.is_dir():
        return _folder(expanded, source, hub)
    if expanded.is_file():
        return [expanded]
    if glob.has_magic(path):
        found = [Path(name) for name in sorted(glob.glob(str(expanded), recursive=True))]
        if files := [name for name in found if name.is_file()]:
            return files
        raise UserError(f"{path} matches {'only folders' if found else 'no file'}: check the pattern")
    raise UserError(f"{path} does not exist: give a file, a folder or a glob")


def _folder(folder: Path, source: SourceRecipe, hub: bool) -> list[Path]:
    """The files of a folder: of a `datasets` folder those it lists, else every data file by name and split."""
    if (folder / "dataset_dict.json").exists():
        splits = _listed(folder / "dataset_dict.json", "splits")
        wanted = source.split or ("train" if "train" in splits else None)
        if wanted not in splits:
            raise UserError(f"{folder} has the splits {', '.join(splits)}, not {wanted}: set data.sources[].split")
        folder = folder / _inside(wanted, folder)
    if (folder / "state.json").exists():
        listed = _listed(folder / "state.json", "_data_files")
        return [folder / _inside(entry["filename"] if isinstance(entry, dict) else entry, folder) for entry in listed]
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.name not in NOT_DATA
        and look(path) is not None
    )
    split = source.split or ("train" if hub else None)
    if split is not None:
        named = re.compile(rf"(^|[/_.-]){re.escape(split)}([/_.-]|$)")
        chosen = [path for path in found if named.search(path.relative_to(folder).as_posix())]
        if source.split and found and not chosen:
            raise UserError(f"{folder} has no file for split {split!r} among {len(found)} data files")
        found = chosen or found
    if not found:
        raise UserError(f"{folder} is a folder without data files: expected {', '.join(DATA_NAMES)}, or name a file")
    return found


def _listed(path: Path, key: str) -> list[Any]:
    """A list inside a JSON file that `datasets` wrote."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))[key]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of a `datasets` folder: {error}") from None
    if not isinstance(listed, list):
        raise UserError(f"{path}: {key} is no list")
    return listed


def _inside(name: object, folder: Path) -> str:
    """`name`, when it stays inside `folder`: a data set must not point at other files of the machine."""
    if not isinstance(name, str) or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder} names the file {name!r}, which is outside of it: refused")
    return name


def _look(path: Path, source: SourceRecipe) -> DataFile:
    found = look(path, source.document)
    if found is None and source.format == "text":
        found = DataFile(str(path), "text", "", source.document)
    if found is None:
        raise UserError(
            f"{path} is no data file that is known: use {', '.join(DATA_NAMES)}, .bin/.idx, or data.format=text"
        )
    return found


def _indexed_prefixes(path: str) -> tuple[str, ...]:
    """Prefixes of Megatron's file pairs: of the prefix itself, of one of its two files, or of a glob or folder."""
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        expanded = os.path.join(expanded, "*.idx")
    names = sorted(glob.glob(expanded)) if glob.has_magic(expanded) else [expanded]
    prefixes = tuple(dict.fromkeys(re.sub(r"\.(bin|idx)$", "", name) for name in names))
    if not prefixes:
        raise UserError(f"{path} holds no .bin/.idx pair")
    for prefix in prefixes:
        for suffix in (".idx", ".bin"):
            if not os.path.isfile(prefix + suffix):
                raise UserError(f"{prefix}{suffix} does not exist: an indexed data set is a .bin and a .idx file")
    return prefixes


def _look_for_format(
    spec: str, source: SourceRecipe, files: list[DataFile], max_line_bytes: int
) -> tuple[str, dict[str, str]]:
    """The format that the first readable row shows, with the column map that reads it.

    Every name in the map must stand in one of the first rows: a misspelled one would drop what it should read.
    """
    first_bad = ""
    found: tuple[str, dict[str, str]] | None = None
    unseen = set(source.columns.values())
    for file in files:
        reader = RowReader(file, max_line_bytes)
        for tried, (at, row, bad) in enumerate(reader.read(0, max_line_bytes)):
            if tried >= LOOKED_AT or (found and not unseen):
                break
            try:
                if not bad and not isinstance(row, dict):
                    raise BadRow("no object with keys")
                if not bad:
                    unseen -= row.keys()
                    found = found or detect(row, source.columns, source.format)
                    continue
            except BadRow as error:
                bad = str(error)
            first_bad = first_bad or f"{places(file, [at])[0]}: {bad}"
        reader.close()
        if found and unseen:
            raise UserError(
                f"data.sources[].columns: none of the first {LOOKED_AT} rows of {file.path} has a key "
                f"{' or '.join(map(repr, sorted(unseen)))}: correct the name, or take it out"
            )
        if found:
            return found
        if first_bad:
            break
    raise UserError(first_bad or f"{spec} holds no row: {len(files)} file(s) of blank lines")


# ---- the shipped data set and hubs ----


def _write_shipped(spec: str, split: str | None, folder: Path) -> Path:
    """Rows of the shipped data set as a JSONL file, written once for each choice of settings."""
    name, _, words = spec.removeprefix("shipped:").partition("?")
    if name != "arithmetic":
        raise UserError(f"{spec} is not shipped: use shipped:arithmetic")
    settings = dict(parse_qsl(words, keep_blank_values=True))
    if split is not None:
        settings["split"] = split
    rows = Arithmetic.parse(settings)
    path = folder / f"arithmetic-{hashlib.sha256(repr(rows).encode()).hexdigest()[:12]}.jsonl"
    written = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != written:  # the generator may have changed
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(written, encoding="utf-8")
        partial.replace(path)
    return path


def _write_made(spec: str, folder: Path) -> Path:
    """Made tokens as a .bin/.idx pair, written once for each choice of settings; -> its prefix."""
    name, _, words = spec.removeprefix("made:").partition("?")
    if name != "tokens":
        raise UserError(f"{spec} cannot be made: use made:tokens?rows=64&length=512&vocab=32000")
    made = MadeTokens.parse(dict(parse_qsl(words, keep_blank_values=True)))
    prefix = folder / f"tokens-{hashlib.sha256(repr(made).encode()).hexdigest()[:12]}"
    index = prefix.with_name(f"{prefix.name}.idx")
    if not index.exists():  # the index comes last: where it is, the tokens are
        folder.mkdir(parents=True, exist_ok=True)
        partial = prefix.with_name(f"{prefix.name}-{os.getpid()}")
        made.write(partial)
        for suffix in (".bin", ".idx"):
            partial.with_name(partial.name + suffix).replace(prefix.with_name(prefix.name + suffix))
    return prefix


def _download(spec: str) -> Path:
    """The data files of a hub data set, in the hub's own cache."""
    match = HUB_ID.fullmatch(spec)
    if match is None or ".." in spec:
        raise UserError(f"{spec!r} is no hub id: use hf:owner/name, hf:owner/name@revision or hf:owner/name:glob")
    patterns = [match["glob"]] if match["glob"] else DATA_NAMES
    revision = f"@{match['revision']}" if match["revision"] else ""
    return hub.fetch(f"hf:{match['name']}{revision}", patterns, kind="dataset")


def _digest(path: str) -> list[Any]:
    """Identity of a file's content: its hash, and for large files size, time of change and the hash of both ends."""
    status = os.stat(path)
    with open(path, "rb") as stream:
        if status.st_size <= WHOLE_DIGEST_BYTES:
            return [status.st_size, hashlib.file_digest(stream, "sha256").hexdigest()]
        ends = stream.read(2**20)
        stream.seek(-(2**20), os.SEEK_END)
        return [status.st_size, status.st_mtime_ns, hashlib.sha256(ends + stream.read()).hexdigest()]
