"""Writes model folders that are complete or absent: beside the target, synced, renamed. Knows nothing of models."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from trainwright.errors import UserError
from trainwright.model.folder import INDEX, SINGLE


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A new empty folder next to the target, for the files to be; gone again where they do not come to be."""
    made = target.with_name(f".{target.name}.partial")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, limit: int) -> str:
    """Fills safetensors files up to `limit` bytes, and the index of several; -> the first tensor's dtype in words.

    Holds one file's tensors at a time. File names say how many there are, so they are given last.
    """
    shards: list[tuple[Path, list[str]]] = []
    batch: dict[str, Tensor] = {}
    size = total = 0
    dtype = ""

    def flush() -> None:
        nonlocal batch, size
        file = folder / f"{len(shards)}.part"
        write_tensors(file, batch)
        shards.append((file, list(batch)))
        batch, size = {}, 0

    for name, tensor in tensors:
        dtype = dtype or str(tensor.dtype).removeprefix("torch.")
        if batch and size + tensor.nbytes > limit:
            flush()
        # A view would drag its whole storage along, or be refused for sharing it.
        batch[name] = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    index: dict[str, str] = {}
    for number, (file, names) in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file.rename(folder / name)
        index |= dict.fromkeys(names, name)
    if len(shards) > 1:
        write_index(folder / INDEX, index, total)
    return dtype


def write_tensors(file: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """One safetensors file. Raises UserError where the disk does not take it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, str(file), metadata={"format": "pt", **metadata})
    except SafetensorError as error:  # what a full disk is here
        raise UserError(f"{file.parent.parent}: the weights could not be written: {error}") from None


def write_index(file: Path, index: Mapping[str, str], total: int) -> None:
    write_json(file, {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))})


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def finish(made: Path, target: Path) -> None:
    """Syncs the folder and gives it its name. Into a folder that exists it goes file by file, config.json last, and old
    weights that are not replaced are removed."""
    for file in made.iterdir():
        _sync(file)
    if not target.exists():
        made.rename(target)
    else:
        names = {file.name for file in made.iterdir()}
        for file in sorted(made.iterdir(), key=lambda file: (file.suffix == ".json", file.name == "config.json")):
            os.replace(file, target / file.name)
        for old in [*target.glob("model*.safetensors"), target / INDEX]:
            if old.name not in names:
                old.unlink(missing_ok=True)
        made.rmdir()
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
