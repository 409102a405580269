"""doctor --measure: a calibration comes out that plans take, in one process and over links."""

import json
import os
import subprocess
import time
from contextlib import contextmanager

import pytest
import torch

from tests.warm import python
from trainwright.bench import measure
from trainwright.planner.calibration import load_calibration, read_calibration
from trainwright.planner.hardware import cpu_card


@pytest.fixture
def quick(monkeypatch):
    """Small sizes, so that the test takes a second."""
    inner = measure._Bench.__init__

    def small(self, device, card):
        inner(self, device, card)
        self.side, self.lengths = 256, (64, 256)

    monkeypatch.setattr(measure._Bench, "__init__", small)


def test_a_measured_card_is_said_to_be(quick, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINWRIGHT_CALIBRATION", str(tmp_path))
    from trainwright.planner.calibration import write_calibration

    found = measure.measure()
    path = write_calibration(found)
    assert read_calibration(path) == found == load_calibration(cpu_card())
    assert found.measured
    assert found.source.startswith("measured by doctor --measure on cpu")
    assert 0 < found.matmul["fp32"] < 100
    assert found.attention["flash"].forward > 0
    assert 0 < found.launch < 1e-2
    assert 0 < found.bandwidth < 100


def test_a_context_that_serves_once(quick, monkeypatch):
    """Such are torch's, which choose a kernel on a GPU."""

    @contextmanager
    def once():
        yield

    monkeypatch.setattr(measure._Bench, "_backends", lambda self: iter([("flash", once)]))
    assert measure.measure().attention["flash"].backward > 0


def test_work_goes_on_until_a_card_has_settled():
    bench = measure._Bench(torch.device("cpu"), cpu_card())
    calls = []
    assert bench.seconds(lambda: calls.append(time.perf_counter()), settle=0.1) < 0.1
    assert len([call for call in calls if call < calls[0] + 0.1]) > 9
    assert calls[-1] - calls[0] >= 0.099


def test_two_points_give_the_limit_and_the_half():
    limit, half = 0.6, 700.0
    shares = tuple(limit * s / (s + half) for s in (2048, 8192))
    assert measure._limit((2048, 8192), shares) == pytest.approx((limit, half))
    assert measure._limit((2048, 8192), (0.5, 0.4)) == (0.5, 0.0)
    assert measure._half(256, 256 / (256 + 100)) == pytest.approx(100)


@pytest.mark.slow
def test_links_between_processes(tmp_path):
    command = [python(), "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "trainwright", "doctor"]
    environment = {"TRAINWRIGHT_CALIBRATION": str(tmp_path), "TRAINWRIGHT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--measure", "--json"], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found["link"] > 0
    assert found["latency"] > 0
