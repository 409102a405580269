"""Gloo processes that are started once per world size and then run one case after another.

    results = run(4, case, argument)      # case(argument) on 4 ranks that share a process group; a list by rank

`case` is a module-level function: it is sent by name. Arguments and results are pickled between processes of this test
run only. A case that raises anywhere fails the test with that rank's traceback, and the processes are started anew.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import device_mesh

from trainwright.parallel.layout import Layout
from trainwright.parallel.mesh import World, build_meshes

SECONDS = 300  # for one case
PRELOAD = ["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "trainwright.parallel.mesh"]


class RankError(AssertionError):
    """A case raised on some rank, died or hung."""


class _Processes:
    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")  # imports torch once, then forks
        context.set_forkserver_preload([*PRELOAD, __name__])
        self.folder = tempfile.TemporaryDirectory()
        self.ranks, self.pipes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self.folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self.ranks.append(process)
            self.pipes.append(ours)

    def run(self, case: Callable[..., Any], args: tuple[Any, ...], seconds: float) -> list[Any]:
        message = pickle.dumps((case, args))
        for pipe in self.pipes:
            pipe.send_bytes(message)
        results: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while len(results) < len(self.pipes):
            ready = wait([p for i, p in enumerate(self.pipes) if i not in results], deadline - time.monotonic())
            if not ready:
                late = [rank for rank in range(len(self.pipes)) if rank not in results]
                raise RankError(f"{case.__name__}{args}: ranks {late} did not answer in {seconds} seconds")
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    good, value = pickle.loads(self.pipes[rank].recv_bytes())
                except EOFError:
                    raise RankError(f"{case.__name__}{args}: the process of rank {rank} died") from None
                if not good:
                    raise RankError(f"{case.__name__}{args} on rank {rank}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(len(self.pipes))]

    def stop(self) -> None:
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()
        self.folder.cleanup()


_running: dict[int, _Processes] = {}
_groups: dict[tuple[int, ...], Any] = {}


def run(size: int, case: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
    """`case(*args)` on every rank of a world of `size` processes; what each returned, by rank."""
    if size not in _running:
        _running[size] = _Processes(size)
    try:
        return _running[size].run(case, args, seconds)
    except RankError:
        _running.pop(size).stop()
        raise


@atexit.register
def stop_all() -> None:
    while _running:
        _running.popitem()[1].stop()


# ---- inside the processes ----


def _serve(rank: int, size: int, folder: str, pipe: Connection) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "TRAINWRIGHT_DEVICE": "cpu"}
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    device_mesh.new_group = _group_of
    while True:
        try:
            case, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):  # the test run has ended
            os._exit(0)
        try:
            answer = (True, case(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


def _group_of(ranks: list[int], **options: Any) -> Any:
    """One group for the same ranks in all layouts: a gloo group has a thread that wakes a hundred times a second."""
    key = tuple(ranks)
    if key not in _groups:
        _groups[key] = dist.new_group(ranks, **options)
    return _groups[key]


@cache
def world_of(layout: Layout) -> World:
    """This process in `layout`. One mesh a layout for the life of the process."""
    if layout.world_size == 1:
        return World(0, layout, torch.device("cpu"))
    return World(dist.get_rank(), layout, torch.device("cpu"), build_meshes(layout, "cpu"))
