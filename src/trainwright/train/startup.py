"""Where the time goes between the start of the process and the end of the first step, by phase."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch


class Startup:
    """Seconds of each phase, in order: `imports` is all that came before this was made, then what `done` names."""

    def __init__(self) -> None:
        self.phases = {"imports": process_age()}
        self._mark = time.perf_counter()
        self._compiled = _compile_seconds()  # before: another run of this process may have compiled

    def done(self, phase: str) -> None:
        """`phase` took the time since the phase before it."""
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._mark
        self._mark = now

    def first_step_done(self) -> None:
        """The first step, and of it what compilation took (0 where nothing is compiled, or compiled before)."""
        self.done("first step")
        self.phases["compile"] = min(_compile_seconds() - self._compiled, self.phases["first step"])
        self.phases["first step"] -= self.phases["compile"]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.phases.items() if seconds >= 0.05)
        return f"first step done after {sum(self.phases.values()):.1f} s: {parts}"


def _compile_seconds() -> float:
    """Of this process so far. Where nothing was compiled, asking the compiler would import it."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0.0
    return float(torch._dynamo.utils.calculate_time_spent().get("total_wall_time", 0.0))


def process_age() -> float:
    """Seconds since this process started; 0 where the system does not say (it is Linux's to say)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return 0.0
