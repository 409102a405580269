"""What a person sees while a run goes on: a progress bar on a terminal, plain lines in a log, silence off rank 0.

Owns the words and the pace. Figures come from `metrics.py`.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_SECONDS = 5.0  # between lines of a log


class Display:
    """Progress of one run towards `total` steps."""

    def __init__(self, *, silent: bool, total: int, done: int = 0) -> None:
        self.silent = silent
        self.total = total
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._seconds: deque[float] = deque(maxlen=50)
        self._last_line = float("-inf")
        self._bar: Progress | None = None
        if not silent and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
            )
            self._task = self._bar.add_task("train", total=total, completed=done, figures="")
            self._bar.start()

    def say(self, text: str) -> None:
        """One line, above the bar where there is one."""
        if not self.silent:
            self.console.print(text, markup=False)
            sys.stdout.flush()

    def step(self, step: int, figures: dict[str, Any]) -> None:
        """Shows the figures of a finished step: loss, tokens/s, time left."""
        if self.silent:
            return
        self._seconds.append(figures["step_seconds"])
        loss = "nan" if figures["loss"] is None else f"{figures['loss']:.4f}"
        left = (self.total - step) * sum(self._seconds) / len(self._seconds)
        rate = figures["tokens_per_second_per_gpu"]
        text = f"loss {loss}  {rate:,.0f} tokens/s/GPU  ETA {clock(left)}"
        if figures.get("mfu") is not None:
            text += f"  MFU {figures['mfu']:.1%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=text)
        elif time.monotonic() - self._last_line > PLAIN_SECONDS or step == self.total:
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self.total}  {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def clock(seconds: float) -> str:
    """95 -> 1:35, 3700 -> 1:01:40, days as 2d 3:00:00."""
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    text = f"{hours}:{minutes:02d}:{secs:02d}" if hours or days else f"{minutes}:{secs:02d}"
    return f"{days}d {text}" if days else text
