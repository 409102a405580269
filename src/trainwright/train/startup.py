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

    def done(self, phase: str) -> None:
        """`phase` took the time since the phase before it."""
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._mark
        self._mark = now

    def first_step_done(self) -> None:
        """The first step, and of it what compilation took (0 where nothing is compiled, or compiled before)."""
        self.done("first step")
        compiling = torch._dynamo.utils.calculate_time_spent()["total_wall_time"] if _has_dynamo() else 0.0
        self.phases["compile"] = min(compiling, self.phases["first step"])
        self.phases["first step"] -= self.phases["compile"]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.phases.items() if seconds >= 0.05)
        return f"first step done after {sum(self.phases.values()):.1f} s: {parts}"


def _has_dynamo() -> bool:
    """Whether anything was compiled; asking the compiler would import it."""
    return "torch._dynamo.utils" in sys.modules


def process_age() -> float:
    """Seconds since this process started; 0 where the system does not say (it is Linux's to say)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return 0.0
