"""Cuts sources into parts, and has all cores tokenize those that are not there yet.

Owns the plan, which depends on the files alone and never on the number of workers, and the worker processes. What is
done with one part is in worker.py. A part whose figures are written is never done again: that is how an interrupted
run goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from trainwright.data.cache import write_json
from trainwright.data.readers import LINE_KINDS, size
from trainwright.data.sources import Source
from trainwright.data.tokenizer import Tokenizer
from trainwright.data.worker import Part, PartTokenizer, Work
from trainwright.errors import UserError

# Small enough that every core has something to do and an interruption costs seconds, but at most so many files.
PART_BYTES = 4 * 2**20
MOST_PARTS = 4096
UNKNOWN = 1 << 62  # units of a file that nobody measured: its reader ends earlier
# Below this, starting processes costs more than it saves.
ALONE_BYTES = 2 * 2**20


def plan_parts(sources: list[Source], max_line_bytes: int, whole_packed: bool = False) -> list[Part]:
    """The parts of all sources in order. Files already tokenized (.bin/.idx) have none.

    Args:
        whole_packed: makes a .gz or .zst file one part, instead of unpacking all of it now to learn its size.

    Raises:
        UserError: a file cannot be read.
    """
    files = [
        (
            number,
            at,
            file,
            UNKNOWN if whole_packed and file.compression else size(file, max_line_bytes),
            os.path.getsize(file.path),
        )
        for number, source in enumerate(sources)
        for at, file in enumerate(source.files)
    ]
    unpacked = [units if file.kind in LINE_KINDS and units < UNKNOWN else stored for _, _, file, units, stored in files]
    part_bytes = max(PART_BYTES, sum(unpacked) // MOST_PARTS)
    parts: list[Part] = []
    for (number, at, file, units, stored), content in zip(files, unpacked, strict=True):
        count = 1 if file.document == "file" or units == UNKNOWN else max(1, min(units, -(-content // part_bytes)))
        for share in range(count):
            start, stop = units * share // count, units * (share + 1) // count
            parts.append(Part(len(parts), number, at, start, stop, stored // count))
    return parts


def tokenize_parts(
    parts: list[Part],
    work: Work,
    tokenizer: Tokenizer,
    folder: Path,
    workers: int | None,
    progress: Callable[[float], None],
) -> None:
    """Tokenizes the parts that `folder` does not hold yet.

    Args:
        workers: processes; None for one a core. 0 and 1 work in this process.
        progress: called with bytes done since the last call.

    Raises:
        UserError: a bad row.
    """
    missing = [part for part in parts if not part.done(folder)]
    if not missing:
        return
    work.save(folder)
    save_tokenizer(tokenizer, folder)
    count = min(len(missing), cores() if workers is None else workers)
    if count <= 1 or sum(part.bytes for part in missing) < ALONE_BYTES:
        alone = PartTokenizer(work, tokenizer)
        for part in missing:
            advance = _Advance(part, progress)
            alone.run(part, folder, advance.to)
            advance.to(1.0)
        return
    _Pool(missing, folder, progress).run(count)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the tokenizer where worker processes load it, with the ids that end generation: they end answers too."""
    tokenizer.save(folder / "tokenizer")
    write_json(folder / "tokenizer" / "generation_config.json", {"eos_token_id": list(tokenizer.stop_ids)})


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerProcess:
    """One `python -m trainwright.data.worker` on the work in `folder`. `shared`: others work there at the same time."""

    def __init__(self, folder: Path, shared: bool = False) -> None:
        # One thread each: the processes share the cores already.
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainwright.data.worker", str(folder), *(["--shared"] if shared else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )

    def tokenize(self, part: Part, share_done: Callable[[float], None]) -> None:
        """Has one part done, unless it is done or, where the folder is shared, another process is at it.

        Raises:
            UserError: a bad row, or the system killed the process.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # it has ended: what it said last, or its status, says why
            self._process.stdin.write(json.dumps(part) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            words = json.loads(line)
            if "error" in words:
                raise UserError(words["error"])
            if "done" in words:
                share_done(1.0)
                return
            share_done(words["share"])
        status = self._process.wait()
        if status == -9:
            raise UserError("the system killed a tokenizing process, most likely for memory: lower data.workers")
        raise RuntimeError(f"a tokenizing process ended with status {status}; its own words are above")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class _Advance:
    """Turns the share of a part that is done into bytes since the last call."""

    def __init__(self, part: Part, progress: Callable[[float], None]) -> None:
        self._part, self._progress, self._done = part, progress, 0.0

    def to(self, share: float) -> None:
        share = max(self._done, min(1.0, share))
        self._progress((share - self._done) * self._part.bytes)
        self._done = share


class _Pool:
    """Worker processes, each with a thread of ours that hands it parts. The first failure ends all."""

    def __init__(self, parts: list[Part], folder: Path, progress: Callable[[float], None]) -> None:
        self._parts: queue.SimpleQueue[Part] = queue.SimpleQueue()
        for part in parts:
            self._parts.put(part)
        self._folder = folder
        self._progress = progress
        self._lock = threading.Lock()
        self._processes: list[WorkerProcess] = []
        self._failure: BaseException | None = None

    def run(self, count: int) -> None:
        self._processes = [WorkerProcess(self._folder) for _ in range(count)]
        threads = [threading.Thread(target=self._serve, args=(process,)) for process in self._processes]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for process in self._processes:
                process.kill()
        if self._failure is not None:
            raise self._failure

    def _serve(self, process: WorkerProcess) -> None:
        """Hands parts to one process until there are none or one failed."""
        try:
            while self._failure is None:
                try:
                    part = self._parts.get_nowait()
                except queue.Empty:
                    return
                process.tokenize(part, _Advance(part, self._report).to)
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            for other in self._processes:
                other.kill()

    def _report(self, done: float) -> None:
        with self._lock:
            self._progress(done)
