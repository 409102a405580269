"""Every sensible layout of a model on a cluster, ranked by speed, each loser with its reason. No torch.

Owns which layouts are tried: degrees that divide, micro batches that keep the global batch, recomputation, ZeRO stages,
and, for adapters, fewer bits. Judging one is `memory.py`'s and `speed.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from trainwright.errors import UserError
from trainwright.model.config import ModelConfig
from trainwright.planner.build import build_job, frozen_of, model_config
from trainwright.planner.calibration import load_calibration
from trainwright.planner.hardware import GIB, Cluster
from trainwright.planner.job import Job
from trainwright.planner.memory import MemoryPlan, plan_memory
from trainwright.planner.parameters import ModelParts
from trainwright.planner.plan import Plan
from trainwright.planner.speed import SpeedPlan, plan_speed
from trainwright.recipe.schema import Recipe

Words = dict[str, Any]
MISSES = 4  # rows of the table that show what nearly fits


@dataclass(frozen=True)
class Candidate:
    """One layout. `speed` is None where it does not fit; `why`: what keeps it from being the best."""

    words: Words
    recipe: Recipe
    job: Job
    memory: MemoryPlan
    speed: SpeedPlan | None
    why: str = ""

    @property
    def fits(self) -> bool:
        return self.speed is not None

    @property
    def rate(self) -> float:
        """Tokens a second and GPU; 0 where it does not fit."""
        return self.speed.tokens_per_second_per_gpu if self.speed else 0.0

    def as_plan(self, price: float | None = None, rows: int | None = None) -> Plan:
        return Plan(self.job, self.memory, self.speed or plan_speed(self.job), price, rows)


@dataclass(frozen=True)
class Ranking:
    """All that was tried: first those that fit, fastest first, then those that nearly fit."""

    candidates: list[Candidate]
    tried: int

    @property
    def best(self) -> Candidate | None:
        return self.candidates[0] if self.candidates and self.candidates[0].fits else None


def search(recipe: Recipe, cluster: Cluster, *, keep: int = 20) -> Ranking:
    """Tries layouts with the recipe's model, sequence length and global batch. Raises UserError where none divides.

    Of each layout only the best micro batch and the best way to recompute are ranked, or the nearest miss.
    """
    return _Search(recipe, cluster).run(keep)


class _Search:
    def __init__(self, recipe: Recipe, cluster: Cluster) -> None:
        self.recipe, self.cluster = recipe, cluster
        self.calibration = load_calibration(cluster.card)
        self.trees: dict[Any, ModelParts] = {}
        self.rows = self._global_batch()
        self.tried = 0

    def run(self, keep: int) -> Ranking:
        found = [best for words in self._layouts() if (best := self._best_of(words))]
        if not found:
            raise UserError(
                f"no layout of {self.cluster.gpus} GPUs divides this model and the global batch of {self.rows} rows: "
                "change train.global_batch_size or --gpus"
            )
        found.sort(key=lambda item: (-item.rate, -item.memory.free))
        return Ranking([_explained(item, found[0]) for item in _shown(found, keep)], self.tried)

    def _global_batch(self) -> int:
        """Rows of an optimizer step, which every candidate keeps."""
        wanted = self.recipe.train.global_batch_size
        return wanted or build_job(self.recipe, self.cluster, config=self._tree(self.recipe)).global_batch

    def _tree(self, recipe: Recipe) -> ModelParts:
        """The model of a recipe, which layouts do not change."""
        if recipe.quantize not in self.trees:
            self.trees[recipe.quantize] = ModelParts(model_config(recipe), frozen_of(recipe))
        return self.trees[recipe.quantize]

    def _layouts(self) -> Iterator[Words]:
        """Degrees of every axis and fewer bits, without the micro batch."""
        config, cluster, world = self._tree(self.recipe).config, self.cluster, self.cluster.gpus
        heads = config.layers[0].self_attn.num_heads
        degrees = [n for n in range(1, world + 1) if world % n == 0 and (n & (n - 1) == 0 or world <= 64)]
        bits: list[Words] = [{}]
        if self.recipe.adapter is not None:
            kinds = ("nf4", "int8", "fp8") if self.recipe.adapter.init == "loftq" else (None, "nf4", "int8", "fp8")
            bits = [{"quantize": kind} for kind in kinds]
        wide = [n for n in degrees if n <= cluster.gpus_per_node and heads % n == 0]
        long = [n for n in degrees if n == 1 or (n <= 64 and self.recipe.data.seq_len // n >= 4096)]
        deep = [n for n in degrees if n <= min(64, config.num_layers)]
        for tp, cp, pp, words in product(wide, long, deep, bits):
            if world % (tp * cp * pp):
                continue
            for schedule in ("1f1b", "interleaved", "zbv") if pp > 1 else ("1f1b",):
                axes: Words = {"parallel.tp": tp, "parallel.cp": cp, "parallel.pp": pp, **words}
                axes["parallel.pp_schedule"] = schedule
                data = world // (tp * cp * pp)
                yield from ({**axes, **more} for more in self._data_axes(config, data, cp, tp, pp))

    def _data_axes(self, config: ModelConfig, data: int, cp: int, tp: int, pp: int) -> Iterator[Words]:
        """ZeRO stages, whole or hybrid sharding, and experts, over what is left of the ranks.

        In a pipeline weights stay gathered and gradients are summed once a step, so its ZeRO stages are one.
        """
        experts = getattr(getattr(config.layers[0].mlp, "experts", None), "num_experts", 1)
        in_node = max(1, self.cluster.gpus_per_node // tp)
        hybrid = data * cp > in_node and data % in_node == 0
        for replicate in sorted({1, data // in_node}) if hybrid else (1,):
            ranks = data // replicate * cp
            for zero in (1, 2, 3) if data * cp > 1 and pp == 1 else (1 if pp > 1 else 3,):
                for ep in sorted({1, min(experts, ranks)}):
                    if ranks % ep == 0 and experts % ep == 0:
                        yield {"parallel.dp_replicate": replicate, "parallel.zero": zero, "parallel.ep": ep}

    def _best_of(self, words: Words) -> Candidate | None:
        """The fastest micro batch and recomputation of a layout that fits, else the nearest miss."""
        best: Candidate | None = None
        whole = words["parallel.pp"] == 1 and words["parallel.zero"] <= 1  # gradients that wait are not sharded
        for recompute in ("none", "selective", "full"):
            sizes = self._micro_batches(words)
            while sizes:
                candidate = self._judge({**words, "parallel.recompute": recompute}, sizes.pop(0))
                if candidate is None:
                    continue
                if best is None or (candidate.rate, candidate.memory.free) > (best.rate, best.memory.free):
                    best = candidate
                if not candidate.fits:  # nor do larger ones, but for the last where it leaves nothing to accumulate
                    sizes = sizes[-1:] if whole else []
        return best

    def _micro_batches(self, words: Words) -> list[int]:
        """Powers of two that divide a data rank's rows and give every pipeline stage its work."""
        pp = words["parallel.pp"]
        rows, rest = divmod(self.rows, self.cluster.gpus // (words["parallel.tp"] * words["parallel.cp"] * pp))
        if rest:
            return []
        sizes = [2**power for power in range(11) if rows % 2**power == 0]
        return [size for size in sizes if pp == 1 or rows // size >= pp]  # with fewer, stages would stand idle

    def _judge(self, words: Words, size: int) -> Candidate | None:
        """None for what does not divide."""
        words = {**words, "train.micro_batch_size": size, "train.global_batch_size": self.rows}
        recipe = _with(self.recipe, words)
        try:
            job = build_job(recipe, self.cluster, config=self._tree(recipe), calibration=self.calibration)
            memory = plan_memory(job)
        except UserError:
            return None
        self.tried += 1
        return Candidate(words, recipe, job, memory, plan_speed(job) if memory.fits else None)


def _with(recipe: Recipe, words: Words) -> Recipe:
    """The recipe with other keys, which are sound by the way they were made: checking thousands would take seconds."""
    sections: dict[str, dict[str, Any]] = {"train": {}, "parallel": {}, "": {}}
    for key, value in words.items():
        section, _, name = key.rpartition(".")
        sections[section][name] = value
    if "global_batch_size" in sections["train"]:
        sections["train"]["gradient_accumulation_steps"] = None
    train = recipe.train.model_copy(update=sections["train"])
    parallel = recipe.parallel.model_copy(update=sections["parallel"])
    return recipe.model_copy(update={**sections[""], "train": train, "parallel": parallel})


def _shown(found: list[Candidate], keep: int) -> list[Candidate]:
    """The best `keep`, with some of the nearest misses among them: why they lose is worth knowing too."""
    fitting, missing = ([item for item in found if item.fits is fits] for fits in (True, False))
    misses = missing[: max(keep - len(fitting), min(MISSES, keep // 4))]
    return fitting[: keep - len(misses)] + misses


def _explained(item: Candidate, best: Candidate) -> Candidate:
    """With the reason why it is not the best."""
    if item is best:
        return item
    return Candidate(item.words, item.recipe, item.job, item.memory, item.speed, _why(item, best))


def _why(item: Candidate, best: Candidate) -> str:
    """The part that is too large, or the part of the step that costs the most against the best."""
    if item.speed is None:
        peak = item.memory.fullest.peak
        part, size = max(peak.parts.items(), key=lambda pair: pair[1])
        return f"{-item.memory.free / GIB:.1f} GiB too much in {peak.name}: {part} {size / GIB:.1f}"
    if best.speed is None:
        return ""
    slower = 1 - item.rate / best.rate
    mine, theirs = _per_token(item.speed), _per_token(best.speed)
    part = max(mine, key=lambda name: mine[name] - theirs.get(name, 0.0))
    more = mine[part] - theirs.get(part, 0.0)
    return f"{slower:.1%} slower: {part} +{more / sum(theirs.values()):.1%}"


def _per_token(speed: SpeedPlan) -> dict[str, float]:
    """Seconds of each part for a token on one GPU."""
    tokens = speed.tokens_per_step / speed.world_size
    return {name: seconds / tokens for name, seconds in speed.parts.items()}
