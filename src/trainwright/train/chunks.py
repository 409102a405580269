"""Tensors of any layout in safetensors files, found again through a JSON index: written on n ranks, read on m.

Every rank holds pieces (chunks) of some tensors: a DTensor's local shard, or a whole plain tensor. A chunk is a box
with offsets and sizes inside its tensor. Writing stores every box once, wherever it was replicated; reading takes from
the stored boxes what overlaps the box that a rank needs now. No file is a pickle (torch's own format keeps one).

Owns boxes, files and the index. When a set of files counts as a checkpoint is `checkpoint.py`'s decision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainwright.errors import UserError
from trainwright.parallel.mesh import World

# Bounds the host memory of a save: tensors are copied from the device one file at a time.
FILE_BYTES = 2**30


@dataclass(frozen=True)
class Chunk:
    """A box of one tensor: where it starts and how large it is, both [dims]."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def key(self) -> str:
        """Its name inside a file, unique among all boxes."""
        return f"{self.name}@{','.join(map(str, self.offsets))}"


@dataclass(frozen=True)
class Stored:
    """A box on disk."""

    chunk: Chunk
    file: str
    dtype: str
    shape: tuple[int, ...]  # of the whole tensor


def local_chunk(name: str, tensor: Tensor) -> tuple[Chunk, Tensor] | None:
    """The box of `tensor` that this rank holds, and its values; None for an empty one."""
    if isinstance(tensor, DTensor):
        boxes = tensor.__create_chunk_list__()
        if not boxes or math.prod(boxes[0].sizes) == 0:
            return None
        return Chunk(name, tuple(boxes[0].offsets), tuple(boxes[0].sizes)), tensor.to_local()
    return Chunk(name, (0,) * tensor.ndim, tuple(tensor.shape)), tensor


def owned_chunks(tensors: Mapping[str, Tensor], world: World) -> list[tuple[Chunk, Tensor, tuple[int, ...]]]:
    """What this rank writes: (box, its values, shape of the whole). Replicas are shared out evenly by bytes."""
    local = {}
    for name, tensor in tensors.items():
        held = local_chunk(name, tensor)
        if held:
            local[held[0]] = (held[1].detach(), tuple(tensor.shape))
    if world.size == 1:
        return [(chunk, values, shape) for chunk, (values, shape) in local.items()]
    everyone = world.gather([(asdict(chunk), values.nbytes) for chunk, (values, _) in local.items()])
    holders: dict[Chunk, list[int]] = {}
    sizes: dict[Chunk, int] = {}
    for rank, chunks in enumerate(everyone):
        for fields, nbytes in chunks:
            chunk = Chunk(**fields)
            holders.setdefault(chunk, []).append(rank)
            sizes[chunk] = nbytes
    load = [0] * world.size
    owner = {}
    for chunk in sorted(holders, key=lambda c: (len(holders[c]), -sizes[c], c.key)):
        owner[chunk] = min(holders[chunk], key=lambda rank: (load[rank], rank))
        load[owner[chunk]] += sizes[chunk]
    return [(chunk, *held) for chunk, held in local.items() if owner[chunk] == world.rank]


def write_chunks(
    folder: Path, rank: int, chunks: list[tuple[Chunk, Tensor, tuple[int, ...]]], file_bytes: int = FILE_BYTES
) -> list[Stored]:
    """Writes this rank's boxes into files of about `file_bytes` and says where each went."""
    stored = []
    for number, batch in enumerate(_batches(chunks, file_bytes)):
        file = f"tensors-{rank:05d}-{number:03d}.safetensors"
        values = {chunk.key: tensor.to("cpu").contiguous() for chunk, tensor, _ in batch}
        save_file(_without_shared_memory(values), folder / file)
        stored += [Stored(chunk, file, str(tensor.dtype), shape) for chunk, tensor, shape in batch]
    return stored


def _batches(
    chunks: list[tuple[Chunk, Tensor, tuple[int, ...]]], file_bytes: int
) -> Iterator[list[tuple[Chunk, Tensor, tuple[int, ...]]]]:
    batch: list[tuple[Chunk, Tensor, tuple[int, ...]]] = []
    filled = 0
    for item in chunks:
        if batch and filled + item[1].nbytes > file_bytes:
            yield batch
            batch, filled = [], 0
        batch.append(item)
        filled += item[1].nbytes
    if batch:
        yield batch


def _without_shared_memory(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """save_file refuses tensors that share memory (an expert's view of a stack, say); such ones are copied."""
    seen: set[int] = set()
    result = {}
    for key, tensor in values.items():
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        result[key] = tensor if whole else tensor.clone()
    return result


def to_index(stored: list[Stored]) -> dict[str, Any]:
    """The index as JSON: tensor name -> dtype, shape, boxes."""
    tensors: dict[str, Any] = {}
    for item in stored:
        entry = tensors.setdefault(
            item.chunk.name, {"dtype": item.dtype.removeprefix("torch."), "shape": list(item.shape), "chunks": []}
        )
        box = {"file": item.file, "offsets": list(item.chunk.offsets), "sizes": list(item.chunk.sizes)}
        entry["chunks"].append(box)
    return tensors


def read_chunks(folder: Path, index: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Fills `tensors`, in place and in whatever layout they have, from the files in `folder`.

    Raises UserError for a tensor that is not there, has another shape, or is not wholly covered.
    """
    with ExitStack() as stack, torch.no_grad():
        opened: dict[str, Any] = {}
        for name, tensor in tensors.items():
            entry = index.get(name)
            if entry is None:
                raise UserError(f"{folder} holds no {name}: it was written by a run of another model or optimizer")
            if list(tensor.shape) != entry["shape"]:
                raise UserError(f"{folder}: {name} has shape {entry['shape']}, this run needs {list(tensor.shape)}")
            held = local_chunk(name, tensor)
            if held is None:
                continue
            wanted, target = held
            missing = math.prod(wanted.sizes)
            for box in entry["chunks"]:
                missing -= _copy_overlap(folder, box, wanted, target, opened, stack)
            if missing:
                raise UserError(f"{folder}: {name} lacks {missing} of {math.prod(wanted.sizes)} values")


def _copy_overlap(
    folder: Path, box: Mapping[str, Any], wanted: Chunk, target: Tensor, opened: dict[str, Any], stack: ExitStack
) -> int:
    """Copies what the stored `box` and the `wanted` one share; returns how many values that was."""
    stored = Chunk(wanted.name, tuple(box["offsets"]), tuple(box["sizes"]))
    starts = [max(a, b) for a, b in zip(stored.offsets, wanted.offsets, strict=True)]
    ends = [
        min(a + m, b + n) for a, m, b, n in zip(stored.offsets, stored.sizes, wanted.offsets, wanted.sizes, strict=True)
    ]
    if any(start >= end for start, end in zip(starts, ends, strict=True)):
        return 0
    if box["file"] not in opened:
        opened[box["file"]] = stack.enter_context(safe_open(folder / box["file"], framework="pt"))
    file = opened[box["file"]]
    if not starts:
        target.copy_(file.get_tensor(stored.key))
        return 1
    source = tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, stored.offsets, strict=True))
    place = tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, wanted.offsets, strict=True))
    target[place].copy_(file.get_slice(stored.key)[source])
    return math.prod(e - s for s, e in zip(starts, ends, strict=True))
