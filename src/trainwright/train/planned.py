"""Training and its plan: the largest micro batch, the refusal of what surely cannot fit, the account of memory that ran
out, and predicted beside measured at the end.

Owns asking the planner about the machine that the run is really on; every estimate is `planner/`'s.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from trainwright.device import device_name
from trainwright.errors import UserError
from trainwright.model.config import ModelConfig
from trainwright.parallel.mesh import World
from trainwright.planner.compare import Comparison, compare, out_of_memory, read_metrics, refusal
from trainwright.planner.hardware import GIB, Card, Cluster, cpu_card, find_card
from trainwright.planner.plan import Plan, largest_micro_batch, plan
from trainwright.recipe.schema import Recipe
from trainwright.store import write_json
from trainwright.train.metrics import read_lines

# What libraries say when there is no memory: torch on a CPU, C++, oneDNN, the CUDA driver, cuBLAS.
SHORT_OF_MEMORY = (
    "defaultcpuallocator", "cannot allocate memory", "bad_alloc", "out of memory", "alloc_failed",
    "could not create a memory",
)  # fmt: skip
CPU_ROWS = 32  # more rows in a micro batch make a processor no faster


def cluster_of_world(world: World) -> Cluster:
    """The cards that this run is on, with the memory that torch finds."""
    in_node = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or min(8, world.size)
    if world.device.type == "cpu":
        card = cpu_card()
        return Cluster(replace(card, memory_gib=card.memory_gib / in_node), world.size, in_node)
    name = device_name(world.device)
    memory = torch.get_device_module(world.device).get_device_properties(world.device).total_memory / GIB
    # Of a card that is not in the table only the memory is known: its speed is that of no card in particular.
    card = find_card(name) or Card(name, (name.lower(),), 100, 100, None, 20, memory, 1000, 25, switched=False)
    return Cluster(replace(card, memory_gib=memory), world.size, in_node)


def fitted(recipe: Recipe, world: World, config: ModelConfig, *, force: bool = False) -> tuple[Recipe, Plan]:
    """The recipe with a number in place of `micro_batch_size: auto`, and its plan.

    Raises UserError for a run that surely does not fit, unless `force`. All ranks come to the same answer.
    """
    cluster = cluster_of_world(world)
    least = min(world.gather(cluster.card.memory_gib))
    cluster = replace(cluster, card=replace(cluster.card, memory_gib=least))
    if recipe.train.micro_batch_size == "auto":
        limit = CPU_ROWS if world.device.type == "cpu" else None
        rows = largest_micro_batch(recipe, cluster, config=config, limit=limit)
        settings = recipe.train.model_copy(update={"micro_batch_size": max(1, rows)})
        recipe = recipe.model_copy(update={"train": settings})
    made = plan(recipe, cluster, config=config)
    refused = None if force else refusal(made)
    if refused is not None:
        raise UserError(refused)
    return recipe, made


@contextmanager
def accounted(made: Plan, where: Callable[[], str]) -> Iterator[None]:
    """Turns memory that ran out inside the block into a UserError with the plan's account. `where`: which step."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{where()}: {account_of_memory(made, error)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was what a process lacked, on the device or in the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(words in text for words in SHORT_OF_MEMORY)


def account_of_memory(made: Plan, error: BaseException) -> str:
    """What to say when the device ran out: the plan's account of the phase it ran out in."""
    asked, free = asked_and_free(str(error))
    return out_of_memory(made, phase_of(error), asked_gib=asked, free_gib=free)


def asked_and_free(text: str) -> tuple[float | None, float | None]:
    """(GiB that were asked for, GiB that were free) out of torch's message, as far as it tells them."""
    asked = _gib(r"[Tt]ried to allocate ([\d.]+) (\w+)", text)
    return asked, _gib(r"of which ([\d.]+) (\w+) is free", text)


def phase_of(error: BaseException) -> str:
    """Where in a step, or before it, an error came from, by the functions it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    names = {frame.name for frame in frames}
    files = {frame.filename.replace(os.sep, "/") for frame in frames}
    if "_build_model" in names:
        return "build"
    if any("torch/optim/" in file or file.endswith("train/optimizer.py") for file in files):
        return "optimizer"
    if any(file.endswith(("train/evaluate.py", "model/generate.py")) for file in files):
        return "evaluation"
    if any(file.endswith(("train/export.py", "train/checkpoint.py", "train/chunks.py")) for file in files):
        return "save"
    return "backward" if names & {"backward", "_engine_run_backward"} else "loss"


def _gib(pattern: str, text: str) -> float | None:
    """A size out of torch's message."""
    found = re.search(pattern, text)
    units = {"bytes": 2**-30, "KiB": 2**-20, "MiB": 2**-10, "GiB": 1.0, "TiB": 2.0**10}
    return float(found[1]) * units[found[2]] if found and found[2] in units else None


def predicted_beside_measured(made: Plan, metrics: Path, world: World) -> Comparison | None:
    """After a run, from its metrics.jsonl: into planned.json beside it, by the first rank; None on all others.

    A processor tells its process's memory, not its tensors', so only the time is compared there; and since nothing was
    measured of most processors, None is returned there too: it is for the file, not for the screen.
    """
    if not world.is_main:
        return None
    on_cpu = world.device.type == "cpu"
    standing = None if on_cpu else torch.accelerator.memory_allocated(world.device) / GIB
    measured = read_metrics(read_lines(metrics), standing)
    if on_cpu:
        measured = replace(measured, peak_memory_gib=None)
    found = compare(made, measured)
    from trainwright.planner.report import as_dict  # brings the terminal's tables along

    write_json(metrics.with_name("planned.json"), {**found.as_dict(), "plan": as_dict(made)})
    return None if on_cpu else found
