"""Starting processes, joining those that others started, and the one line in which a run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from trainwright.errors import UserError
from trainwright.parallel.launch import first_host, join_environment
from trainwright.parallel.watch import Status, Verdict, judge, read_verdict, reason, tell

LAUNCH = (
    "import sys; from pathlib import Path; from trainwright.parallel.launch import run_processes; "
    "sys.exit(run_processes(2, [sys.executable, '-m', 'tests.parallel.launched', *sys.argv[1:]], Path(sys.argv[2])))"
)


def launch(mode: str, folder: Path) -> tuple[int, str]:
    """Two processes under our launcher: (exit status, what the screen shows)."""
    environment = {**os.environ, "TRAINWRIGHT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, mode, str(folder)], capture_output=True, text=True, env=environment, timeout=600
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("mode", "status", "parts"),
    [
        (
            "raise",
            1,
            ["rank 1 of 2 ended at step 4", "ValueError: a tensor of the wrong shape", "rank-00001.error.txt"],
        ),
        ("kill", 1, ["rank 1 was ended at step 4", "SIGKILL", "host runs out of memory"]),
        (
            "hang",
            75,
            ["rank 1 (process", "hangs at step 4", "launched.py", "the others wait in all_reduce", "0.05 minutes"],
        ),
    ],
)
def test_the_end_of_a_run_is_one_line(mode: str, status: int, parts: list[str], tmp_path: Path) -> None:
    began = time.monotonic()
    code, screen = launch(mode, tmp_path / "ranks")
    lines = [line for line in screen.splitlines() if line.strip()]
    assert code == status, screen
    assert len(lines) == 1, screen
    for part in parts:
        assert part in lines[0]
    assert time.monotonic() - began < 180  # far from the ten minutes of a collective


def test_running_out_of_memory_says_what_to_lower() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated")
    line = reason(error)
    assert "Tried to allocate 2.00 GiB" in line
    assert "lower train.micro_batch_size" in line
    assert "reserved" not in line


def of(rank: int, step: int, collective: str | None, time: float = 100.0) -> Status:
    return Status(rank, 10 + rank, "host", step, "training", 0.0, time, collective, "data/loader.py:9 next")


def test_a_silent_process_hangs_before_one_that_is_behind() -> None:
    statuses = {0: of(0, 7, "all_reduce"), 1: of(1, 6, None), 2: of(2, 7, "all_reduce", time=40.0)}
    line = judge(statuses, 3, 60, 2)
    assert line.startswith("rank 2 (process 12 on host) hangs at step 7: it does not answer")
    assert "wait in all_reduce" in line
    line = judge({**statuses, 2: of(2, 7, "all_reduce")}, 3, 60, 2)
    assert line.startswith("rank 1 (process 11 on host) hangs at step 6: it is behind, at data/loader.py:9 next")


def test_a_process_that_is_in_no_collective_hangs() -> None:
    statuses = {0: of(0, 7, "all_reduce"), 1: of(1, 7, None)}
    assert judge(statuses, 2, 60, 2).startswith(
        "rank 1 (process 11 on host) hangs at step 7: it is not in a collective"
    )
    everyone = {0: of(0, 7, "all_reduce"), 1: of(1, 7, "all_gather")}
    assert judge(everyone, 2, 60, 2).startswith("all ranks hang at step 7 in all_gather and all_reduce")
    assert judge({0: of(0, 7, "all_reduce")}, 2, 60, 2).startswith("rank 1 hangs at step 7: it does not answer")


def test_the_first_verdict_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tell(tmp_path, Verdict(3, "the reason", 1))
    assert not tell(tmp_path, Verdict(0, "a peer went away", 1))
    assert read_verdict(tmp_path) == Verdict(3, "the reason", 1)
    assert capsys.readouterr().err == "trainwright: the reason\n"


def test_slurm_becomes_torchruns_environment() -> None:
    environment = {
        "SLURM_JOB_ID": "40012", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "16", "SLURM_PROCID": "11",
        "SLURM_LOCALID": "3", "SLURM_STEP_NODELIST": "gpu[03-04],login1",
    }  # fmt: skip
    assert join_environment(environment) == "SLURM"
    wanted = {"RANK": "11", "LOCAL_RANK": "3", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu03", "MASTER_PORT": "20012"}
    assert {name: environment[name] for name in wanted} == wanted


@pytest.mark.parametrize(("seen", "local"), [("5", "0"), ("0,1,2,3", "3"), (None, "3")])
def test_a_slurm_task_that_sees_one_device_takes_it(seen: str | None, local: str) -> None:
    """`srun --gpus-per-task=1` shows each task its own GPU, which is number 0 to it."""
    environment = {
        "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3",
        "SLURM_STEP_NODELIST": "gpu1", **({"CUDA_VISIBLE_DEVICES": seen} if seen else {}),
    }  # fmt: skip
    join_environment(environment)
    assert environment["LOCAL_RANK"] == local


def test_who_started_us() -> None:
    assert join_environment({}) == ""
    assert join_environment({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}) == ""
    assert join_environment({"RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}) == "torchrun"
    pod = {"RANK": "1", "WORLD_SIZE": "4"}
    assert join_environment(pod) == "environment"
    assert pod["LOCAL_RANK"] == "0"
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST"):
        join_environment({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"})


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu[03-07,11],x", "gpu03"), ("a1,a2", "a1"), ("n[5,7]", "n5"), ("one", "one"), ("", "")]
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def start(tmp_path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainwright", "train", "quickstart", f"output={tmp_path}", "--gpus", "2"]
    listens = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # tests in the background inherit deafness to Ctrl-C
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=listens)


def wait_until(good: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not good() and time.monotonic() < end:
        time.sleep(0.1)
    return good()


def running(tmp_path: Path) -> list[str]:
    """Processes whose command names this folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found += [file.parent.name] if str(tmp_path) in file.read_text() else []
    return found


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="/proc and the end of orphans are Linux's")


@needs_proc
@pytest.mark.parametrize("seconds", [0, 2])
def test_ctrl_c_before_training_is_one_line_and_leaves_nobody(tmp_path: Path, seconds: float) -> None:
    with start(tmp_path) as process:
        assert process.stderr is not None
        assert "2 CPU processes" in process.stderr.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=300)[1]
    assert process.returncode == 130, said
    assert said.strip() == "trainwright: interrupted"
    assert wait_until(lambda: not running(tmp_path), 60)


@needs_proc
def test_ranks_end_with_their_launcher(tmp_path: Path) -> None:
    """`kill -9` of the launcher: the ranks save and leave."""
    with start(tmp_path) as process:
        metrics = tmp_path / "quickstart" / "metrics.jsonl"
        assert wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, 300)
        process.kill()
    assert wait_until(lambda: not running(tmp_path), 120)
    assert list((tmp_path / "quickstart" / "checkpoints").glob("step-*"))
