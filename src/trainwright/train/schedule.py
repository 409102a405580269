"""The learning rate at every step: a stateless function, so resuming needs the step number and nothing else.

Owns the shapes (cosine, linear, constant, wsd) and their arithmetic. Setting the rate is `optimizer.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from trainwright.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Warmup, then one of four shapes, over `total` optimizer steps.

    Step i counts from 0. The warmup rises as (i + 1) / warmup, so no step has rate zero. The decay is at its peak at
    the first step after the warmup and would reach `minimum` at step `total`, the one after the last, as in Megatron-LM
    and transformers: no step is spent at the end of a decay to zero.
    """

    kind: Literal["cosine", "linear", "constant", "wsd"]
    peak: float
    minimum: float
    total: int
    warmup: float
    decay: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup_steps > self.total:
            raise UserError(
                f"train.warmup={self.warmup:g} is longer than the run's {self.total} steps: "
                f"use at most {self.total}, or a share below 1"
            )
        if self.kind == "wsd" and self.warmup_steps + self.decay_steps > self.total:
            raise UserError(
                f"train.warmup and train.decay are {self.warmup_steps} + {self.decay_steps} steps, more than the run's "
                f"{self.total}: lower one"
            )

    @property
    def warmup_steps(self) -> int:
        """Steps that rise."""
        return _steps(self.warmup, self.total)

    @property
    def decay_steps(self) -> int:
        """Steps that fall at the end; wsd only."""
        return _steps(self.decay, self.total)

    def at(self, step: int) -> float:
        """Learning rate of the optimizer step with this index, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        return self.minimum + (self.peak - self.minimum) * self._shape(step)

    def _shape(self, step: int) -> float:
        """1 at the peak, 0 at the minimum."""
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total - self.warmup_steps))
        if self.kind == "cosine":  # Loshchilov & Hutter 2017, eq. 5
            return 0.5 * (1 + math.cos(math.pi * done))
        if self.kind == "linear":
            return 1 - done
        if self.kind == "constant":
            return 1.0
        # Warmup, stable, decay (Hu et al. 2024, MiniCPM, section 4.2) with a linear decay.
        return min(1.0, max(0, self.total - step) / max(1, self.decay_steps))


def _steps(amount: float, total: int) -> int:
    """A share of all steps below 1, else a number of steps."""
    return math.ceil(amount * total) if amount < 1 else round(amount)
