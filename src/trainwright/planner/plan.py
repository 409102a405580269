"""The plan of a run: does it fit, how fast is it, how long does it take, what would make it fit. No torch.

`plan(recipe, cluster)` is the planner's front door. Owns the length of the run and the search for the smallest change
that makes a run fit; ranking whole layouts is `search.py`'s, printing `report.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from trainwright.errors import UserError
from trainwright.model.config import ModelConfig
from trainwright.parallel.layout import Layout
from trainwright.planner.build import build_job, model_config
from trainwright.planner.calibration import Calibration
from trainwright.planner.hardware import GIB, Cluster, cluster_of, this_machine
from trainwright.planner.job import Job
from trainwright.planner.memory import MemoryPlan, plan_memory
from trainwright.planner.program import Program
from trainwright.planner.speed import SpeedPlan, plan_speed
from trainwright.recipe.load import validate
from trainwright.recipe.schema import Recipe


@dataclass(frozen=True)
class RunLength:
    """The whole run. None where the recipe counts epochs and nobody said how many rows there are."""

    steps: int | None
    tokens: int | None
    hours: float | None
    gpu_hours: float | None
    money: float | None


@dataclass(frozen=True)
class Change:
    """One way to make a run fit: keys of the recipe, what it costs in speed (1 = none), what it frees."""

    overrides: dict[str, Any]
    what: str
    speed: float
    free_gib: float
    same_result: bool = True
    """Whether the run computes the same: layouts and recomputation do, fewer bits and adapters do not."""


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it runs."""

    job: Job
    memory: MemoryPlan
    speed: SpeedPlan
    price: float | None = None
    rows: int | None = None

    @property
    def recipe(self) -> Recipe:
        return self.job.recipe

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @cached_property
    def length(self) -> RunLength:
        """Steps, tokens and hours of the whole run; `price` is money for one GPU hour."""
        train, rows = self.recipe.train, self.job.global_batch
        steps = train.steps
        if train.tokens is not None:
            steps = math.ceil(train.tokens / (rows * self.job.seq_len))
        elif train.epochs is not None:
            steps = None if self.rows is None else max(1, math.ceil(train.epochs * self.rows / rows))
        if steps is None:
            return RunLength(None, None, None, None, None)
        hours = steps * self.speed.step_seconds / 3600
        gpu_hours = hours * self.job.cluster.gpus
        money = gpu_hours * self.price if self.price is not None else None
        return RunLength(steps, steps * rows * self.job.seq_len, hours, gpu_hours, money)

    @cached_property
    def advice(self) -> list[Change]:
        """Smallest changes that make it fit, those that keep the result first, each by its speed; empty if it fits."""
        return [] if self.fits else find_changes(self)


def plan(
    recipe: Recipe,
    cluster: Cluster | None = None,
    *,
    gpu: str | None = None,
    gpus: int | None = None,
    price: float | None = None,
    rows: int | None = None,
    program: Program | None = None,
    calibration: Calibration | None = None,
    config: ModelConfig | None = None,
) -> Plan:
    """The plan of a recipe on a cluster, or on `gpus` of a card by name; by default on this machine.

    price: money for one GPU hour. rows: rows of the data, for recipes that count epochs. config: the model's tree where
    it is known already. `micro_batch_size: auto` takes the largest that fits. Raises UserError for layouts that do not
    divide and cards that are not known.
    """
    if cluster is None:
        cluster = cluster_of(gpu, gpus) if gpu else this_machine(gpus)
    config = config or model_config(recipe)
    micro_batch = None
    if recipe.train.micro_batch_size == "auto":
        micro_batch = largest_micro_batch(recipe, cluster, config=config, program=program, calibration=calibration)
    job = build_job(
        recipe, cluster, config=config, program=program, calibration=calibration, micro_batch=micro_batch or None
    )
    return Plan(job, plan_memory(job), plan_speed(job), price, rows)


def largest_micro_batch(
    recipe: Recipe,
    cluster: Cluster,
    *,
    config: ModelConfig | None = None,
    program: Program | None = None,
    calibration: Calibration | None = None,
    limit: int | None = None,
) -> int:
    """The most rows a micro batch can have and fit, with the same global batch. 0 where none fits.

    Tried from the largest: one that leaves nothing to accumulate may fit where smaller ones do not, since gradients
    that wait for later micro batches are not sharded below ZeRO 2.
    """
    config = config or model_config(recipe)
    for size in _sizes(recipe, cluster):
        if limit is not None and size > limit:
            continue
        try:
            job = build_job(recipe, cluster, config=config, program=program, calibration=calibration, micro_batch=size)
        except UserError:  # a schedule that cannot order so many micro batches; what no size mends, the plan will say
            continue
        if plan_memory(job).fits:
            return size
    return 0


def _sizes(recipe: Recipe, cluster: Cluster) -> Iterator[int]:
    """Micro batches that divide a data rank's share of the global batch, largest first; those that are too few for a
    pipeline's stages last."""
    train, layout = recipe.train, Layout.of(recipe.parallel, cluster.gpus)
    ranks = layout.data_ranks
    if train.global_batch_size is None:
        yield from (2**power for power in range(12, -1, -1))
        return
    share, rest = divmod(train.global_batch_size, ranks)
    if rest or not share:
        nearest = max(1, round(train.global_batch_size / ranks)) * ranks
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} does not spread over {ranks} data ranks: use {nearest}"
        )
    sizes = [size for size in range(share, 0, -1) if share % size == 0]
    yield from sorted(sizes, key=lambda size: share // size < layout.pp)


# ---- what would make it fit


def find_changes(plan: Plan, limit: int = 5) -> list[Change]:
    """Single changes that fit; where there is none, two together; then those that change the result."""
    keep, other = _candidates(plan)
    found = [change for change in (_try(plan, words) for words in keep) if change]
    if not found:
        pairs = [{**one, **two} for i, one in enumerate(keep) for two in keep[i + 1 :] if not set(one) & set(two)]
        found = [change for change in (_try(plan, words) for words in pairs) if change]
    found.sort(key=lambda change: -change.speed)
    different = [change for change in (_try(plan, words, same=False) for words in other) if change]
    different.sort(key=lambda change: -change.speed)
    return found[:limit] + different[: max(2, limit - len(found))]


def _candidates(plan: Plan) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(changes that compute the same, changes that do not), each as keys of the recipe."""
    job, recipe = plan.job, plan.recipe
    layout, parallel = job.layout, recipe.parallel
    keep: list[dict[str, Any]] = []
    order = ["none", "selective", "full"]
    keep += [{"parallel.recompute": mode} for mode in order[order.index(parallel.recompute) + 1 :]]
    smaller = [size for size in (1, 2, 4, 8, 16, 32, 64) if size < job.micro_batch and job.micro_batch % size == 0]
    if job.accumulation > 1 and layout.pp == 1:  # gradients that wait for later micro batches may be what is too much
        smaller.append(job.micro_batch * job.accumulation)
    for size in smaller:
        again = {"train.micro_batch_size": size, "train.global_batch_size": job.global_batch}
        keep.append(again)
    if job.layout.world_size > 1 and layout.zero < 3:
        keep.append({"parallel.zero": 3})
    for axis in ("tp", "cp", "pp"):
        for factor in (2, 4, 8):
            degree = getattr(layout, axis) * factor
            if layout.dp_shard % factor == 0 and degree <= (job.cluster.gpus_per_node if axis == "tp" else 64):
                keep.append({f"parallel.{axis}": degree, "train.global_batch_size": job.global_batch})
    if parallel.offload == "none" and job.cluster.card.name != "CPU":  # whose memory is the host's
        keep.append({"parallel.offload": "activations", "parallel.offload_share": 0.5})
        keep += [{"parallel.offload": what} for what in ("activations", "optimizer", "all")]
    other: list[dict[str, Any]] = []
    for factor in (2, 4, 8, 16):
        more = {"gpus": job.cluster.gpus * factor}
        keep.append({**more, "train.global_batch_size": job.global_batch})
        if job.global_batch % (job.micro_batch * layout.data_ranks * factor):
            other.append(more)  # a larger batch: there are not rows enough for all
    if recipe.train.optimizer == "adamw" and recipe.adapter is None:
        other += [{"train.optimizer": name} for name in ("adamw8bit", "adafactor")]
    if recipe.train.master_weights and recipe.train.precision != "fp32" and recipe.adapter is None:
        other.append({"train.master_weights": False})
    if recipe.adapter is None and not recipe.train.optimizer_in_backward:  # what clipping would have changed
        other.append({"train.optimizer_in_backward": True, "train.max_grad_norm": 0.0})
    if recipe.adapter is None and recipe.task == "sft":
        other += [{"adapter": {"rank": 16}}, {"adapter": {"rank": 16}, "quantize": "nf4"}]
    elif recipe.adapter is not None and recipe.quantize != "nf4":
        other.append({"quantize": "nf4"})
    other += [{"data.seq_len": job.seq_len // factor} for factor in (2, 4, 8) if job.seq_len // factor >= 64]
    smallest: dict[str, Any] = {} if parallel.recompute == "full" else {"parallel.recompute": "full"}
    if job.micro_batch > 1:
        smallest |= {"train.micro_batch_size": 1, "train.global_batch_size": job.global_batch}
    if smallest:
        other += [{**words, **smallest} for words in list(other) if "gpus" not in words]
    return keep, other


def _try(plan: Plan, words: dict[str, Any], same: bool = True) -> Change | None:
    """The change if the run then fits."""
    words = dict(words)
    gpus = words.pop("gpus", plan.job.cluster.gpus)
    cluster = replace(plan.job.cluster, gpus=gpus)
    try:
        recipe = changed(plan.recipe, words)
        again = build_job(recipe, cluster, program=_program(plan), calibration=plan.job.calibration)
        if same and again.global_batch != plan.job.global_batch:
            return None
        memory = plan_memory(again)
        if not memory.fits:
            return None
        ratio = plan_speed(again).tokens_per_second_per_gpu / plan.speed.tokens_per_second_per_gpu
    except UserError:
        return None
    if gpus != plan.job.cluster.gpus:
        words["gpus"] = gpus
    return Change(words, describe(words), ratio, memory.free / GIB, same)


def _program(plan: Plan) -> Program | None:
    """Another system's program stays; our own follows the recipe."""
    return None if plan.job.program.name == "trainwright" else plan.job.program


def describe(words: dict[str, Any]) -> str:
    """The keys as they are typed on the command line."""
    shown = []
    for key, value in words.items():
        if key == "gpus":
            shown.append(f"--gpus {value}")
        elif isinstance(value, dict):
            shown += [f"{key}.{inner}={item}" for inner, item in value.items()]
        else:
            shown.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(shown)


def changed(recipe: Recipe, words: dict[str, Any]) -> Recipe:
    """The recipe with keys replaced; keys that say the same in another way give way. Raises UserError."""
    values = recipe.model_dump(mode="json")
    for key, value in words.items():
        section, _, name = key.partition(".")
        if not name:
            values[section] = value
            continue
        values[section][name] = value
        if name == "global_batch_size":
            values[section]["gradient_accumulation_steps"] = None
    return validate(values, "the changed recipe")
