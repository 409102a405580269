"""The warm process behind `python()`: `python -m tests.warm.serve PROGRAM SOCKET`, until its input closes.

It imports, computes nothing and starts no thread, so that a fork of it is as good as a new interpreter.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy
import torch

from trainwright.parallel import launch

# What commands import, most of it when they run.
MODULES = [
    "trainwright.cli", "trainwright.bench.measure", "trainwright.bench.page", "trainwright.bench.runner",
    "trainwright.bench.screen", "trainwright.bench.whole_rows", "trainwright.bench.work", "trainwright.chat",
    "trainwright.data.command", "trainwright.planner.report", "trainwright.planner.search", "rich.table",
    "matplotlib.backends.backend_agg", "matplotlib.figure", "torch.utils.tensorboard", "torch.distributed.run",
]  # fmt: skip
# Read when an interpreter or a library starts: a command with others than ours gets a new interpreter. PYTHONPATH can
# be followed later.
EARLY = ("PYTHON", "LD_", "MALLOC_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_")


@dataclass
class Command:
    """A command as it was asked for, and the connection to `ask.py`."""

    words: list[str]
    folder: str
    environment: dict[str, str]
    asker: socket.socket
    streams: list[int]
    pid: int = 0


class Server:
    """Forks for every command, passes signals on to it, and tells how it ended."""

    def __init__(self, address: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(address)
        self.listener.listen(64)
        self.selector = selectors.DefaultSelector()
        self.running: set[int] = set()
        self._look_at(self.listener, self._accept)
        self._look_at(0, self._close)

    def serve(self) -> Command:
        """Returns in the forks only, each with its command."""
        while True:
            for key, _ in self.selector.select():
                command = key.data()
                if command is not None:
                    return command

    def _look_at(self, file: socket.socket | int, then: Callable[[], Command | None]) -> None:
        self.selector.register(file, selectors.EVENT_READ, then)

    def _accept(self) -> Command | None:
        asker = self.listener.accept()[0]
        message, streams, _, _ = socket.recv_fds(asker, 1 << 20, 3)
        command = Command(**json.loads(message), asker=asker, streams=streams)
        if early(command.environment) != early(os.environ):
            asker.send(b"cold")
            asker.close()
        else:
            command.pid = os.fork()
            if command.pid == 0:
                self._forget()
                return command
            self.running.add(command.pid)
            ended = os.pidfd_open(command.pid)
            self._look_at(asker, lambda: self._signal(command))
            self._look_at(ended, lambda: self._ended(command, ended))
        for stream in streams:
            os.close(stream)
        return None

    def _signal(self, command: Command) -> None:
        if command.asker.fileno() < 0:  # ended in the same moment
            return
        with suppress(ProcessLookupError):
            if number := command.asker.recv(1):
                os.kill(command.pid, number[0])
            else:  # the asker is gone
                self.selector.unregister(command.asker)
                os.kill(command.pid, signal.SIGKILL)
                os.killpg(command.pid, signal.SIGKILL)

    def _ended(self, command: Command, ended: int) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(command.pid, 0)[1])
        self.running.remove(command.pid)
        self.selector.unregister(ended)
        os.close(ended)
        with suppress(KeyError):
            self.selector.unregister(command.asker)
        with suppress(OSError):
            command.asker.send(str(status).encode())
        command.asker.close()

    def _forget(self) -> None:
        """Closes, in a fork, what is the server's."""
        for key in list(self.selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
            elif key.fd:
                os.close(key.fd)
        self.selector.close()

    def _close(self) -> NoReturn:
        """The tests are over: whatever still runs ends too. `asker` closes with this process, which ends `ask.py`."""
        for pid in self.running:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        os._exit(0)


def early(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key.startswith(EARLY) and key != "PYTHONPATH"}


def become(command: Command, program: str) -> None:
    """This fork does what a new interpreter would with the command."""
    command.asker.close()
    os.setsid()
    for number, stream in enumerate(command.streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(command.folder)
    os.environ.clear()
    os.environ.update(command.environment)
    sys.executable = program
    sys.path[:1] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        run(command.words)
    except SystemExit as left:
        if not isinstance(left.code, int | None):
            raise
        leave(left.code or 0)
    leave(0)


def leave(status: int) -> NoReturn:
    """What an interpreter's end does that others can see. Taking everything apart would take half a second more."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(words: list[str]) -> None:
    """`python WORDS` in this process."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(min(cores, int(os.environ.get("OMP_NUM_THREADS", cores))))  # read long before the fork
    torch.default_generator.seed()  # forks would draw the same
    numpy.random.seed()
    option, *rest = words[1:] if words[0] == "-u" else words
    if option == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif option == "-c":
        sys.argv, main = ["-c", *rest[1:]], ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[0] = [option, *rest], str(Path(option).resolve().parent)
        runpy.run_path(option, run_name="__main__")


def fork_ranks() -> None:
    """Lets launchers fork their ranks, which have them as their parents then, instead of asking for them here."""
    run_elastic = launch._run_elastic

    def forked(count: int, command: Any, folder: Path, logs: Path) -> int:
        if not callable(command) and command[0] == sys.executable:
            command = partial(rank, list(command[1:]))
        return run_elastic(count, command, folder, logs)

    launch._run_elastic = forked


def rank(words: list[str]) -> None:
    """One forked rank; returns when all is well."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the launcher's handlers came along
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        run(words)
    except SystemExit as left:
        if left.code:
            leave(left.code if isinstance(left.code, int) else 1)


def main() -> None:
    program, address = sys.argv[1:]
    for name in MODULES:
        importlib.import_module(name)
    fork_ranks()
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # a command's module is imported already
    server = Server(address)
    gc.freeze()  # a collection in a fork would write to every page, and so copy it
    os.write(1, b"ready\n")
    become(server.serve(), program)


if __name__ == "__main__":
    main()
