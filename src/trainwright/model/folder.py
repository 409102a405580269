"""A model folder on disk: which file holds which tensor, and what is wrong with it, said in one line. Reads no weights.

Also turns `hf:owner/name` and `modelscope:owner/name` into a folder (`hub.py`): the only place of the model room that
touches the network, and only when such an id is named.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from trainwright import hub
from trainwright.errors import UserError
from trainwright.model.config import ModelConfig
from trainwright.model.families.family import Family, Weight
from trainwright.model.shapes import Shape, parameter_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types that weights may be in, as safetensors spells them."""
_WANTED = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "merges.txt"]


def resolve(path: str | Path) -> Path:
    """A folder: the one named, or a hub id's snapshot, downloaded if it is not there yet."""
    if hub.is_id(str(path)):
        return hub.fetch(str(path), _WANTED)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name a folder with config.json and safetensors, or hf:owner/name")
    return folder


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file} is not there: a model folder needs it") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds {type(value).__name__}, not an object of keys")
    return value


@dataclass(frozen=True)
class Stored:
    """Where a tensor is and what its header says."""

    file: Path
    shape: Shape
    dtype: str


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Name -> where it is, from the headers of all safetensors files; checks that they are whole."""
    told = read_index(folder / INDEX) if (folder / INDEX).exists() else {}
    if told:
        shards = sorted(set(told.values()))
    elif (folder / SINGLE).exists():
        shards = [SINGLE]
    else:
        shards = sorted(file.name for file in folder.glob("*.safetensors"))
    if not shards:
        raise UserError(_no_weights(folder))
    found: dict[str, Stored] = {}
    for shard in shards:
        for name, stored in _header(folder / shard).items():
            if name in found and name not in told:
                raise UserError(
                    f"{name} is in {found[name].file} and in {stored.file}: remove the file that is too much"
                )
            if told.get(name, shard) == shard:
                found[name] = stored
    return found


def read_index(file: Path) -> dict[str, str]:
    """Tensor -> the file beside the index that holds it. Names reach no other folder, and every file is there."""
    told = read_json(file).get("weight_map")
    if not isinstance(told, dict) or not told:
        raise UserError(f"{file} has no weight_map: download or copy it again, or remove it")
    for name, shard in told.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{file} puts {name} in {shard!r}, which is no file of its own folder: do not trust it")
    for shard in sorted(set(told.values())):
        if not (file.parent / shard).is_file():
            raise UserError(
                f"{file.parent / shard} is missing, {file.name} names it: download or copy that shard again"
            )
    return told


def _no_weights(folder: Path) -> str:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if not pickles:
        return f"{folder} holds no safetensors: the weights are not there"
    return (
        f"{folder} holds {pickles[0]}, a pickle, which may run code and is never read as one: "
        f"turn it into safetensors with `trainwright convert import {folder} NEW_FOLDER`"
    )


def _header(file: Path) -> dict[str, Stored]:
    """Parses a safetensors header: 8 bytes of length, JSON, then data that must reach to the last offset."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        text = stream.read(length) if length <= size - 8 else b""
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({size} bytes): download or copy it again") from error
    try:
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        found = {name: Stored(file, tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{file} has a header that is not safetensors': download or copy it again") from error
    if end != size:
        raise UserError(f"{file} is cut off: {size} bytes of {end}: download or copy it again")
    return found


def match(family: Family, config: ModelConfig, stored: dict[str, Stored]) -> list[tuple[Weight, list[str]]]:
    """Pairs every weight of the model with the names that hold it here; refuses what is missing, odd or left over."""
    shapes = parameter_shapes(config)
    weights = family.weights(config)
    prefix = next((p for p in family.prefixes if p + weights[0].theirs[0] in stored), family.prefixes[0])
    pairs = []
    left = set(stored)
    for weight in weights:
        # Newer saves put the prefix on all names but the head's.
        names = [name if prefix + name not in stored and name in stored else prefix + name for name in weight.theirs]
        expected = weight.their_shape([shapes[name] for name in weight.ours])
        for name in names:
            if name not in stored:
                raise UserError(_missing(name, family, stored))
            if stored[name].dtype not in FLOATS:
                raise UserError(
                    f"{name} in {stored[name].file} is of type {stored[name].dtype}: weights are {', '.join(FLOATS)}; "
                    "take the unquantized ones"
                )
            if stored[name].shape != expected:
                raise UserError(
                    f"{name} in {stored[name].file} is {list(stored[name].shape)}, config.json asks for "
                    f"{list(expected)}: config and weights are of different models, or the family is not {family.name}"
                )
        left -= set(names)
        pairs.append((weight, names))
    ignored = (*family.ignored, *family.constants(config), *(["*lm_head.weight"] if config.lm_head.tied else []))
    odd = sorted(name for name in left if not any(fnmatch(name, pattern) for pattern in ignored))
    if odd:
        place = f"{odd[0]} in {stored[odd[0]].file} ({len(odd)} such)"
        raise UserError(f"{place} has no place in the family {family.name}: say model.family, or remove them")
    return pairs


def _missing(name: str, family: Family, stored: dict[str, Stored]) -> str:
    folder = next(iter(stored.values())).file.parent
    return f"{name} is in no safetensors file of {folder}: a shard is missing, or the family is not {family.name}"


def check_tokenizer(folder: Path, config: ModelConfig) -> None:
    """The token table must reach the tokenizer's last id."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return
    tokenizer = read_json(file)
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    ids += [token["id"] for token in tokenizer.get("added_tokens") or ()]
    if ids and max(ids) >= config.vocab_size:
        raise UserError(
            f"{file} has ids up to {max(ids)}, the model's vocab_size is {config.vocab_size}: "
            "take the tokenizer that was published with these weights"
        )
