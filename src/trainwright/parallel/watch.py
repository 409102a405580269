"""How a run of several processes ends when one dies, hangs or raises: one line, with rank, step, collective, reason.

Every process keeps a small file about itself in the run's folder, `ranks/rank-00003.json`, which the others and the
launcher read; whoever is first to know why the run ends writes `ranks/verdict.json`, and all leave. Tracebacks go to
`ranks/rank-00003.error.txt`, never to the screen.

Owns these files, the thread that writes them, and the judgement of who hangs. Starting processes is `launch.py`'s work.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch

from trainwright.errors import UserError
from trainwright.parallel.mesh import World

LAUNCHED = "TRAINWRIGHT_LAUNCHED"  # the process number of our launcher, which prints the verdict itself
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
EXIT_USER, EXIT_FAILED, EXIT_HANG = 2, 1, 75
OURS = {"_gathered": "all_gather", "_scattered": "reduce_scatter", "_summed": "all_reduce"}  # collectives.py
PEER = ("connection closed by peer", "connection reset", "broken pipe", "remote process", "socket", "store")


def leave_with_launcher() -> None:
    """From now on this process gets SIGTERM when its launcher is gone, so that none is left behind on a GPU.

    On Linux; does nothing where no launcher of ours started this process.
    """
    launcher = int(os.environ.get(LAUNCHED, 0))
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # it went before it could be watched
            sys.exit(EXIT_FAILED)


@dataclass
class Status:
    """What one process says of itself. `since`: its last progress, `time`: its last writing, both unix time."""

    rank: int
    pid: int
    host: str
    step: int
    doing: str
    since: float
    time: float
    collective: str | None = None
    at: str = ""


class NoWatch:
    """For a process alone: nobody waits for it."""

    def beat(self, step: int, doing: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Watchdog(NoWatch):
    """Writes this process's status and ends the process when the run hangs longer than `minutes`, or has a verdict."""

    def __init__(self, folder: Path, rank: int, size: int, minutes: float, interval: float | None = None) -> None:
        self.folder, self.size, self.seconds = folder, size, minutes * 60
        self.interval = interval or max(0.5, min(5.0, self.seconds / 20))
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self.status = Status(rank, os.getpid(), socket.gethostname(), 0, "starting", now, now)
        self._path = folder / f"rank-{rank:05d}.json"
        self._over = threading.Event()
        self._writing = threading.Lock()
        self._write()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int, doing: str) -> None:
        """Progress: step `step` (counted from 1) has begun, or another long piece of work has.

        Written at once: who dies in the next moment has said where.
        """
        self.status.step, self.status.doing, self.status.since = step, doing, time.time()
        self._write()

    def close(self) -> None:
        """Ends the watch; the file stays and says that this process finished."""
        self._over.set()
        self._thread.join()
        self.status.collective = None
        self.beat(self.status.step, "finished")

    def _watch(self) -> None:
        while not self._over.wait(self.interval):
            self.status.collective, self.status.at = _whereabouts()
            self._write()
            if (self.folder / "verdict.json").exists():
                os._exit(EXIT_FAILED)
            if time.time() - self.status.since > self.seconds:
                line = judge(read_statuses(self.folder), self.size, self.seconds, self.interval)
                tell(self.folder, Verdict(self.status.rank, line, EXIT_HANG))
                os._exit(EXIT_HANG)

    def _write(self) -> None:
        with self._writing:
            self.status.time = time.time()
            _replace(self._path, asdict(self.status))


def begin_watch(folder: Path, world: World, minutes: float) -> NoWatch:
    """The watch over this process; every rank calls it once they have all joined."""
    if world.size == 1:
        return NoWatch()
    if world.is_main and LAUNCHED not in os.environ:
        begin(folder)
    world.barrier()
    return Watchdog(folder, world.rank, world.size, minutes)


def begin(folder: Path) -> None:
    """Removes what an earlier run left; the launcher, or rank 0, calls it before anyone watches."""
    for old in [*folder.glob("rank-*"), folder / "verdict.json"]:
        old.unlink(missing_ok=True)


def read_statuses(folder: Path) -> dict[int, Status]:
    """The processes that have said something, by rank."""
    found = {}
    for path in sorted(folder.glob("rank-*.json")):
        try:
            status = Status(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):  # being replaced this moment, or by another version
            continue
        found[status.rank] = status
    return found


def judge(statuses: Mapping[int, Status], size: int, seconds: float, interval: float) -> str:
    """Who hangs, from what all say: a silent process, else one that is behind, else one that waits for nobody."""
    now = max((status.time for status in statuses.values()), default=time.time())
    step = max((status.step for status in statuses.values()), default=0)
    silent = [r for r in range(size) if r not in statuses or now - statuses[r].time > 4 * interval + 5]
    behind = [r for r, s in statuses.items() if r not in silent and s.step < step]
    absent = [r for r, s in statuses.items() if r not in silent and s.collective is None and s.doing != "finished"]
    waiting = sorted({s.collective for r, s in statuses.items() if s.collective and r not in (*silent, *behind)})
    where = f"the others wait in {' and '.join(waiting)}" if waiting else "nobody waits in a collective"
    minutes = f"{seconds / 60:g} minutes without progress (parallel.timeout_minutes)"
    for ranks, what in ((silent, "does not answer"), (behind, "is behind"), (absent, "is not in a collective")):
        if ranks and len(ranks) < size:
            first = statuses.get(ranks[0])
            at = f", at {first.at}" if first and first.at and ranks is not silent else ""
            on = f" (process {first.pid} on {first.host})" if first else ""
            number = first.step if first else step
            return f"{_ranks(ranks)}{on} hangs at step {number}: it {what}{at}; {where}; {minutes}"
    return f"all ranks hang at step {step} in {' and '.join(waiting) or 'their own work'}; {minutes}"


@dataclass(frozen=True)
class Verdict:
    """Why the run ends. `secondary`: the one who says it only saw another process go away."""

    rank: int
    line: str
    exit: int
    collective: str | None = None
    secondary: bool = False


def read_verdict(folder: Path) -> Verdict | None:
    path = folder / "verdict.json"
    return Verdict(**json.loads(path.read_text())) if path.exists() else None


def tell(folder: Path, verdict: Verdict) -> bool:
    """Makes it the run's verdict unless there is one; returns whether it is. Prints it where no launcher will."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"verdict-{verdict.rank}.part"
    beside.write_text(json.dumps(asdict(verdict)) + "\n", encoding="utf-8")
    try:
        os.link(beside, folder / "verdict.json")  # fails where one is there: the first one stands
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        os.replace(beside, folder / "verdict.json")
    finally:
        beside.unlink(missing_ok=True)
    if LAUNCHED not in os.environ:
        print(f"trainwright: {verdict.line}", file=sys.stderr, flush=True)
    return True


def report_failure(folder: Path, error: BaseException, rank: int, size: int) -> int:
    """The end of a process that raised: its traceback into a file, its line the verdict. Returns the exit status."""
    status = read_statuses(folder).get(rank)
    if isinstance(error, UserError):
        tell(folder, Verdict(rank, str(error), EXIT_USER))
        return EXIT_USER
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"rank-{rank:05d}.error.txt"
    file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    collective = _collective_of(_frames_of(error)) or (status.collective if status else None)
    inside = f" in {collective}" if collective else ""
    step = f"at step {status.step}" if status and status.step else "before the first step"
    line = f"rank {rank} of {size} ended {step}{inside}: {reason(error)}; traceback in {file}"
    tell(folder, Verdict(rank, line, EXIT_FAILED, collective, is_secondary(error)))
    return EXIT_FAILED


def reason(error: BaseException) -> str:
    """One line on what an exception means."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"out of memory on the device ({text.split(' If reserved')[0]}): lower train.micro_batch_size or "
            "data.seq_len, or raise parallel.recompute, zero or tp"
        )
    if isinstance(error, MemoryError):
        return "out of host memory"
    if is_secondary(error):
        return f"another process went away ({text[:200]})"
    return f"{type(error).__name__}: {text[:400]}"


def is_secondary(error: BaseException) -> bool:
    """Whether a process only saw that another one went away."""
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in PEER)
    )


# ---- where a process stands ----


def _whereabouts() -> tuple[str | None, str]:
    """(the collective that some thread is in, where the main thread is outside of libraries)."""
    own = threading.get_ident()
    frames = {ident: _outward(frame) for ident, frame in sys._current_frames().items() if ident != own}
    main = frames.get(threading.main_thread().ident or 0, [])
    library = ("site-packages", sys.base_prefix, "<")  # where a process stands is said by code that people know
    places = [f"{Path(f).name}:{line} {name}" for f, name, line in main if not any(part in f for part in library)]
    stacks = [main, *(stack for stack in frames.values() if stack is not main)]
    return next((found for found in map(_collective_of, stacks) if found), None), places[0] if places else ""


Place = tuple[str, str, int]  # file, function, line


def _outward(frame: FrameType | None) -> list[Place]:
    """A thread's frames, innermost first."""
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno))
        frame = frame.f_back
    return found


def _frames_of(error: BaseException) -> list[Place]:
    return [(f.filename, f.name, f.lineno or 0) for f in reversed(traceback.extract_tb(error.__traceback__))]


def _collective_of(stack: Sequence[Place]) -> str | None:
    """The collective that a stack is in, if any: torch's public name, or that of ours with a gradient."""
    for file, name, _ in stack:
        if file.endswith("distributed_c10d.py") and not name.startswith("_") and name != "wrapper":
            return name
        if file.endswith(os.path.join("parallel", "collectives.py")) and name in OURS:
            return OURS[name]
        if file.endswith("_fsdp_collectives.py") and name.startswith("foreach_"):
            return name.removeprefix("foreach_")
    return None


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _replace(path: Path, value: Mapping[str, object]) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(value) + "\n", encoding="utf-8")
    os.replace(beside, path)
