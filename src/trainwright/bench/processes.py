"""Starting and ending the process trees of cells. No torch on the runner's side.

A cell is a child of the *warm* process, which has imported everything that training needs and touched no device: a fork
of it starts a cell at once, where a new interpreter takes ten seconds to import the same. A child that finds the fork
unfit for its device (a library opened the driver while it was imported) replaces itself by a new interpreter. The child
leads a session of its own; several ranks are its children through torchrun's engine (`parallel/launch.py`).

Whatever happens to a cell (out of memory, a crash, a hang, its time limit, Ctrl-C) ends its whole tree and nothing
else. One line of JSON asks for a cell on the warm process's input and one on its output tells how it ended; when its
input closes, because the runner stopped or died, the tree goes too.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

WAIT = 0.02  # seconds between looks at a cell that runs
DRIVERS = ("/dev/nvidia-uvm", "/dev/kfd", "/dev/dri", "/dev/davinci")  # open: this process has talked to a device
DEATH_SIGNAL, SUBREAPER = 1, 36  # PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER of linux/prctl.h


@dataclass(frozen=True)
class Ended:
    """How a cell's tree ended: `status` is the exit status, negative for a signal; `late` where its time was over."""

    status: int
    late: bool
    seconds: float


class Warm:
    """The runner's end: a warm process that is started when first needed, and again should it die."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._process: subprocess.Popen[str] | None = None

    def run(self, folder: Path, gpus: int, limit: float, waiting: Callable[[], None]) -> Ended:
        """Runs the cell in `folder` and calls `waiting` a few times a second until it ended."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        began = time.monotonic()
        process.stdin.write(json.dumps({"folder": str(folder), "gpus": gpus, "limit": limit}) + "\n")
        process.stdin.flush()
        while not select.select([process.stdout], [], [], 0.2)[0]:
            waiting()
        line = process.stdout.readline()
        if not line:  # the warm process itself was ended, by the kernel say: the next cell gets a new one
            status = process.wait()
            self._process = None
            return Ended(status or -signal.SIGKILL, False, time.monotonic() - began)
        return Ended(**json.loads(line))

    def close(self) -> None:
        """Ends the warm process and, with it, a cell that still runs."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Warm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainwright.bench.processes"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self.environment,
                start_new_session=True,  # Ctrl-C is the runner's to handle
            )
        return self._process


# ---- the warm process


def serve() -> None:
    """Runs the cells that its input asks for, one after another, until the input closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print while they are imported is no answer
    prctl(SUBREAPER, 1)  # who loses its parent becomes our child, so that a tree can be ended whole
    preload()
    while line := sys.stdin.readline():
        asked = json.loads(line)
        ended = run_tree(Path(asked["folder"]), asked["gpus"], asked["limit"], answers.fileno())
        answers.write(json.dumps(ended) + "\n")


def prctl(option: int, value: int) -> None:
    """Linux's switches of a process; nothing elsewhere."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def preload() -> None:
    """What a cell would import. Nothing here may touch a device: a forked child could not use it any more."""
    import trainwright.bench.work  # noqa: F401

    if shutil.which("nvidia-smi") and os.environ.get("TRAINWRIGHT_DEVICE") != "cpu":  # compiled layers
        import torch._dynamo
        import torch._inductor.compile_fx  # noqa: F401


def run_tree(folder: Path, gpus: int, limit: float, answers: int) -> dict[str, Any]:
    """One cell from its first process to the end of its last. `answers`: a file that the cell must not hold open."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(answers)
        prctl(DEATH_SIGNAL, signal.SIGKILL)
        _child(folder, gpus)
    status, late = None, False
    while status is None:
        if select.select([sys.stdin], [], [], WAIT)[0]:  # nothing is sent while a cell runs: the input closed
            end_tree(pid)
            os._exit(0)
        status = _ended(pid)
        if status is None and time.monotonic() - began > limit:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)  # where it stands, into its log
            time.sleep(0.2)
            late, status = True, _ended(pid)
            break
    end_tree(pid)
    seconds = time.monotonic() - began
    return {"status": -signal.SIGKILL if status is None else status, "late": late, "seconds": seconds}


def _ended(pid: int) -> int | None:
    """The exit status of a child, None while it lives. Orphans that became ours are buried on the way."""
    with suppress(ChildProcessError):
        while True:
            found, code = os.waitpid(-1, os.WNOHANG)
            if found == 0:
                return None
            if found == pid:
                return os.waitstatus_to_exitcode(code)
    return -signal.SIGKILL


def end_tree(pid: int) -> None:
    """Kills a cell's process group and everything that descends from this process, until nothing is left."""
    for _ in range(200):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        left = list(descendants(os.getpid()))
        for each in left:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not left:
            return
        time.sleep(WAIT)


def descendants(pid: int) -> Iterator[int]:
    """Children, their children and so on, as /proc tells; none on systems without it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(entry.parent.name))
    waiting = [pid]
    while waiting:
        found = parents.get(waiting.pop(), [])
        yield from found
        waiting += found


def _child(folder: Path, gpus: int) -> None:
    """The first process of a cell; never returns."""
    status = 1
    try:
        os.setsid()
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if not fork_is_fit():
            print("started anew: a library opened the device's driver while it was imported", flush=True)
            os.execv(sys.executable, [sys.executable, "-m", "trainwright.bench.processes", str(folder), str(gpus)])
        status = lead(folder, gpus, forked=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def fork_is_fit() -> bool:
    """Whether a device can be used in this forked process: nobody may have talked to one before the fork."""
    import torch

    kinds = (torch.cuda, torch.xpu, torch.mps, torch.mtia)
    if any(kind._is_in_bad_fork() for kind in kinds):
        return False
    opened = []
    with suppress(OSError):
        for entry in os.scandir("/proc/self/fd"):
            with suppress(OSError):
                opened.append(os.readlink(entry.path))
    return not any(name.startswith(DRIVERS) for name in opened)


def forks_would_be_fit() -> bool:
    """The same of the forks that torchrun's engine will make of this process, tried with one."""
    import torch.distributed.launcher.api  # noqa: F401  (whatever it opens, it opens now)

    pid = os.fork()
    if pid == 0:
        os._exit(0 if fork_is_fit() else 1)
    return os.waitpid(pid, 0)[1] == 0


def lead(folder: Path, gpus: int, *, forked: bool) -> int:
    """A cell's first process: does the work itself, or has `gpus` ranks do it. Returns the exit status."""
    import faulthandler

    from trainwright.bench.work import work

    faulthandler.register(signal.SIGUSR1)
    if gpus == 1:
        return work(folder)
    from trainwright.parallel.launch import run_processes

    ranks = folder / "run" / "ranks"
    ranks.mkdir(parents=True, exist_ok=True)
    if forked and forks_would_be_fit():
        return run_processes(gpus, lambda: _rank(folder), ranks)
    return run_processes(gpus, [sys.executable, "-m", "trainwright.bench.processes", str(folder)], ranks)


def _rank(folder: Path) -> None:
    """One forked rank; returns when all is well, else ends the process."""
    from trainwright.bench.work import work

    for number in (signal.SIGINT, signal.SIGTERM):  # the leader's handlers came along
        signal.signal(number, signal.SIG_DFL)
    status = work(folder)
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # other threads may wait for ranks that are gone


def main() -> None:
    """Without words the warm process; with a folder a rank; with a folder and a number of GPUs a cell's leader."""
    words = sys.argv[1:]
    if not words:
        serve()
    elif len(words) == 1:
        _rank(Path(words[0]))
    else:
        sys.exit(lead(Path(words[0]), int(words[1]), forked=False))


if __name__ == "__main__":
    main()
