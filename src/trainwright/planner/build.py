"""From a recipe and a cluster to a `Job`: the model's tree with its adapters, the layout, the batch. No torch.

Owns the same steps that training takes before it builds (`train/build.py`), without its tokenizer and weights.
"""

from __future__ import annotations

from dataclasses import replace

from trainwright.adapt.rewrite import adapted_config
from trainwright.model import named
from trainwright.model.config import ModelConfig
from trainwright.model.source import load_config
from trainwright.parallel.layout import Layout
from trainwright.parallel.split import PartCosts, check_micro_batches, check_one_pass
from trainwright.planner.calibration import Calibration, load_calibration
from trainwright.planner.hardware import Cluster
from trainwright.planner.job import Job
from trainwright.planner.parameters import ModelParts
from trainwright.planner.program import Program, own_program
from trainwright.planner.work import part_seconds
from trainwright.recipe.parallel import ParallelRecipe
from trainwright.recipe.schema import Recipe


def model_config(recipe: Recipe) -> ModelConfig:
    """The tree that training builds: sizes, adapters, fewer bits."""
    model = recipe.model
    known = named.of_hub(model.path) if model.path else None  # a plan needs no network where the shape is known
    source = (known.name if known else model.path) or model.config or {}
    if isinstance(source, dict) and "vocab_size" not in {**source, **model.overrides} and model.tokenizer:
        source = {"vocab_size": _vocabulary(model.tokenizer), **source}
    config = load_config(source, model.family, model.overrides)
    return adapted_config(config, recipe.adapter, recipe.quantize, recipe.quantize_tables)


def _vocabulary(tokenizer: str) -> int:
    """Rows of a token table that a recipe leaves to its tokenizer (`train/build.py: find_sources`)."""
    from trainwright.data.tokenizer import load_tokenizer

    return -(-load_tokenizer(tokenizer).vocab_size // 64) * 64


def frozen_of(recipe: Recipe) -> tuple[str, ...]:
    """Patterns of names that stay fixed."""
    return tuple(recipe.model.frozen)


def build_job(
    recipe: Recipe,
    cluster: Cluster,
    *,
    config: ModelConfig | ModelParts | None = None,
    program: Program | None = None,
    calibration: Calibration | None = None,
    micro_batch: int | None = None,
) -> Job:
    """Puts a job together; `micro_batch` stands in where the recipe says auto (default 1).

    config: the model's tree where it is known; as `ModelParts` it is also counted once for many jobs.
    """
    layout = Layout.of(recipe.parallel, cluster.gpus)
    model = config if isinstance(config, ModelParts) else ModelParts(config or model_config(recipe), frozen_of(recipe))
    if program is None:  # another system may spread what we refuse to
        model.check(layout, recipe.data.seq_len, recipe.parallel.kv_replication)
    size = recipe.train.micro_batch_size
    rows = micro_batch or (size if isinstance(size, int) else 1)
    accumulation = layout.accumulation(rows, recipe.train.global_batch_size, recipe.train.gradient_accumulation_steps)
    if program is None:
        check_micro_batches(recipe.parallel.pp_schedule, layout.pp, accumulation)
        check_one_pass(recipe.train.optimizer_in_backward, accumulation)
    own = program or own_program(recipe, cluster.card, cluster.gpus)
    job = Job(recipe, model, layout, cluster, calibration or load_calibration(cluster.card), own, rows, accumulation)
    clocked = layout.pp > 1 and program is None and cluster.card.name != "CPU"
    plain = not any(item.quantization for item in model.parameters)
    if clocked and plain and recipe.parallel.pp_layers in ("auto", "measured"):
        return replace(job, clocked=_clocked(job))
    return job


def _clocked(job: Job) -> PartCosts:
    """What `parallel/pipeline.py: measure_costs` would see: one row through each part, not compiled, in one process."""
    recipe, full = job.recipe, job.recompute == "full"
    length = job.seq_len // job.layout.cp
    key = (length, full, recipe.train.precision, job.calibration.source)
    if key not in job.model.clocked:
        changes = {
            "data": recipe.data.model_copy(update={"seq_len": length}),
            "train": recipe.train.model_copy(update={"compile": False, "master_weights": False}),
            "parallel": ParallelRecipe(recompute="full" if full else "none"),
        }
        alone, one = recipe.model_copy(update=changes), replace(job.cluster, gpus=1)
        program = own_program(alone, one.card, 1)
        probe = Job(alone, job.model, Layout(), one, job.calibration, program, 1, 1)
        job.model.clocked[key] = part_seconds(probe)
    return job.model.clocked[key]
