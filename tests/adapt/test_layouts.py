"""Adapters beside weights in every format, in every kind of layout: losses and gradients are those of one process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.adapt.models import adapter
from tests.parallel import models
from tests.parallel.worlds import run, world_of
from tests.train.small import CONFIG
from trainwright.adapt.peft import adapters_of, write_adapter
from trainwright.adapt.rewrite import adapted_config
from trainwright.adapt.setup import freeze_base, start_adapters
from trainwright.data.loader import Batch
from trainwright.model.checkpoint import load_config
from trainwright.model.init import copy_whole, normal
from trainwright.model.transformer import Transformer
from trainwright.parallel.apply import DTYPES, parallelize
from trainwright.parallel.layout import Layout
from trainwright.parallel.whole import WholeWeights
from trainwright.recipe.parallel import ParallelRecipe
from trainwright.train.optimizer import build_optimizer
from trainwright.train.step import LossScale, TrainStep

LLAMA = CONFIG | {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
LLAMA |= {"tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "one kv head": LLAMA | {"num_key_value_heads": 1},
    "experts": {
        **LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None,
    },
}  # fmt: skip
STEPS = 2


@dataclass(frozen=True)
class Case:
    """A model with adapters in a layout. `parallel`: other keys of the recipe's section."""

    layout: Layout
    quantize: Any = None
    shape: str = "llama"
    dora: bool = False
    tables: Any = None
    init: str = "kaiming"
    precision: Any = "fp32"
    parallel: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        words = [self.shape, self.layout, self.quantize, self.precision, "dora" if self.dora else "", self.tables or ""]
        words += [self.init] if self.init != "kaiming" else []
        return " ".join(str(word) for word in (*words, *self.parallel) if word)


def build(case: Case, world: Any) -> tuple[Any, Any]:
    """The model in its layout with random base and adapters that are not zero, as `train/build.py` makes it."""
    recipe = adapter(dora=case.dora, init=case.init)
    config = adapted_config(load_config(SHAPES[case.shape]), recipe, case.quantize, case.tables)
    with torch.device("meta"):
        model = Transformer(config)
    model.compute_dtype = DTYPES[case.precision]
    freeze_base(model)
    model.to(DTYPES[case.precision])
    names = ("pp", "dp_replicate", "cp", "tp", "ep", "zero")
    recipe = ParallelRecipe(**{name: getattr(case.layout, name) for name in names}, **dict(case.parallel))
    spread = parallelize(model, world, recipe, precision=case.precision, compile_layers=False, seq_len=32)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.reset_buffers(torch.device("cpu"))
    model.init_weights(3).train()
    start_adapters(model, 3)
    for path, module in adapters_of(model).items():
        if case.init == "kaiming":
            copy_whole(module.lora_b.data, normal(module.lora_b.shape, 0.05, path, torch.device("cpu")))
    return model, spread.pipeline


def steps(case: Case, folder: str | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(losses of some steps, every adapter's gradient of the first); afterwards rank 0 writes the adapters."""
    world = world_of(case.layout)
    model, pipeline = build(case, world)
    optimizers = build_optimizer(model, "adamw", betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    found: dict[str, torch.Tensor] = {}

    def note(coefficient: Any, bad: Any) -> None:
        for tensor, name in optimizers.names.items():
            grad = tensor.grad
            if grad is not None and name not in found:
                found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).detach().clone()
        real(coefficient, bad)

    real, optimizers.step = optimizers.step, note  # type: ignore[method-assign]
    take = TrainStep(pipeline or model, optimizers, world, max_grad_norm=1.0, loss_scale=LossScale(False))
    losses = []
    for step in range(STEPS):
        every = models.batches(8, 1, 32, seed=step)
        own = every[world.data_rank :: case.layout.data_ranks]
        losses.append(take([Batch(**vars(rows)) for rows in own], 1e-2).loss)
    if folder is not None:
        whole, asked = WholeWeights(model, world), []
        write_adapter(model.config, lambda name: asked.append(name) or whole(name), folder, write=world.is_main)
        assert all(name.endswith(("lora_a", "lora_b", "magnitude")) for name in asked)  # the base stays where it is
    return losses, found


@cache
def alone(shape: str, quantize: Any, dora: bool, tables: Any, init: str, precision: Any) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as worlds have: with more, a decomposition rounds otherwise
    try:
        return steps(Case(Layout(), quantize, shape, dora, tables, init, precision))
    finally:
        torch.set_num_threads(threads)


SHARDS, TENSOR, CONTEXT, STAGES = (Layout(world_size=2, **part) for part in ({}, {"tp": 2}, {"cp": 2}, {"pp": 2}))
CASES = [
    Case(SHARDS, "nf4"),
    Case(SHARDS, "int8", parallel=(("recompute", "full"),)),
    Case(SHARDS, "fp8", tables="int8"),
    Case(SHARDS, "nf4", precision="bf16"),
    Case(TENSOR),
    Case(TENSOR, "nf4"),
    Case(TENSOR, "int8"),
    Case(TENSOR, "fp8"),
    Case(TENSOR, "nf4", dora=True),
    Case(TENSOR, "nf4", shape="one kv head", dora=True),
    Case(TENSOR, "nf4", tables="nf4"),
    Case(TENSOR, "int8", tables="int8", precision="bf16"),
    Case(TENSOR, "nf4", shape="experts"),
    Case(Layout(world_size=4, tp=2), "nf4"),
    Case(CONTEXT, "nf4"),
    Case(STAGES, "nf4"),
    Case(Layout(world_size=2, ep=2), "nf4", shape="experts"),
    Case(Layout(world_size=4, ep=2, tp=2), "int8", shape="experts"),
    Case(SHARDS, "nf4", parallel=(("offload", "optimizer"),)),
    Case(SHARDS, "nf4", init="pissa_niter_4"),
    Case(TENSOR, "nf4", dora=True, init="pissa"),
    Case(Layout(world_size=2, ep=2), shape="experts", init="olora"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layouts(case, tmp_path):
    losses, gradients = alone(case.shape, case.quantize, case.dora, case.tables, case.init, case.precision)
    results = run(case.layout.world_size, steps, case, str(tmp_path / "adapter"))
    rough = case.precision == "bf16" or case.quantize == "fp8"  # fp8 rounds a part of a row on its own
    loss, grad = (2e-3, 0.1) if rough else (1e-5, 1e-4)
    floor = 1e-3 * max(float(g.norm()) for g in gradients.values())
    for found, _ in results:
        assert found == pytest.approx(losses, rel=loss)
    for name, expected in gradients.items():
        held = [mine[name] for _, mine in results if name in mine]
        assert held, name
        for mine in held:
            assert float((mine - expected).norm()) <= grad * max(float(expected.norm()), floor), name
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(written) >= 2 * 7 * 2
    assert all(tensor.abs().max() > 0 for tensor in written.values())
