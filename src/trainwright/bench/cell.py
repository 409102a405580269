"""One cell of a matrix: its recipe as it will run, its key, and what the planner thinks of it. No torch.

Owns making a benchmark run of a recipe (so many steps, nothing written at the end), random weights and made tokens in
place of files, the key by which a finished cell is known again, and the words that tables use for a recipe.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from trainwright.bench.made import made
from trainwright.bench.matrix import Matrix, Setting, expand
from trainwright.bench.prove import merged
from trainwright.errors import UserError
from trainwright.parallel.layout import Layout, check_model
from trainwright.planner.build import model_config
from trainwright.planner.hardware import Cluster, cpu_card, find_card, this_machine
from trainwright.planner.plan import Plan, plan
from trainwright.recipe.load import load_recipe
from trainwright.recipe.schema import Recipe

START_SECONDS = 20.0  # of a cell on an accelerator besides its steps: weights, compilation


@dataclass(frozen=True)
class Cell:
    """A setting whose recipe is known. `recipe` trains warm-up and measured steps and writes nothing at its end."""

    setting: Setting
    recipe: Recipe

    @property
    def name(self) -> str:
        return self.setting.name

    @property
    def gpus(self) -> int:
        return self.setting.gpus

    @property
    def layout(self) -> Layout:
        return Layout.of(self.recipe.parallel, self.gpus)

    @property
    def steps(self) -> int:
        return self.setting.warmup_steps + self.setting.measured_steps

    def key(self, device: str) -> str:
        """Of all that decides the result: what the recipe says besides defaults (so that a new key of recipes leaves
        kept results known), the processes, the steps, the cap, the kind of device."""
        setting = self.setting
        recipe = self.recipe.model_dump(mode="json", exclude_defaults=True, exclude={"name", "description", "output"})
        told = [recipe, setting.gpus, setting.warmup_steps, setting.measured_steps, setting.memory_gib, device]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def with_set(self, change: dict[str, Any], **setting: Any) -> Cell:
        """The same cell with other keys of its recipe, and other fields of its setting."""
        values = {**self.setting.model_dump(), **setting, "set": {**self.setting.set, **change}}
        return cell_of(Setting.model_validate(values))


def cells_of(matrix: Matrix, **change: Any) -> list[Cell]:
    """All cells, each checked as far as can be without starting anything. Raises UserError that names the cell.

    `change`: fields of every setting, such as `overrides`.
    """
    cells = [cell_of(setting.model_copy(update=change)) for setting in expand(matrix)]
    names = [cell.name for cell in cells]
    for cell in cells:
        other = cell.setting.align_with
        if other is not None and other not in names and not Path(other).exists():
            raise UserError(f"{cell.name}: align_with={other!r} is no row of this matrix and no run's folder")
        if other == cell.name:
            raise UserError(f"{cell.name}: align_with is the row itself: name the row that its losses must follow")
    return cells


def choose(cells: Sequence[Cell], only: str | None) -> list[Cell]:
    """The cells whose names match the pattern `only`. Raises UserError that names the nearest where none does."""
    found = [cell for cell in cells if only is None or fnmatch(cell.name, only)]
    if not found:
        nearest = difflib.get_close_matches(str(only), [cell.name for cell in cells], n=1, cutoff=0.0)
        raise UserError(f"--only {only} matches no row: did you mean {nearest[0]!r}?")
    return found


def cell_of(setting: Setting) -> Cell:
    """Reads the recipe and makes a benchmark run of it. Raises UserError that names the cell."""
    try:
        asked = load_recipe(setting.recipe, setting.words)
        layout = Layout.of(asked.parallel, setting.gpus)
        size, train = asked.train.micro_batch_size, asked.train
        rows = size if isinstance(size, int) else 1
        accumulation = layout.accumulation(rows, train.global_batch_size, train.gradient_accumulation_steps)
        steps = setting.warmup_steps + setting.measured_steps
        if setting.made:
            asked = made(asked, rows=steps * rows * accumulation * layout.data_ranks)
        seq_len, replicated = asked.data.seq_len, asked.parallel.kv_replication
        check_model(layout, model_config(asked), seq_len, kv_replication=replicated)
        return Cell(setting, _for_bench(asked, steps))
    except UserError as error:
        raise UserError(f"{setting.name}: {error}") from None


def _for_bench(recipe: Recipe, steps: int) -> Recipe:
    """`steps` steps and nothing else: no held-out data, no checkpoints, no trackers.

    A warm-up or a decay that is longer than these steps is cut to them.
    """
    train = recipe.train
    asked = [math.ceil(value * steps) if value < 1 else round(value) for value in (train.warmup, train.decay)]
    rising = min(asked[0], steps)
    change: dict[str, Any] = {
        "name": "run", "description": "",
        "train": {
            "steps": steps, "epochs": None, "tokens": None, "resume": False,
            "warmup": train.warmup if asked[0] == rising else rising,
            "decay": train.decay if rising + asked[1] <= steps else steps - rising,
        },
        "data": {"validation": 0.0},
        "evaluation": {"every": 0, "generate": 0},
        "checkpoint": {"every": 0, "keep_every": 0},
        "tracking": {"tensorboard": False, "tracker": None, "log_every": 1},
    }  # fmt: skip
    return load_recipe(merged(recipe.model_dump(mode="json"), change))


# ---- what the planner thinks


def here(
    gpus: int | None = None, memory_gib: float | None = None, device: str | None = None, own_gib: float = 0.0
) -> Cluster:
    """The cards that a cell runs on: this machine's (all of them by default), or those that a cell told by name.

    Memory of a processor is shared by its processes. `memory_gib` caps either, `own_gib` is what the cell found.
    """
    if device is not None:
        cluster = Cluster(find_card(device) or cpu_card(), gpus or 1, min(8, gpus or 1))
    elif os.environ.get("TRAINWRIGHT_DEVICE") == "cpu":
        cluster = Cluster(cpu_card(), gpus or 1, gpus or 1)
    else:
        cluster = this_machine(gpus)
    shared = cluster.gpus if cluster.card.name == "CPU" else 1
    memory = memory_gib or own_gib or cluster.card.memory_gib / shared
    return replace(cluster, card=replace(cluster.card, memory_gib=memory))


def predict(cell: Cell, cluster: Cluster) -> Plan | None:
    """The plan of a cell; None where there can be none: a plan that fails ends no benchmark."""
    try:
        return plan(cell.recipe, cluster)
    except Exception:
        return None


def expected_seconds(cell: Cell, made: Plan | None) -> float | None:
    """How long a cell takes, by its plan: its steps and its start; never longer than its limit."""
    if made is None:
        return None
    seconds = cell.steps * made.speed.step_seconds + (0 if made.job.cluster.card.name == "CPU" else START_SECONDS)
    return min(seconds, cell.setting.time_limit_seconds)


# ---- words


def model_name(recipe: Recipe) -> str:
    """What is trained, by name where it has one."""
    model = recipe.model
    if model.path is not None:
        return model.path.rstrip("/").rpartition("/")[2]
    if isinstance(model.config, str):
        return model.config.rstrip("/").rpartition("/")[2]
    keys = model.config or {}
    return str(keys.get("_name_or_path") or keys.get("model_type") or "model")


def task_name(recipe: Recipe) -> str:
    """pretrain, full, lora, qlora (4 bits), int8 or fp8: the published tables' words."""
    if recipe.adapter is None:
        return "pretrain" if recipe.task == "pretrain" else "full"
    return {None: "lora", "nf4": "qlora"}.get(recipe.quantize, str(recipe.quantize))


def layout_name(layout: Layout) -> str:
    """TP4PP1DP2, with the ZeRO stage where data ranks share something, and SP for a row that is split."""
    shared = layout.dp_shard * layout.cp > 1 and layout.zero > 0
    return str(layout).replace("CP", "SP") + (f" ZeRO-{layout.zero}" if shared else "")


def recompute_name(recipe: Recipe) -> str:
    """What is computed again, and what waits in host memory."""
    parallel = recipe.parallel
    memory = f" {parallel.recompute_memory:g} GiB kept" if parallel.recompute_memory is not None else ""
    offload = f", {parallel.offload} offloaded" if parallel.offload != "none" else ""
    return f"{parallel.recompute}{memory if parallel.recompute == 'selective' else ''}{offload}"


def need_more_gpus(cell: Cell, count: int) -> str | None:
    """Why a cell cannot run on a machine with `count` accelerators (0: processes of the CPU, as many as asked)."""
    if 0 < count < cell.gpus:
        return f"needs {cell.gpus} GPUs, this machine has {count}"
    return None
