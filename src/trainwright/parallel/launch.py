"""Starting the processes of a run on torchrun's own engine, and finding those that another launcher started.

    --gpus N                torch.distributed.launcher, one machine, N processes of this very command
    torchrun, torchelastic  RANK, WORLD_SIZE, LOCAL_RANK are there already (Kubernetes manifests use this)
    SLURM                   srun's variables are translated into these

Owns environments and exit. What a process does is the trainer's; why one died is told by `watch.py`.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from trainwright.errors import UserError
from trainwright.parallel import watch

BASE_PORT, PORTS = 20000, 20000
VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def join_environment(environment: MutableMapping[str, str]) -> str:
    """Completes RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT from what is there; returns who set them.

    "" for a process alone. Raises UserError for a SLURM job whose variables do not say where the first host is.
    """
    if int(environment.get("WORLD_SIZE", 1)) > 1 and "RANK" in environment:
        environment.setdefault("LOCAL_RANK", "0")  # one process a pod
        return "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "environment"
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        hosts = first_host(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""))
        if not hosts:
            raise UserError("SLURM_NTASKS is set and SLURM_STEP_NODELIST is not: start with srun inside sbatch")
        port = BASE_PORT + int(environment.get("SLURM_JOB_ID", 0)) % PORTS
        names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
        environment.update({ours: environment[theirs] for ours, theirs in names.items()})
        # srun --gpus-per-task=1: a task sees its own device only
        if any(environment.get(name, "").isdigit() for name in VISIBLE):
            environment["LOCAL_RANK"] = "0"
        environment.setdefault("MASTER_ADDR", hosts)
        environment.setdefault("MASTER_PORT", str(port))
        return "SLURM"
    return ""


def first_host(nodes: str) -> str:
    """`gpu[03-07,11],login1` -> gpu03."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]*)\])?", nodes)
    if match is None:
        return ""
    first = re.split("[-,]", match[2])[0] if match[2] else ""
    return match[1] + first


def run_processes(count: int, command: Sequence[str] | Callable[[], None], folder: Path) -> int:
    """Runs `command` as `count` processes of one machine that find each other; returns the exit status.

    A function runs in forks of this process, which therefore must not have touched a device. Output of rank 0 is the
    screen's, that of the others goes to files under `folder`. When one ends badly, all do, and one line says why.
    SIGINT and SIGTERM go to all of them, who save and leave.
    """
    watch.begin(folder)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, _forward_to(folder, count)) for number in numbers}
    os.environ[watch.LAUNCHED] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    try:
        with tempfile.TemporaryDirectory(prefix="trainwright-") as logs:
            return _run_elastic(count, command, folder, Path(logs))
    finally:
        del os.environ[watch.LAUNCHED]
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_elastic(count: int, command: Sequence[str] | Callable[[], None], folder: Path, logs: Path) -> int:
    """The existing engine, set up for one machine."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        local_addr="localhost",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=dict.fromkeys(range(1, count), Std.ALL)),
        signals_to_handle="SIGQUIT",  # the others are ours: a run that is stopped saves first
        start_method="fork",
    )
    entry, words = (_forked(command), ()) if callable(command) else (command[0], command[1:])
    try:
        elastic_launch(config, entrypoint=entry)(*words)
    except ChildFailedError as error:
        return _explain(folder, {rank: failure.exitcode for rank, failure in error.failures.items()}, logs)
    return 0


def _forked(work: Callable[[], None]) -> Callable[[], None]:
    def entry() -> None:
        watch.leave_with_launcher()
        work()

    return entry


def _forward_to(folder: Path, count: int) -> Callable[[int, FrameType | None], None]:
    """Ranks that train save and leave. While some still start there is nothing to save: the launcher leaves, and they
    with it. It leaves at once, since an exception out of a handler is lost where it meets a callback."""

    def forward(number: int, _: FrameType | None) -> None:
        statuses = watch.read_statuses(folder)
        if len(statuses) < count:
            print("trainwright: interrupted", file=sys.stderr, flush=True)
            os._exit(128 + number)
        for status in statuses.values():
            with suppress(ProcessLookupError):
                os.kill(status.pid, number)

    return forward


def _explain(folder: Path, exits: Mapping[int, int], logs: Path) -> int:
    """Prints one line: a process that was killed, else the verdict, else what stands last in a dead rank's log."""
    statuses = watch.read_statuses(folder)
    verdict = watch.read_verdict(folder)
    killed = sorted(rank for rank, code in exits.items() if code < 0 and -code not in (signal.SIGTERM, signal.SIGINT))
    if killed and (verdict is None or verdict.secondary):
        rank = killed[0]
        status, name = statuses.get(rank), signal.Signals(-exits[rank]).name
        step = f"at step {status.step}" if status and status.step else "before the first step"
        seen = verdict.collective if verdict is not None else None
        inside = (status.collective if status else None) or seen
        hint = ", which the kernel sends when the host runs out of memory" if name == "SIGKILL" else ""
        where = f" in {inside}" if inside else ""
        print(f"trainwright: rank {rank} was ended {step}{where} by {name}{hint}", file=sys.stderr)
        return watch.EXIT_FAILED
    if verdict is not None:
        print(f"trainwright: {verdict.line}", file=sys.stderr)
        return verdict.exit
    rank = min(exits)
    last = _last_line(logs, rank)
    print(f"trainwright: rank {rank} ended with status {exits[rank]}{': ' + last if last else ''}", file=sys.stderr)
    return watch.EXIT_FAILED


def _last_line(logs: Path, rank: int) -> str:
    """What a process said last on its way down."""
    for file in logs.glob(f"**/{rank}/stderr.log"):
        lines = file.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""
    return ""
