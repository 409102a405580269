"""Checkpoints: complete or absent, checked by SHA-256, never a pickle.

    checkpoints/step-00000100/
      tensors-RANK-NUMBER.safetensors   weights and optimizer states, each stored once (chunks.py)
      random-RANK.safetensors           random number generators of each rank
      index.json                        tensor name -> dtype, shape, where its pieces are
      state.json                        step, tokens, data position, loss scale: everything that is not a tensor
      manifest.json                     size and SHA-256 of every file above

A checkpoint is written beside its final name, fsynced, and renamed; so a folder named step-N is whole, whenever the
process was killed. Every rank learns whether the save failed, and then the run still has the checkpoint before.

Owns folders, manifest, publication, verification and what is kept. What belongs into a checkpoint is `trainer.py`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainwright.errors import UserError
from trainwright.parallel.mesh import World
from trainwright.train.chunks import owned_chunks, read_chunks, to_index, write_chunks

FORMAT = 1
NAME = re.compile(r"^step-(\d{8,})$")
GIB = 2**30
HASH_THREADS = 4


class SaveError(UserError):
    """A checkpoint could not be written. The ones before are untouched."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete folder."""

    step: int
    path: Path


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints below `folder`, oldest first. Unfinished ones have other names and are not seen.

    One that lost files, even its manifest, is seen, so that it is refused by name and never taken for absent.
    """
    if not folder.is_dir():
        return []
    found = [(NAME.match(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted(
        (Checkpoint(int(match[1]), path) for match, path in found if match and any(path.iterdir())),
        key=lambda checkpoint: checkpoint.step,
    )


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, world: World, *, keep_last: int = 2, keep_every: int = 0) -> None:
        self.folder = folder
        self.world = world
        self.keep_last = keep_last
        self.keep_every = keep_every

    # ---- saving ----

    def save(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], rng: Mapping[str, Tensor]
    ) -> Path:
        """Writes step `step`; every rank calls it and every rank returns or raises SaveError alike."""
        final = self.folder / f"step-{step:08d}"
        partial = final.with_name(f"{final.name}.partial")
        chunks = owned_chunks(tensors, self.world)
        needed = sum(self.world.gather(sum(values.nbytes for _, values, _ in chunks)))
        self._raise_alike(self._attempt(lambda: self._make_room(partial, needed)) if self.world.is_main else None)
        written: dict[str, Any] = {}

        def write() -> None:
            if not partial.is_dir():
                raise OSError(
                    f"{partial} is not to be seen from this host: put `output` on a file system that all share"
                )
            written["chunks"] = write_chunks(partial, self.world.rank, chunks)
            save_file(dict(rng), partial / f"random-{self.world.rank:05d}.safetensors")
            files = {item.file for item in written["chunks"]} | {f"random-{self.world.rank:05d}.safetensors"}
            written["files"] = _seal(partial, sorted(files))

        results = self.world.gather((self._attempt(write), written))
        error = next((error for error, _ in results if error), None)
        if error is None and self.world.is_main:
            error = self._attempt(lambda: self._publish(partial, final, step, [w for _, w in results], state))
        if error is not None and self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        self._raise_alike(error)
        if self.world.is_main:
            self._retire()
        return final

    def _make_room(self, partial: Path, needed: int) -> None:
        """An empty folder to write into, on a disk that has the room."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clean()
        free = shutil.disk_usage(self.folder).free
        needed += needed // 100 + 2**20  # headers, index, random numbers
        if free < needed:
            raise SaveError(
                f"the checkpoint needs {needed / GIB:.2f} GiB and {self.folder} has {free / GIB:.2f} GiB free: free "
                "some space, or lower checkpoint.keep_last"
            )
        partial.mkdir()

    def _publish(
        self, partial: Path, final: Path, step: int, results: list[dict[str, Any]], state: Mapping[str, Any]
    ) -> None:
        """Index, state and manifest, then the rename that makes the checkpoint exist."""
        index = to_index([item for result in results for item in result["chunks"]])
        _write_json(partial / "index.json", index)
        _write_json(partial / "state.json", dict(state))
        files = {name: entry for result in results for name, entry in result["files"].items()}
        files |= _seal(partial, ["index.json", "state.json"])
        _write_json(partial / "manifest.json", {"format": FORMAT, "step": step, "files": dict(sorted(files.items()))})
        _fsync(partial / "manifest.json")
        _fsync(partial)
        if final.exists():  # the same step, saved before
            final.rename(final.with_name(f"{final.name}.removed"))
        partial.rename(final)
        _fsync(self.folder)
        self.clean()

    def _retire(self) -> None:
        """Removes what keep_last and keep_every do not keep."""
        for checkpoint in list_checkpoints(self.folder)[: -self.keep_last]:
            if not (self.keep_every and checkpoint.step % self.keep_every == 0):
                _remove(checkpoint.path)

    def clean(self) -> None:
        """Removes what interrupted saves and removals left."""
        for leftover in [*self.folder.glob("step-*.partial"), *self.folder.glob("step-*.removed")]:
            shutil.rmtree(leftover, ignore_errors=True)

    def _attempt(self, action: Any) -> str | None:
        """Runs `action`; what a full or broken disk did to it becomes a line, so that all ranks can hear of it."""
        try:
            action()
        except SaveError as error:
            return str(error)
        except (OSError, SafetensorError) as error:
            return f"the checkpoint could not be written on rank {self.world.rank}: {error}"
        return None

    def _raise_alike(self, error: str | None) -> None:
        found = self.world.first_error(error)
        if found is not None:
            raise SaveError(found)

    # ---- loading ----

    def find(self, step: int | None = None) -> Checkpoint | None:
        """The newest checkpoint, or that of `step`; None when the run has none yet.

        Reads every file and compares it with the manifest. Raises UserError that names the corrupt file and the newest
        good checkpoint before it.
        """
        all_of_them = list_checkpoints(self.folder)
        if not all_of_them and step is None:
            return None
        chosen = [c for c in all_of_them if step is None or c.step == step][-1:]
        if not chosen:
            known = ", ".join(str(c.step) for c in all_of_them) or "none"
            raise UserError(f"{self.folder} has no checkpoint of step {step}: there are {known}")
        fault = self._verify(chosen[0].path)
        if fault is None:
            return chosen[0]
        for older in reversed([c for c in all_of_them if c.step < chosen[0].step]):
            if self._verify(older.path) is None:
                raise UserError(
                    f"{chosen[0].path} is corrupt ({fault}): the one before is good, go on from it with "
                    f"train.resume={older.step}"
                )
        raise UserError(
            f"{chosen[0].path} is corrupt ({fault}) and no older one is good: start again under another name"
        )

    def set_aside_after(self, step: int) -> list[Path]:
        """Renames the checkpoints beyond `step`, which a run that goes on from there will write anew."""
        moved = []
        if self.world.is_main:
            for checkpoint in list_checkpoints(self.folder):
                if checkpoint.step > step:
                    target = checkpoint.path.with_name(f"{checkpoint.path.name}.abandoned")
                    shutil.rmtree(target, ignore_errors=True)
                    moved.append(checkpoint.path.rename(target))
        self.world.barrier()
        return moved

    def load(self, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fills `tensors` in place and returns the state. Verify with `find` first."""
        index = json.loads((checkpoint.path / "index.json").read_text())
        read_chunks(checkpoint.path, index, tensors)
        return self.state(checkpoint)

    def state(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What `save` was given as `state`."""
        state: dict[str, Any] = json.loads((checkpoint.path / "state.json").read_text())
        return state

    def random_numbers(self, checkpoint: Checkpoint) -> dict[str, Tensor] | None:
        """This rank's generators; None when that run had fewer ranks."""
        path = checkpoint.path / f"random-{self.world.rank:05d}.safetensors"
        return load_file(path) if path.exists() else None

    def _verify(self, path: Path) -> str | None:
        """The first fault of a checkpoint, found by all ranks together, each reading a share of the files."""
        return self.world.first_error(_fault(path, self.world.rank, self.world.size))


def _fault(path: Path, rank: int, ranks: int) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"manifest.json says format {manifest['format']}, this version reads {FORMAT}"
        files = sorted(manifest["files"].items())[rank::ranks]
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            faults = list(pool.map(lambda item: _file_fault(path / item[0], item[1]), files))
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json: {error!r}"
    return next((fault for fault in faults if fault), None)


def _file_fault(file: Path, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with one file, or None."""
    if not file.is_file():
        return f"{file.name} is missing"
    size = file.stat().st_size
    if size != entry["bytes"]:
        return f"{file.name} has {size} bytes, the manifest says {entry['bytes']}"
    digest = _sha256(file)
    if digest != entry["sha256"]:
        return f"{file.name} has SHA-256 {digest[:12]}..., the manifest says {entry['sha256'][:12]}..."
    return None


def _seal(folder: Path, names: list[str]) -> dict[str, Any]:
    """fsyncs files and returns their manifest entries. Reads them back: what was hashed is what was written."""

    def entry(name: str) -> tuple[str, dict[str, Any]]:
        _fsync(folder / name)
        return name, {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(pool.map(entry, names))


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _fsync(path: Path) -> None:
    """Forces a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    """Removes a checkpoint so that half of it is never taken for a whole one."""
    removed = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)
