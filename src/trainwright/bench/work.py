"""What a process of a cell does: trains the steps with the project's own trainer and writes down what they took.

    FOLDER/cell.json       what is asked (runner.py)            FOLDER/recipe.yaml   and of which recipe
    FOLDER/run/            the run: metrics.jsonl, environment.json, ranks/
    FOLDER/outcome.json    what was measured, by rank 0; or FOLDER/failure-RANK.json, by each rank that failed

Owns the memory cap and what a failure was. Starting and ending processes is `processes.py`'s, figures `result.py`'s.
"""

from __future__ import annotations

import json
import os
import re
import resource
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainwright.device import GIB, default_device, device_name, peak_memory_gib
from trainwright.errors import UserError
from trainwright.parallel import watch
from trainwright.recipe.load import load_recipe
from trainwright.store import write_json
from trainwright.train.planned import asked_and_free, is_out_of_memory, phase_of
from trainwright.train.signals import StopRequest
from trainwright.train.trainer import Trainer


def work(folder: Path) -> int:
    """One rank of a cell; returns the exit status. Nothing escapes: a failure is a file."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "OMP_NUM_THREADS" in os.environ:  # read by a library that a forked process has loaded long before
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    trainer = None
    cap = json.loads((folder / "cell.json").read_text(encoding="utf-8"))["memory_gib"]
    limit = None
    try:
        limit = cap_memory(cap) if cap is not None else None
        trainer = CellTrainer(folder)
        trainer.measure()
    except BaseException as error:
        lift(limit)
        told = account(error, "build" if trainer is None else None, cap, limit)
        told |= {"rank": rank, "step": trainer.step if trainer is not None else None}
        write_json(folder / f"failure-{rank}.json", told)
        traceback.print_exception(error)
        if size > 1:
            return watch.report_failure(folder / "run" / "ranks", error, rank, size)
        return watch.EXIT_USER if isinstance(error, UserError) else watch.EXIT_FAILED
    return 0


class CellTrainer(Trainer):
    """A run that leaves figures and no checkpoint, no model, no report."""

    def __init__(self, folder: Path) -> None:
        self.cell, self.began = folder, time.perf_counter()
        super().__init__(load_recipe(folder / "recipe.yaml"), force=True)

    def measure(self) -> None:
        """All steps, then outcome.json."""
        try:
            started = time.perf_counter() - self.began
            with StopRequest() as stop:
                finished = self._fit(stop)
            peaks = self.world.gather((*peak_memory_gib(self.world.device), standing_gib(self.world.device)))
            if self.world.is_main and finished:
                write_json(self.cell / "outcome.json", {**self._outcome(peaks), "start_seconds": started})
        finally:
            self.close()

    def _save(self, may_fail: bool = False) -> None:
        """Nothing of a benchmark run is kept but its figures."""

    def _outcome(self, peaks: list[tuple[float | None, ...]]) -> dict[str, Any]:
        """What only the process that trained knows."""
        config, seq_len = self.sources.config, self.recipe.data.seq_len
        trained = sum(tensor.numel() for tensor in self.model.parameters() if tensor.requires_grad)
        some = None if trained >= config.num_parameters() else trained
        names = ("peak_memory_gib", "reserved_memory_gib", "standing_memory_gib")
        return {
            **dict(zip(names, fullest(peaks), strict=True)),
            "device": device_name(self.world.device),
            "device_memory_gib": device_memory_gib(self.world.device),
            "torch": torch.__version__,
            "micro_batch_size": self.loader.micro_batch_size,
            "accumulation": self.loader.accumulation,
            "rows_per_step": self.loader.rows_per_step,
            "parameters": config.num_parameters(),
            "trained_parameters": trained,
            "flops_per_token": {
                "palm": self.costs.flops_per_token,
                "causal": config.flops_per_token(seq_len, "causal", trained_parameters=some),
                "hardware": self.costs.hardware_flops_per_token,
            },
        }


# ---- memory


def fullest(peaks: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The largest of each figure over the ranks; None where no rank knows it."""
    return [max((value for value in each if value is not None), default=None) for each in zip(*peaks, strict=True)]


def cap_memory(gib: float) -> int | None:
    """From here on this process has `gib` for what it trains. Returns the limit in bytes that was set on a CPU.

    On an accelerator it is all that torch's allocator may reserve; a real card of that size has about half a GiB less,
    which the driver keeps. On a CPU it is what the process may map beyond what it has already (RLIMIT_DATA, Linux):
    weights, gradients, activations, rows. Raises UserError where neither can be.
    """
    device = default_device(int(os.environ.get("LOCAL_RANK", 0)))
    if device.type != "cpu":
        module: Any = torch.get_device_module(device)
        total = device_memory_gib(device)
        if total is None or not hasattr(module, "set_per_process_memory_fraction"):
            raise UserError(f"memory_gib={gib:g}: torch cannot cap the memory of {device.type}: leave it out")
        if gib > 1.02 * total:  # what makers call 24 GB is a little more or less
            raise UserError(f"memory_gib={gib:g} is more than this card has, {total:.1f}: use less, or leave it out")
        module.set_per_process_memory_fraction(min(1.0, gib / total), device)
        return None
    mapped = mapped_bytes()
    if mapped is None:
        raise UserError(f"memory_gib={gib:g}: this system does not cap what a process maps: leave it out")
    limit = mapped + int(gib * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    return limit


def lift(limit: int | None) -> None:
    """Takes a processor's cap away again, so that what happened can be written down."""
    if limit is not None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def mapped_bytes() -> int | None:
    """What RLIMIT_DATA counts of this process; None where the system does not say (it is Linux's to say)."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmData:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def device_memory_gib(device: torch.device) -> float | None:
    """All memory of an accelerator; None for a processor."""
    if device.type == "cpu":
        return None
    total = torch.get_device_module(device).get_device_properties(device).total_memory
    return float(total) / GIB


def standing_gib(device: torch.device) -> float | None:
    """What is allocated between two steps, on an accelerator."""
    return None if device.type == "cpu" else torch.accelerator.memory_allocated(device) / GIB


# ---- failures


def account(error: BaseException, phase: str | None, cap: float | None, limit: int | None) -> dict[str, Any]:
    """What a failure was: its status, one line, and for memory the phase, what was asked and what was free.

    `phase`: None finds it by where the error came from.
    """
    if error.__cause__ is not None and is_out_of_memory(error.__cause__):  # which the trainer has put into words
        error = error.__cause__
    text = " ".join(str(error).split())
    if not is_out_of_memory(error):
        user = isinstance(error, UserError)
        line = text if user else f"{type(error).__name__}: {text[:400]}"
        return {"status": "refused" if user else "crashed", "line": line, "secondary": watch.is_secondary(error)}
    asked, free = asked_and_free(text)
    if limit is not None:
        free = max(0.0, (limit - (mapped_bytes() or limit)) / GIB)
    elif cap is not None and torch.accelerator.is_available():
        free = max(0.0, cap - torch.accelerator.memory_reserved() / GIB)
    return {
        "status": "oom",
        "line": text[:400],
        "phase": phase or phase_of(error),
        "asked_gib": asked,
        "free_gib": free,
    }
