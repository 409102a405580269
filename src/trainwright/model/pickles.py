"""Turns a folder of torch pickles (pytorch_model*.bin) into safetensors, once, so that training never meets a pickle.

The reader is torch's restricted one (`weights_only`): it builds tensors and plain containers, and any other name in the
file is an error before it is looked up, so nothing in the file is run. Tensor names and config stay as they are.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainwright.errors import UserError
from trainwright.model.folder import INDEX, SINGLE, read_index
from trainwright.model.store import beside, finish, write_index, write_tensors

_INDEX = "pytorch_model.bin.index.json"
_KEPT = ("*.json", "*.model", "*.tiktoken", "*.jinja", "merges.txt", "LICENSE*", "README.md")


def import_pickles(folder: str | Path, target: str | Path) -> Path:
    """Writes `target`, a copy of `folder` whose weights are safetensors; -> target. One file in memory at a time.

    Raises UserError for a folder without pickles, a missing shard, or a file that wants to build anything but tensors.
    """
    source, target = Path(folder), Path(target)
    if target.exists():
        raise UserError(f"{target} exists: choose another name, nothing was written")
    shards = _shards(source)
    index: dict[str, str] = {}
    total = 0
    with beside(target) as made:
        for number, shard in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = read_pickle(shard)
            _write(tensors, made / name)
            index |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if len(shards) > 1:
            write_index(made / INDEX, index, total)
        for pattern in _KEPT:
            for file in source.glob(pattern):
                if file.name != _INDEX:
                    shutil.copyfile(file, made / file.name)
        finish(made, target)
    return target


def _shards(folder: Path) -> list[Path]:
    if (folder / _INDEX).exists():
        shards = [folder / name for name in sorted(set(read_index(folder / _INDEX).values()))]
    else:
        shards = sorted(file for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        shards = [file for file in shards if not file.name.startswith(("training_args", "optimizer", "scheduler"))]
    if not shards:
        raise UserError(f"{folder} holds no .bin, .pt or .pth file: there is nothing to convert")
    return shards


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of one file by name. Builds nothing but tensors; a file that wants more is refused."""
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:  # the unpickler raises many kinds; each means that the file is not plain weights
        lines = str(error).split("\n")
        reason = next((line for line in lines if "Unsupported" in line), lines[0]).split(". ")[0]
        raise UserError(
            f"{file} holds more than tensors, or is damaged, and was not read: {reason or type(error).__name__}"
        ) from error
    for key in ("state_dict", "module", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise UserError(f"{file} holds {type(found).__name__}, not weights by name")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{file} holds no tensors: it is not a file of weights")
    return tensors


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    """Tensors that share memory (tied weights) are written each for itself, as safetensors asks."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        start = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if start in seen or not tensor.is_contiguous() else tensor
        seen.add(start)
    write_tensors(file, {name: tensor.contiguous() for name, tensor in own.items()})
