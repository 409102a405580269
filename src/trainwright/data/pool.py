"""Cuts sources into parts, and has all cores tokenize those that are not there yet.

Owns the plan, which depends on the files alone and never on the number of workers, and the worker processes. What is
done with one part is in worker.py. A part whose figures are written is never done again: that is how an interrupted
run goes on.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from trainwright.data.readers import LINE_KINDS, size
from trainwright.data.sources import Source
from trainwright.data.tokenizer import Tokenizer
from trainwright.data.worker import Part, PartTokenizer, Work
from trainwright.errors import UserError

# Small enough that every core has something to do and an interruption costs seconds, but at most so many files.
PART_BYTES = 4 * 2**20
MOST_PARTS = 4096
# Below this, starting processes costs more than it saves.
ALONE_BYTES = 2 * 2**20


def plan_parts(sources: list[Source], max_line_bytes: int) -> list[Part]:
    """The parts of all sources in order. Files already tokenized (.bin/.idx) have none.

    Raises:
        UserError: a file cannot be read.
    """
    files = [
        (number, at, file, size(file, max_line_bytes), os.path.getsize(file.path))
        for number, source in enumerate(sources)
        for at, file in enumerate(source.files)
    ]
    unpacked = [units if file.kind in LINE_KINDS else stored for _, _, file, units, stored in files]
    part_bytes = max(PART_BYTES, sum(unpacked) // MOST_PARTS)
    parts: list[Part] = []
    for (number, at, file, units, stored), content in zip(files, unpacked, strict=True):
        count = 1 if file.document == "file" else max(1, min(units, -(-content // part_bytes)))
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
    missing = [part for part in parts if not part.prefix(folder).with_suffix(".json").exists()]
    if not missing:
        return
    work.save(folder)
    tokenizer.save(folder / "tokenizer")
    count = min(len(missing), cores() if workers is None else workers)
    if count <= 1 or sum(part.bytes for part in missing) < ALONE_BYTES:
        alone = PartTokenizer(work, tokenizer)
        for part in missing:
            advance = _Advance(part, progress)
            alone.run(part, folder, advance.to)
            advance.to(1.0)
        return
    _Pool(missing, folder, progress).run(count)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        self._processes: list[subprocess.Popen[str]] = []
        self._failure: BaseException | None = None

    def run(self, count: int) -> None:
        # One thread each: the processes share the cores already.
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, "-m", "trainwright.data.worker", str(self._folder)]
        self._processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment
            )
            for _ in range(count)
        ]
        threads = [threading.Thread(target=self._serve, args=(process,)) for process in self._processes]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for process in self._processes:
                process.kill()
                process.wait()
        if self._failure is not None:
            raise self._failure

    def _serve(self, process: subprocess.Popen[str]) -> None:
        """Hands parts to one process until there are none or one failed."""
        try:
            while self._failure is None:
                try:
                    part = self._parts.get_nowait()
                except queue.Empty:
                    return
                self._have_done(process, part)
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            for other in self._processes:
                other.kill()

    def _have_done(self, process: subprocess.Popen[str], part: Part) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        advance = _Advance(part, self._report)
        try:
            process.stdin.write(json.dumps(part) + "\n")
            process.stdin.flush()
        except OSError:
            pass  # it ended: what it said last, or its status, says why
        for line in process.stdout:
            words = json.loads(line)
            if "error" in words:
                raise UserError(words["error"])
            if "done" in words:
                advance.to(1.0)
                return
            advance.to(words["share"])
        status = process.wait()
        if self._failure is None and status == -9:
            raise UserError("the system killed a tokenizing process, most likely for memory: lower data.workers")
        raise RuntimeError(f"a tokenizing process ended with status {status}; its own words are above")

    def _report(self, done: float) -> None:
        with self._lock:
            self._progress(done)
