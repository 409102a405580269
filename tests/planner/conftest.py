"""What every test of the planner starts from."""

import pytest


@pytest.fixture(autouse=True)
def shipped_efficiencies(tmp_path, monkeypatch):
    """No plan takes what `doctor --measure` once wrote on this machine."""
    monkeypatch.setenv("TRAINWRIGHT_CALIBRATION", str(tmp_path / "calibration"))
