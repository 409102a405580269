"""From a recipe to the parts of a run: tokenizer, model, optimizer, schedule, and every check that needs no long work.

Owns the checks and the order in which a model comes to life. Running the parts is `trainer.py`'s work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainwright.adapt.peft import load_adapter
from trainwright.adapt.rewrite import adapted_config
from trainwright.adapt.setup import begin_again, freeze_base, start_adapters
from trainwright.data.template import Template, load_template
from trainwright.data.tokenizer import Tokenizer, load_tokenizer
from trainwright.device import device_name
from trainwright.errors import UserError
from trainwright.model.checkpoint import load_config, load_weights
from trainwright.model.config import ModelConfig
from trainwright.model.embed import Head
from trainwright.model.folder import resolve
from trainwright.model.kernels.flash import SERVED
from trainwright.model.kernels.flash import activate as activate_flash
from trainwright.model.kernels.float8 import Scaling, has_products
from trainwright.model.linear import Linear
from trainwright.model.moe import Moe
from trainwright.model.transformer import Transformer, check_learned_positions
from trainwright.parallel.apply import DTYPES, Spread, parallelize
from trainwright.parallel.layout import Layout
from trainwright.parallel.mesh import World, in_host_memory
from trainwright.planner.hardware import peak_flops
from trainwright.recipe.model import ModelRecipe
from trainwright.recipe.schema import Recipe
from trainwright.recipe.train import TrainRecipe
from trainwright.train.metrics import Costs
from trainwright.train.schedule import Schedule


@dataclass(frozen=True)
class Sources:
    """What the model is made from: its tree, its tokenizer, and the folder of its weights (None: random weights)."""

    config: ModelConfig
    tokenizer: Tokenizer
    folder: Path | None


def find_sources(recipe: ModelRecipe, seq_len: int) -> Sources:
    """Reads config and tokenizer, which is quick. Raises UserError for parts that do not fit each other."""
    folder = resolve(recipe.path) if recipe.path else None
    spec = recipe.tokenizer or folder
    if spec is None and isinstance(recipe.config, str) and Path(recipe.config).is_dir():
        spec = Path(recipe.config)
    if spec is None:
        raise UserError("model.config has no tokenizer of its own: set model.tokenizer to a folder, a file, or byte")
    tokenizer = load_tokenizer(spec)
    source = folder or recipe.config or {}
    if isinstance(source, dict):  # written in the recipe: what it does not say about tokens, the tokenizer says
        source = _ids_of(tokenizer) | source
    config = load_config(source, recipe.family, recipe.overrides)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's embedding has {config.vocab_size} "
            f"rows: set model.overrides.vocab_size={_padded(tokenizer.vocab_size)} for random weights, or take the "
            "tokenizer that was published with these weights"
        )
    check_learned_positions(config, seq_len)
    return Sources(config, tokenizer, folder)


def adapt(sources: Sources, recipe: Recipe) -> Sources:
    """The tree with the recipe's adapters and fewer bits. Raises UserError for adapters that cannot be."""
    config = adapted_config(sources.config, recipe.adapter, recipe.quantize, recipe.quantize_tables)
    return replace(sources, config=config)


def find_template(recipe: Recipe, tokenizer: Tokenizer) -> Template | None:
    """The chat template that is trained and exported; pretraining may have none."""
    try:
        return load_template(recipe.data.template, tokenizer)
    except UserError:
        if recipe.task == "sft" or recipe.data.template is not None:
            raise
        return None


def _ids_of(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return {"vocab_size": _padded(tokenizer.vocab_size)} | {
        key: value for key, value in ids.items() if value is not None
    }


def _padded(vocab_size: int) -> int:
    """The next multiple of 64, which matrix units like."""
    return -(-vocab_size // 64) * 64


def build_model(
    recipe: Recipe,
    sources: Sources,
    world: World,
    done: Callable[[str], None] = lambda _: None,
    *,
    began: Path | None = None,
) -> tuple[Transformer, Spread]:
    """The model on its device, in its layout, with its weights; and how it is spread. `done` hears of each phase.
    `began`: the folder of a resumed run's adapters as they began, where they began as a part of the base.

    Built on the meta device, so that no rank ever holds more than its share; weights come last.
    """
    settings = recipe.train
    with torch.device("meta"):
        model = Transformer(sources.config)
    model.compute_dtype = DTYPES[settings.precision]
    model.set_attention_backend(recipe.model.attention)
    if recipe.model.attention in SERVED:
        activate_flash(world.device)
    done("attention kernels")
    if recipe.adapter is not None:
        freeze_base(model)
    freeze(model, recipe.model.frozen)
    if isinstance(model.lm_head, Head):
        model.lm_head.loss_chunk = settings.loss_chunk
    if settings.float8 is not None:
        set_float8(model, settings.float8, recipe, world.device)
    # Beside adapters, which stay float32, nothing is updated: the base needs no wider copy than the compute type's.
    masters = settings.master_weights and recipe.adapter is None
    model.to(torch.float32 if masters else DTYPES[settings.precision])
    spread = parallelize(
        model,
        world,
        recipe.parallel,
        precision=settings.precision,
        compile_layers=world.device.type != "cpu" if settings.compile == "auto" else settings.compile,
        seq_len=recipe.data.seq_len,
    )
    done("layout")
    model.to_empty(device="cpu" if in_host_memory(recipe.parallel) else world.device)
    move_buffers(model, world.device)
    model.tie_weights()
    model.reset_buffers(world.device)
    done("model")
    if began is not None:
        begin_again(model, began)
    if sources.folder is not None:
        load_weights(model, sources.folder)
    else:
        model.init_weights(settings.seed)
    if recipe.adapter is not None:
        start_adapters(model, settings.seed)
        if recipe.adapter.path is not None:
            load_adapter(model, recipe.adapter.path)
    done("weights")
    return model.train(), spread


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers to where they are used: FSDP brings weights from host memory, but not buffers (nf4's second level)."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def set_float8(model: Transformer, scaling: Scaling, recipe: Recipe, device: torch.device) -> None:
    """Trains the linear layers of all blocks with 8-bit products; routers, which choose, head and tables stay wide.

    Raises UserError where there is nothing to train so, or the card cannot. A CPU emulates it.
    """
    if recipe.adapter is not None or recipe.quantize is not None:
        raise UserError(f"train.float8={scaling} trains whole weights: leave out train.float8, or adapter and quantize")
    if recipe.train.precision == "fp16":
        raise UserError(f"train.float8={scaling} goes with bf16 or fp32: set train.precision=bf16")
    if device.type != "cpu" and not has_products(device):
        raise UserError(f"train.float8={scaling} needs CUDA's compute capability 8.9: {device_name(device)} has less")
    for layer in (model.layers or {}).values():
        routers = {id(module.gate) for module in layer.modules() if isinstance(module, Moe)}
        for module in layer.modules():
            if isinstance(module, Linear) and id(module) not in routers:
                module.float8 = scaling


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Fixes the parameters whose names match. Raises UserError for a pattern that matches none."""
    for pattern in patterns:
        matched = [tensor for name, tensor in model.named_parameters() if fnmatch(name, pattern)]
        if not matched:
            some = ", ".join(name for name, _ in list(model.named_parameters())[:3])
            raise UserError(f"model.frozen: {pattern} matches no parameter: names are like {some}")
        for tensor in matched:
            tensor.requires_grad_(False)


def micro_batches(recipe: TrainRecipe, layout: Layout) -> tuple[int, int]:
    """(rows in a micro batch, micro batches of one data rank in a step)."""
    size = recipe.micro_batch_size
    if size == "auto":  # the trainer has asked the plan before
        raise UserError("train.micro_batch_size=auto needs a plan of this machine: give a number of rows")
    return size, layout.accumulation(size, recipe.global_batch_size, recipe.gradient_accumulation_steps)


def total_steps(recipe: TrainRecipe, rows: int, rows_per_step: int, seq_len: int) -> int:
    """Optimizer steps of the run; a last step that is not full is filled from the next pass."""
    if recipe.steps is not None:
        return recipe.steps
    if recipe.epochs is not None:
        if not rows:
            raise UserError(f"train.epochs={recipe.epochs:g}: a stream has no known length: use train.steps or tokens")
        return max(1, math.ceil(recipe.epochs * rows / rows_per_step))
    assert recipe.tokens is not None
    return math.ceil(recipe.tokens / (rows_per_step * seq_len))


def build_schedule(recipe: TrainRecipe, steps: int) -> Schedule:
    """The learning rate of a run of `steps`."""
    return Schedule(recipe.schedule, recipe.learning_rate, recipe.min_learning_rate, steps, recipe.warmup, recipe.decay)


def build_costs(recipe: Recipe, config: ModelConfig, model: nn.Module, world: World, repeated: float) -> Costs:
    """What a token costs here, for the figures of metrics.jsonl. repeated: what the plan says is computed again."""
    return Costs.of(
        config,
        recipe.data.seq_len,
        trained_parameters=sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad),
        repeated=repeated,
        peak_flops=peak_flops(device_name(world.device), recipe.train.precision),
        gpus=world.size,
    )
