"""Cells really run, really fail, and end alone; what is finished is kept."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.warm import python
from trainwright.bench import result
from trainwright.bench import runner as runners
from trainwright.bench.cell import Cell, cells_of, expected_seconds, here, predict
from trainwright.bench.find import check_find, find_limit, planned_limit, probe, search
from trainwright.bench.matrix import Matrix
from trainwright.bench.processes import Ended, descendants, fork_is_fit, forks_would_be_fit
from trainwright.bench.runner import Places, Runner, run_cells
from trainwright.cli import main
from trainwright.errors import UserError
from trainwright.planner.hardware import cluster_of
from trainwright.recipe.show import to_yaml
from trainwright.train.build import build_schedule

TINY = {
    "title": "tiny", "recipe": "quickstart", "made": True, "warmup_steps": 1, "measured_steps": 4,
    "set": {"model.overrides.num_hidden_layers": 1, "train.micro_batch_size": 4, "data.seq_len": 64},
}  # fmt: skip
HUGE = {"data.seq_len": 256, "train.micro_batch_size": 8192}


def cells(rows: list[dict[str, Any]], **more: Any) -> list[Cell]:
    return cells_of(Matrix.model_validate({**TINY, **more, "rows": rows}))


class Recorder:
    """A display that remembers, and that may do something to a cell once it trains."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.kept: list[str] = []
        self.strike: Callable[[], bool] | None = None

    def begin(self, cell: Cell) -> None:
        self.begun.append(cell.name)

    def progress(self, cell: Cell, line: dict[str, Any] | None) -> None:
        if self.strike is not None and line is not None and self.strike():
            self.strike = None

    def done(self, row: dict[str, Any], *, kept: bool) -> None:
        if kept:
            self.kept.append(row["name"])


@pytest.fixture(scope="module")
def runner(tmp_path_factory: Any) -> Iterator[Runner]:
    """One warm process for all tests here."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("bench")
    for key, value in {"TRAINWRIGHT_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "TRAINWRIGHT_CACHE": str(folder)}.items():
        patch.setenv(key, value)
    with Runner(folder / "results", Recorder()) as made:
        yield made
    patch.undo()


@contextmanager
def fresh(runner: Runner) -> Iterator[Recorder]:
    """A new memory for the display; afterwards no process of any cell is left."""
    runner.display = recorder = Recorder()
    yield recorder
    assert not list(descendants(warm_pid(runner)))


def warm_pid(runner: Runner) -> int:
    warm = runner.warm[()]
    assert warm._process is not None
    return warm._process.pid


def test_rows_of_one_and_of_two_processes(runner):
    asked = cells(
        [
            {"name": "one"},
            {"name": "two", "gpus": 2, "set": {"train.micro_batch_size": 2}, "align_with": "one", "note": "gloo"},
            {"name": "other", "set": {"train.seed": 3}, "align_with": "one"},
        ]
    )
    with fresh(runner) as display:
        results = run_cells(runner, asked, "tiny")
        assert display.begun == ["one", "two", "other"]
    one, two, other = results["rows"]
    for cell, row in zip(asked, results["rows"], strict=True):
        lines = [json.loads(line) for line in (runner.place(cell) / "run/metrics.jsonl").read_text().splitlines()]
        seconds = [line["step_seconds"] for line in lines[1:]]
        assert len(seconds) == 4
        assert row["status"] == "ok"
        assert row["step_seconds"] == statistics.median(seconds)
        assert (row["step_seconds_min"], row["step_seconds_max"]) == (min(seconds), max(seconds))
        assert row["tokens_per_second_per_gpu"] == pytest.approx(4 * 64 / row["gpus"] / row["step_seconds"])
        assert row["samples_per_second"] == pytest.approx(4 / row["step_seconds"])
        assert row["seconds_per_sample"] == pytest.approx(row["step_seconds"] / 4)
        flops = row["flops_per_token"]["palm"]
        assert flops == 6 * row["parameters"] + 12 * 1 * 128 * 64
        assert row["tflops"] == pytest.approx(row["tokens_per_second_per_gpu"] * flops / 1e12)
        assert row["loss"] == lines[-1]["loss"]
        assert row["predicted_step_seconds"] > 0
        assert row["time_error"] == pytest.approx(row["predicted_step_seconds"] / row["step_seconds"] - 1)
        assert row["predicted_memory_gib"] > 0
        assert row["memory_error"] is None  # a processor tells its process's memory, not its tensors'
        assert not list((runner.place(cell) / "run").glob("checkpoints/*"))
        assert not (runner.place(cell) / "run" / "model").exists()
    assert two["layout"] == "TP1PP1DP2 ZeRO-3"
    assert (one["global_batch_size"], two["global_batch_size"], two["note"]) == (4, 4, "gloo")
    # The same rows and weights: two processes follow one within rounding.
    assert two["aligned"] is True
    assert two["alignment"]["mean_relative_difference"] < 1e-5
    assert two["alignment"]["steps"] == 4
    assert other["alignment"]["mean_relative_difference"] > 1e-4  # other weights, other rows
    assert json.loads((runner.folder / "results.json").read_text())["rows"] == results["rows"]


def test_finished_cells_are_kept(runner, tmp_path):
    rows = [{"name": "kept", "set": {"train.seed": 5}}]
    with fresh(runner) as display:
        first = runner.measure(cells(rows)[0])
        again = runner.measure(cells([{**rows[0], "name": "other name", "note": "today's"}])[0])
        assert (display.begun, display.kept) == (["kept"], ["other name"])
        assert again == {**first, "name": "other name", "note": "today's"}
        runner.again = True
        assert runner.measure(cells(rows)[0])["step_seconds"] != first["step_seconds"]
        runner.again = False
        assert display.begun == ["kept", "kept"]


def test_results_alone_are_enough_to_go_on(runner, tmp_path):
    asked = cells([{"name": "a", "set": {"train.seed": 11}}, {"name": "b", "set": {"train.seed": 12}}])
    with fresh(runner):
        both = run_cells(runner, asked, "t", beside=lambda cell, row: {"system": cell.name})["rows"]
    assert [row["beside"] for row in both] == [{"system": "a"}, {"system": "b"}]
    carried = tmp_path / "carried"
    carried.mkdir()
    (carried / "results.json").write_text((runner.folder / "results.json").read_text())
    display = Recorder()
    with Runner(carried, display) as elsewhere:
        rows = run_cells(elsewhere, asked, "t", only="b")["rows"]
    assert (display.begun, display.kept) == ([], ["b"])
    assert [row["name"] for row in rows] == ["a", "b"]  # what was not asked for stays
    assert [row["step_seconds"] for row in rows] == [row["step_seconds"] for row in both]
    assert not any("beside" in row for row in rows)
    with pytest.raises(UserError, match=r"--only c\* matches no row: did you mean '[ab]'\?"):
        run_cells(elsewhere, asked, "t", only="c*")


def test_out_of_memory_ends_one_cell(runner):
    short, fine = cells([{"name": "short", "memory_gib": 0.3, "set": HUGE}, {"name": "fine", "memory_gib": 0.3}])
    with fresh(runner):
        row = runner.measure(short)
        assert row["status"] == "oom"
        told = row["oom"]
        assert told["phase"] in ("loss", "backward")
        assert told["free_gib"] < 0.3
        assert told["short_gib"] == pytest.approx(told["asked_gib"] - told["free_gib"])
        assert told["short_gib"] > 0
        assert row["line"].startswith(f"out of memory in {told['phase']}, ")
        assert row["memory_cap_gib"] == 0.3
        assert any("allocate" in line for line in row["log"])
        assert runner.measure(fine)["status"] == "ok"  # the same cap is enough for a small one
    with fresh(runner) as display:
        assert runner.measure(short) == row
        assert display.begun == []


def test_ranks_that_cannot_be_forked_are_started_anew(runner, tmp_path):
    cell = cells([{"name": "cold", "gpus": 2}])[0]
    (tmp_path / "recipe.yaml").write_text(to_yaml(cell.recipe.model_copy(update={"output": str(tmp_path)})))
    (tmp_path / "cell.json").write_text('{"memory_gib": null}')
    command = [sys.executable, "-m", "trainwright.bench.processes", str(tmp_path), "2"]
    assert subprocess.run(command, timeout=120).returncode == 0
    assert json.loads((tmp_path / "outcome.json").read_text())["rows_per_step"] == 8


def test_a_fork_with_an_open_driver_is_unfit(monkeypatch):
    assert fork_is_fit()
    assert forks_would_be_fit()
    with open(os.devnull) as opened:
        monkeypatch.setattr(
            "os.readlink", lambda path: "/dev/nvidia-uvm" if path.endswith(f"/{opened.fileno()}") else ""
        )
        assert not fork_is_fit()
        assert not forks_would_be_fit()
    monkeypatch.undo()
    monkeypatch.setattr("torch.cuda._is_in_bad_fork", lambda: True)
    assert not fork_is_fit()


FAR = """
import os, subprocess, sys, time
from pathlib import Path
from trainwright.bench import processes

def lead(folder, gpus, *, forked):
    far = subprocess.Popen(["sleep", "60"], start_new_session=True)
    (folder / "far").write_text(str(far.pid))
    if sys.argv[2] == "hangs":
        time.sleep(60)
    return 3

processes.lead, processes.fork_is_fit = lead, lambda: True
processes.prctl(processes.SUBREAPER, 1)
print(processes.run_tree(Path(sys.argv[1]), 1, 1.0, os.dup(1)))
"""


@pytest.mark.parametrize("how", ["hangs", "leaves"])
def test_processes_in_sessions_of_their_own_end_too(tmp_path, how):
    command = [sys.executable, "-c", FAR, str(tmp_path), how]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        told = process.stdout.readline() if process.stdout is not None else ""
        assert not Path("/proc", (tmp_path / "far").read_text()).exists()
    assert ("'late': True" in told) is (how == "hangs")
    assert ("'status': 3" in told) is (how == "leaves")


def strike(runner: Runner, number: int, *, youngest: bool = True) -> Callable[[], bool]:
    """Sends a signal to a process of the cell that runs."""

    def now() -> bool:
        found = sorted(descendants(warm_pid(runner)))
        os.kill(found[-1 if youngest else 0], number)
        return True

    return now


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_crash_ends_one_cell(runner, gpus):
    # micro batches of one row: both processes still train when one is ended
    rows = [{"name": f"crash {gpus}", "gpus": gpus, "measured_steps": 100_000, "set": {"train.micro_batch_size": 1}}]
    with fresh(runner) as display:
        display.strike = strike(runner, signal.SIGSEGV if gpus == 1 else signal.SIGKILL)
        row = runner.measure(cells(rows)[0])
        assert row["status"] == "crashed"
        # rank 0 sees it first, or the launcher does
        told = ("SIGSEGV",) if gpus == 1 else ("rank 1 ended without a word", "rank 1 was ended at step")
        assert any(word in row["line"] for word in told), row["line"]
        assert row["steps_done"] > 0
        assert runner.measure(cells([{"name": "next", "set": {"train.seed": gpus}}])[0])["status"] == "ok"


def test_a_hang_ends_at_the_time_limit(runner):
    rows = [{"name": "hang", "gpus": 2, "measured_steps": 100_000, "time_limit_seconds": 30}]
    with fresh(runner) as display:
        display.strike = strike(runner, signal.SIGSTOP)
        began = time.monotonic()
        row = runner.measure(cells(rows)[0])
        assert time.monotonic() - began < 90
        assert row["status"] == "timeout"
        assert row["line"].startswith("ended at its time limit of 30 s, after step ")
        assert row["steps_done"] < 100_000


def test_the_warm_process_may_die(runner):
    before = warm_pid(runner)
    with fresh(runner) as display:
        display.strike = strike_warm(runner)
        row = runner.measure(cells([{"name": "host", "measured_steps": 100_000}])[0])
        assert (row["status"], "SIGKILL" in row["line"]) == ("crashed", True)
        assert runner.measure(cells([{"name": "after", "set": {"train.seed": 9}}])[0])["status"] == "ok"
    assert warm_pid(runner) != before
    assert not Path(f"/proc/{before}").exists()


def strike_warm(runner: Runner) -> Callable[[], bool]:
    def now() -> bool:
        os.kill(warm_pid(runner), signal.SIGKILL)
        return True

    return now


def test_what_cannot_run_says_so(runner):
    refused = cells([{"name": "no room", "set": {"train.learning_rate": 1e30, "train.on_nonfinite": "stop"}}])[0]
    with fresh(runner):
        row = runner.measure(refused)
        assert row["status"] == "refused"
        assert "loss is" in row["line"] or "gradient" in row["line"]
        assert runner.kept(refused) is None  # what was mended may run
        runner.gpus = 1
        row = runner.measure(cells([{"name": "large", "gpus": 2}])[0])
        runner.gpus = 0
        assert (row["status"], row["line"]) == ("refused", "needs 2 GPUs, this machine has 1")


# ---- limits


@settings(max_examples=200, deadline=None)
@given(unit=st.sampled_from([1, 64, 192]), limit=st.integers(0, 400), start=st.integers(1, 400))
def test_a_search_finds_the_limit(unit, limit, start):
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= limit * unit

    low, high, cut = search(fits, start * unit, unit)
    assert cut is None
    assert all(size % unit == 0 and size > 0 for size in asked)
    assert len(set(asked)) == len(asked)
    if limit == 0:
        assert (low, high) == (None, unit)
    else:
        assert low is not None
        assert high is not None
        assert low <= limit * unit < high
        assert high - low <= max(unit, low / 64)
    assert len(asked) <= 2 * math.log2(400) + 2


def test_a_search_that_meets_something_else_ends():
    answers = {4: True, 5: None}
    assert search(answers.get, 4, 1) == (4, None, 5)


def test_a_limit_is_found_by_running(runner):
    cell = cells([{"name": "limit", "memory_gib": 0.1, "set": {"data.seq_len": 1024, "train.global_batch_size": 64}}])[
        0
    ]
    with fresh(runner) as display:
        row = find_limit(cell, "max_micro_batch", runner.measure)
        found = row["find"]
        assert (row["name"], row["status"], row["micro_batch_size"]) == ("limit", "ok", found["limit"])
        assert found["limit"] >= 1
        assert found["next"] - found["limit"] <= max(1, found["limit"] // 64)
        assert found["next_phase"] in ("loss", "backward", "optimizer", "build")
        statuses = {each["size"]: each["status"] for each in found["probes"]}
        assert statuses == {size: "ok" if size <= found["limit"] else "oom" for size in statuses}
        probes = len(display.begun)
        assert find_limit(cell, "max_micro_batch", runner.measure)["find"] == found
        assert len(display.begun) == probes  # every probe was kept


@pytest.mark.parametrize("what", ["max_micro_batch", "max_seq_len"])
def test_a_search_starts_where_the_planner_sees_the_limit(monkeypatch, what):
    cluster = cluster_of("H200", 1, memory_gib=2.0)
    monkeypatch.setattr("trainwright.bench.find.here", lambda gpus, cap: cluster)
    cell = cells([{"name": "a", "memory_gib": 2.0}])[0]
    unit = 1 if what == "max_micro_batch" else 64
    planned = planned_limit(cell, what, unit)
    assert planned is not None
    assert planned > 10 * unit
    made = [predict(probe(cell, what, size), cluster) for size in (planned, planned + max(unit, planned // 32))]
    assert [each is not None and each.fits for each in made] == [True, False]
    asked: list[int] = []

    def measure(each: Cell) -> dict[str, Any]:
        recipe = each.recipe
        asked.append(recipe.data.seq_len if what == "max_seq_len" else int(recipe.train.micro_batch_size))
        fits = asked[-1] <= planned
        return {"status": "ok"} if fits else {"status": "oom", "oom": {"short_gib": 0.5, "phase": "loss"}}

    found = find_limit(cell, what, measure)["find"]
    assert asked[0] == found["planned"] == found["limit"] == planned
    assert len(asked) < 12
    assert (found["next_short_gib"], found["next_phase"]) == (0.5, "loss")


def test_find_needs_a_cap_on_a_cpu():
    asked = cells([{"name": "open"}])
    with pytest.raises(UserError, match="fills the host's memory with open: add --memory-gib"):
        check_find("max_micro_batch", asked, 0)
    with pytest.raises(UserError, match="is no limit: use max_micro_batch or max_seq_len"):
        check_find("max_batch", asked, 1)
    assert check_find("max_seq_len", asked, 1) == "max_seq_len"


# ---- before anything runs


def test_a_cell_is_known_by_what_decides_it():
    one, renamed, seed, cap, longer, said = cells(
        [
            {"name": "a"}, {"name": "b", "note": "other", "set": {"name": "b", "output": "elsewhere"}},
            {"name": "c", "set": {"train.seed": 1}}, {"name": "d", "memory_gib": 1}, {"name": "e", "measured_steps": 5},
            {"name": "f", "set": {"train.max_grad_norm": 1.0, "parallel.tp": 1}},  # their defaults, said
        ]
    )  # fmt: skip
    assert one.key("CPU") == renamed.key("CPU") == said.key("CPU")
    assert len({cell.key("CPU") for cell in (one, seed, cap, longer)} | {one.key("H200")}) == 5
    assert one.recipe.train.steps == 5
    assert one.recipe.data.path.startswith("made:tokens?rows=20&length=64")
    assert one.recipe.checkpoint.every == one.recipe.evaluation.generate == 0


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 0.03, 0.7, 1, 4, 5, 100])
@pytest.mark.parametrize("decay", [0, 0.1, 0.9, 1, 3, 100])
def test_a_schedule_longer_than_the_cell_is_cut(schedule, warmup, decay):
    told = {"train.schedule": schedule, "train.warmup": warmup, "train.decay": decay}
    for steps in (1, 4, 200):
        train = cells([{"name": "a", "set": told, "warmup_steps": 0, "measured_steps": steps}])[0].recipe.train
        made = build_schedule(train, steps)  # refuses what is too long
        if warmup + decay <= steps and warmup >= 1 and decay >= 1:
            assert (made.warmup, made.decay) == (warmup, decay)
        assert made.at(steps - 1) > 0


def test_the_planner_never_breaks_a_bench(monkeypatch):
    cell = cells([{"name": "a"}])[0]
    made = predict(cell, here(1))
    assert made is not None
    assert expected_seconds(cell, made) == pytest.approx(5 * made.speed.step_seconds)

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("trainwright.bench.cell.plan", broken)
    assert predict(cell, here(1)) is None
    assert expected_seconds(cell, None) is None
    assert result.predictions(cell, {"status": "ok"}, None) == {}


def test_a_death_without_words_is_told(tmp_path):
    cell = cells([{"name": "a"}])[0]
    log = tmp_path / "log.txt"
    log.write_text("terminate called after throwing an instance of 'std::bad_alloc'\n")
    assert result.why(cell, Ended(-signal.SIGABRT, False, 1.0), [], log, 0)["status"] == "oom"
    log.write_text("nothing special\n")
    row = result.why(cell, Ended(-signal.SIGABRT, False, 1.0), [], log, 0)
    assert (row["status"], row["line"], row["log"]) == ("crashed", "ended by SIGABRT", ["nothing special"])
    row = result.why(cell, Ended(3, False, 1.0), [], log, 0)
    assert row["line"] == "ended with status 3: nothing special"


def test_the_cause_is_told_before_its_consequences(tmp_path):
    told = [
        {"status": "crashed", "rank": 0, "secondary": True, "line": "connection closed"},
        {"status": "crashed", "rank": 1, "secondary": False, "line": "ValueError"},
        {"status": "oom", "rank": 2, "line": "no memory"},
    ]
    for number, each in enumerate(told):
        (tmp_path / f"failure-{number}.json").write_text(json.dumps(each))
    assert [each["rank"] for each in result.read_failures(tmp_path)] == [2, 1, 0]


# ---- the verb


PROGRAM = ["-m", "trainwright", "bench"]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "TRAINWRIGHT_DEVICE": "cpu", "TRAINWRIGHT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    told: dict[str, Any] = {"cwd": folder, "env": environment(folder), "capture_output": True, "text": True}
    return subprocess.run([python(), *PROGRAM, *words], timeout=120, **told)


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """The same, for a test to read from and to interrupt."""
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background inherit deafness to it
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": listens}
    return subprocess.Popen([sys.executable, *PROGRAM, *words], cwd=folder, env=environment(folder), **pipes)


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    rows = [{"name": "first"}, {"name": "long", "set": {"train.seed": 1}, "measured_steps": 100_000}]
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump({**TINY, "rows": rows}))
    return path


@pytest.mark.slow
def test_ctrl_c_leaves_a_state_that_goes_on(tmp_path, matrix):
    with start(tmp_path, str(matrix), "--json") as process:
        for line in process.stderr:
            if line.startswith("... long"):
                break
        time.sleep(1)
        below = list(descendants(process.pid))
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert out == ""
    assert said == "trainwright: interrupted with 1 of 2 cells finished; the same command goes on\n"
    assert below
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)
    rows = json.loads((tmp_path / "benches/m/results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["first"]
    done = run(tmp_path, str(matrix), "--only", "first", "--json")
    assert done.returncode == 0
    assert "1/1 first: ok" in done.stderr
    assert "(kept)" in done.stderr
    assert json.loads(done.stdout)["rows"] == rows
    assert (tmp_path / "benches/m/index.html").exists()


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two cells side by side want two cores")
def test_cells_side_by_side_and_ctrl_c_among_them(tmp_path, matrix):
    said = []
    with start(tmp_path, str(matrix), "--side-by-side") as process:
        for line in process.stderr:
            said.append(line)
            if line.startswith("1/2 first: ok"):
                break
        assert any(line.startswith("... long") for line in said)  # began before the first was done
        below = list(descendants(process.pid))
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=300)
    assert process.returncode == 130
    assert rest == "trainwright: interrupted with 1 of 2 cells finished; the same command goes on\n"
    assert len(below) >= 2  # a warm process for each
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)
    assert "(kept)" in run(tmp_path, str(matrix), "--only", "first").stderr


class Occupied:
    """In place of a warm process: takes its time, and knows who had its devices at once."""

    now: ClassVar[set[str]] = set()
    most = 0

    def __init__(self, environment: dict[str, str]) -> None:
        self.mine = set(environment["CUDA_VISIBLE_DEVICES"].split(","))

    def run(self, folder: Path, gpus: int, limit: float, waiting: Callable[[], None]) -> Ended:
        assert len(self.mine) == gpus
        assert not self.mine & Occupied.now
        Occupied.now |= self.mine
        Occupied.most = max(Occupied.most, len(Occupied.now))
        time.sleep(0.05)
        Occupied.now = Occupied.now - self.mine
        return Ended(1, False, 0.05)

    def close(self) -> None: ...


def test_no_two_cells_have_one_device(tmp_path, monkeypatch):
    monkeypatch.setattr(runners, "Warm", Occupied)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")  # the machine's, as a scheduler gave them
    sizes = (1, 2, 1, 4, 1, 1, 2, 4, 1)
    rows = [{"name": f"{n}", "gpus": gpus, "set": {"train.seed": n}} for n, gpus in enumerate(sizes)]
    asked = cells([*rows, {**rows[-1], "name": "the last under another name"}])
    with Runner(tmp_path, Recorder(), side_by_side=True) as made:
        made.gpus, made.places = 4, Places(4)
        results = run_cells(made, asked, "side by side")
    assert [row["name"] for row in results["rows"]] == [cell.name for cell in asked]
    assert {row["status"] for row in results["rows"]} == {"crashed"}
    assert Occupied.most == 4
    assert not Occupied.now
    assert {device for devices in made.warm for device in devices} == {0, 1, 2, 3}


@pytest.fixture
def verb(tmp_path: Path, monkeypatch: Any, capsys: Any) -> Callable[..., tuple[Any, str, str]]:
    """`trainwright bench WORDS` in this process: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINWRIGHT_DEVICE", "cpu")

    def run_here(*words: str) -> tuple[Any, str, str]:
        monkeypatch.setattr("sys.argv", ["trainwright", "bench", *words])
        with pytest.raises(SystemExit) as left:
            main()
        return (left.value.code, *capsys.readouterr())

    return run_here


def test_what_is_wrong_is_said_before_anything_runs(tmp_path, matrix, verb):
    (tmp_path / "unknown.yaml").write_text("title: t\nrecipe: quickstart\npublished: '009'\n")
    other = [{"name": "of another matrix", "gpus": 1, "status": "ok"}]
    (tmp_path / "other.json").write_text(json.dumps({"rows": other}))
    (tmp_path / "itself.yaml").write_text("title: t\nrecipe: quickstart\nrows: [{name: a, align_with: a}]\n")
    for words, said in (
        (("unknown.yaml", "--dry-run"), "no published document 009"),
        (("itself.yaml", "--dry-run"), "a: align_with is the row itself"),
        ((str(matrix), "--compare", "other.json"), "no row there is called like one here: it has of another matrix"),
        ((), "which matrix?"),
        (("no_such",), "no matrix no_such"),
        ((str(matrix), "train.sed=1"), "first: quickstart: train.sed is not a key: did you mean seed?"),
        ((str(matrix), "parallel.tp=2"), "first: pp=1 x dp_replicate=1 x cp=1 x tp=2 = 2 processes do not divide"),
        ((str(matrix), "--compare", "009"), "no published document 009"),
        ((str(matrix), "--gpu", "H200"), "--gpu H200 is for --dry-run"),
        ((str(matrix), "--dry-run", "--gpu", "H20O"), "--gpu H20O is no card in the table: use one of H20"),
        ((str(matrix), "--find", "max_micro_batch"), "add --memory-gib"),
    ):
        code, out, err = verb(*words)
        assert (code, out) == (2, "")
        assert err.startswith("trainwright: ")
        assert said in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "benches").exists()


def test_a_dry_run_tells_what_would_run(tmp_path, matrix, verb):
    told = json.loads(verb(str(matrix), "--dry-run", "--json")[1])
    assert [cell["name"] for cell in told["cells"]] == ["first", "long"]
    assert all(cell["fits"] and cell["predicted_memory_gib"] > 0 for cell in told["cells"])
    there = json.loads(verb(str(matrix), "--dry-run", "--gpu", "H200", "--json")[1])
    assert there["cells"][0]["predicted_step_seconds"] < told["cells"][0]["predicted_step_seconds"]
    assert told["expected_seconds"] == pytest.approx(sum(cell["expected_seconds"] for cell in told["cells"]))
    assert not (tmp_path / "benches").exists()
