"""Predicted beside measured: after a run, after a bench cell, and when memory ran out. No torch.

Owns the errors, which part of a miss is to blame as far as the measured figures can tell, and the account of a run that
went out of memory. Measuring is the trainer's and the bench's work.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trainwright.planner.hardware import GIB
from trainwright.planner.moments import Moment
from trainwright.planner.plan import Plan, find_changes

MISS = 0.10  # a larger relative error says which part missed
WARM_UP = 3  # steps that compile, tune and fill caches


@dataclass(frozen=True)
class Measured:
    """What a run really took. `standing_memory_gib`: allocated between two steps, so weights and optimizer alone."""

    peak_memory_gib: float | None = None
    step_seconds: float | None = None
    standing_memory_gib: float | None = None
    data_wait_seconds: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """Relative errors, predicted over measured less one; None where nothing was measured."""

    predicted_memory_gib: float
    predicted_step_seconds: float
    measured: Measured
    memory_error: float | None
    time_error: float | None
    missed: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For bench rows and environment.json."""
        return {
            "predicted_memory_gib": self.predicted_memory_gib,
            "predicted_step_seconds": self.predicted_step_seconds,
            "peak_memory_gib": self.measured.peak_memory_gib,
            "step_seconds": self.measured.step_seconds,
            "memory_error": self.memory_error,
            "time_error": self.time_error,
            "missed": list(self.missed),
        }

    def __str__(self) -> str:
        """One line for the screen."""
        parts = []
        if self.memory_error is not None:
            parts.append(
                f"memory {self.predicted_memory_gib:.1f} GiB planned, {self.measured.peak_memory_gib:.1f} taken "
                f"({self.memory_error:+.1%})"
            )
        if self.time_error is not None:
            parts.append(
                f"a step {self.predicted_step_seconds:.3g} s planned, {self.measured.step_seconds:.3g} taken "
                f"({self.time_error:+.1%})"
            )
        return "; ".join([*parts, *self.missed])


def read_metrics(lines: Iterable[Mapping[str, Any]], standing_memory_gib: float | None = None) -> Measured:
    """The median step and the peak of a run's metrics.jsonl, without its first steps where there are more."""
    rows = [line for line in lines if line.get("step_seconds")]
    steady = rows[WARM_UP:] or rows
    peaks = [line["peak_memory_gib"] for line in rows if line.get("peak_memory_gib") is not None]
    seconds = [line["step_seconds"] for line in steady]
    waits = [line.get("data_wait_seconds") or 0.0 for line in steady]
    return Measured(
        max(peaks, default=None),
        statistics.median(seconds) if seconds else None,
        standing_memory_gib,
        statistics.median(waits) if waits else 0.0,
    )


def compare(plan: Plan, measured: Measured) -> Comparison:
    """Errors of a plan, and for each above 10% the part that missed, as far as the figures can tell."""
    memory, seconds = plan.memory.allocated / GIB, plan.speed.step_seconds
    memory_error = _error(memory, measured.peak_memory_gib)
    time_error = _error(seconds, measured.step_seconds)
    missed = []
    if memory_error is not None and abs(memory_error) > MISS:
        missed.append(_memory_miss(plan, measured))
    if time_error is not None and abs(time_error) > MISS:
        missed.append(_time_miss(plan, measured))
    return Comparison(memory, seconds, measured, memory_error, time_error, tuple(missed))


def _error(predicted: float, measured: float | None) -> float | None:
    return predicted / measured - 1 if measured else None


def _memory_miss(plan: Plan, measured: Measured) -> str:
    """States are measured between steps; what a step adds is the rest."""
    peak = plan.memory.fullest.peak
    largest = ", ".join(f"{name} {size / GIB:.1f}" for name, size in _largest(peak.parts, 3))
    if measured.standing_memory_gib is None or measured.peak_memory_gib is None:
        return f"memory missed; the plan's largest parts at {peak.name}: {largest}"
    states = plan.memory.fullest.states
    standing = (states.total - states.gradients) / GIB
    state_miss = standing - measured.standing_memory_gib
    step_miss = peak.total / GIB - standing - (measured.peak_memory_gib - measured.standing_memory_gib)
    if abs(state_miss) > abs(step_miss):
        return f"weights and optimizer missed: {standing:.1f} GiB planned, {measured.standing_memory_gib:.1f} taken"
    added = measured.peak_memory_gib - measured.standing_memory_gib
    return (
        f"what a step adds missed: {added + step_miss:.1f} GiB planned, {added:.1f} taken; "
        f"the plan's largest parts at {peak.name}: {largest}"
    )


def _time_miss(plan: Plan, measured: Measured) -> str:
    assert measured.step_seconds is not None
    if measured.data_wait_seconds > 0.05 * measured.step_seconds:
        return f"data missed: {measured.data_wait_seconds:.3g} s of a step waited for rows, which no plan counts"
    parts = plan.speed.parts
    largest = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in _largest(parts, 3))
    source = plan.job.calibration.source
    return f"computation or communication missed; the plan's largest parts: {largest}; efficiencies: {source}"


def _largest(parts: Mapping[str, float], count: int) -> list[tuple[str, float]]:
    return sorted(parts.items(), key=lambda pair: -pair[1])[:count]


def out_of_memory(plan: Plan, phase: str, *, asked_gib: float | None = None, free_gib: float | None = None) -> str:
    """One line for a run that ran out: the phase, what the plan has there, the shortfall, the smallest change."""
    peak = _moment(plan, phase)
    largest = ", ".join(f"{name} {size / GIB:.1f}" for name, size in _largest(peak.parts, 3))
    short = max(0.0, -plan.memory.free / GIB)
    found = ""
    if asked_gib is not None and free_gib is not None:
        short = max(short, asked_gib - free_gib)
        found = f", {asked_gib:.2f} GiB asked and {free_gib:.2f} free"
    account = (
        f"out of memory in {phase}{found}; the plan has {peak.total / GIB:.1f} GiB there ({largest}) of "
        f"{plan.memory.capacity / GIB:.1f}"
    )
    if phase == "build" and plan.fits:
        return f"{account}; the whole run would fit: another process may hold the device"
    # The plan may have thought that it fits: then a change must free what was really short, with a little to spare.
    missing = max(short, 0.02 * plan.memory.capacity / GIB)
    card = replace(plan.job.cluster.card, memory_gib=plan.memory.needed / GIB - missing)
    tight = replace(plan, job=replace(plan.job, cluster=replace(plan.job.cluster, card=card)))
    changes = find_changes(tight, limit=1)
    if not changes:
        return f"{account}; no single change frees {missing:.1f} GiB: try trainwright plan --search"
    return f"{account}; the smallest change that fits: {changes[0].what} ({changes[0].speed - 1:+.0%} speed)"


def _moment(plan: Plan, phase: str) -> Moment:
    """The plan's moment of a phase; before the first step only weights are there."""
    peak = plan.memory.fullest.peak
    if phase == "build":
        weights = ("weights", "quantized weights", "adapters")
        return Moment("build", {name: size for name, size in peak.parts.items() if name in weights})
    like = [moment for moment in plan.memory.fullest.moments if moment.name == phase]
    return max(like, key=lambda moment: moment.total, default=peak)


def refusal(plan: Plan) -> str | None:
    """One line for a run that surely cannot fit: even with 7% less than planned. None for any other."""
    memory = plan.memory
    least = 0.93 * memory.allocated + memory.context
    if least <= memory.capacity:
        return None
    peak = memory.fullest.peak
    largest = ", ".join(f"{name} {size / GIB:.1f}" for name, size in _largest(peak.parts, 3))
    changes = find_changes(plan, limit=1)
    fix = f"set {changes[0].what} ({changes[0].speed - 1:+.0%} speed)" if changes else "try trainwright plan --search"
    return (
        f"this run needs {memory.needed / GIB:.1f} GiB a GPU at {peak.name} ({largest}) and there are "
        f"{memory.capacity / GIB:.1f}: {fix}, or --force to try"
    )
