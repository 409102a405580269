"""Peak memory: predicted within 4% of the tensors that are really alive at the fullest moment of a step, on a CPU.

On GPUs the same arithmetic holds with other kernels; `benchmarks/planner.py` compares there.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.planner.tracker import Alive
from trainwright.adapt.lora import Lora, add_adapters
from trainwright.adapt.quantize import add_quantization
from trainwright.adapt.setup import freeze_base, start_adapters
from trainwright.errors import UserError
from trainwright.model.config import (
    AttentionConfig,
    BlockConfig,
    EmbeddingConfig,
    HeadConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    NormConfig,
    RopeConfig,
)
from trainwright.model.transformer import Transformer
from trainwright.parallel.apply import DTYPES
from trainwright.parallel.recompute import apply_recompute
from trainwright.planner.build import build_job
from trainwright.planner.hardware import GIB, Cluster, card_named, cpu_card
from trainwright.planner.memory import MemoryPlan, plan_memory
from trainwright.recipe.load import load_recipe
from trainwright.train.optimizer import build_optimizer

HIDDEN, INNER, LAYERS, ROWS, LENGTH = 192, 528, 4, 2, 384


def model(kind: str = "llama", vocab: int = 256) -> ModelConfig:
    """Small models whose activations, weights and logits are all felt."""
    norm = NormConfig(HIDDEN, 1e-5, "layer" if kind == "bloom" else "rms")
    rope = None if kind == "bloom" else RopeConfig(24)
    attention = AttentionConfig.of(HIDDEN, 8, 8 if kind == "bloom" else 4, rope=rope, qkv_bias=kind == "bloom")
    mlp: Any = MlpConfig.of(HIDDEN, INNER, gated=kind != "bloom", activation="gelu" if kind == "bloom" else "silu")
    if kind == "mixtral":
        mlp = MoeConfig.of(HIDDEN, INNER // 2, 4, 2, "silu")
    block = BlockConfig(attention, mlp, norm, norm)
    head = HeadConfig(HIDDEN, vocab, tied=kind == "bloom")
    return ModelConfig(kind, EmbeddingConfig(vocab, HIDDEN), (block,) * LAYERS, norm, head, 4096)


def real_peak(
    config: ModelConfig,
    precision: str,
    masters: bool,
    recompute: str,
    accumulation: int,
    rows: int = ROWS,
) -> int:
    """Most bytes of tensors alive at once in the second of two training steps."""
    adapted = any(block.self_attn.q_proj.adapter is not None for block in config.layers)
    network = Transformer(config)
    network.compute_dtype = DTYPES[precision]
    network.init_weights(1)
    if adapted:
        freeze_base(network)
        start_adapters(network, 1)
    if not masters or adapted:
        network.to(DTYPES[precision])
    apply_recompute(network.layers.values(), recompute)
    optimizers = build_optimizer(network, "adamw", betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ids = torch.randint(0, 200, (rows, LENGTH))
    for _ in range(2):
        gc.collect()
        alive = Alive()
        alive.count([*network.parameters(), *network.buffers(), *optimizers.state_tensors().values()])
        with alive:
            for _ in range(accumulation):
                network(ids, labels=ids).loss_sum.backward()
            optimizers.set_learning_rate(1e-4)
            optimizers.step(torch.ones(()), torch.zeros(()))
            optimizers.zero_grad()
    return alive.peak


def planned(
    config: ModelConfig,
    precision: str = "bf16",
    masters: bool = False,
    recompute: str = "none",
    accumulation: int = 1,
    rows: int = ROWS,
) -> MemoryPlan:
    values: dict[str, Any] = {
        "task": "pretrain",
        "model": {"config": {"model_type": "llama"}, "tokenizer": "byte"},
        "data": {"path": "shipped:arithmetic", "seq_len": LENGTH},
        "train": {
            "steps": 1,
            "micro_batch_size": rows,
            "gradient_accumulation_steps": accumulation,
            "precision": precision,
            "master_weights": masters,
            "compile": False,
        },
        "parallel": {"recompute": recompute},
    }
    if config.layers[0].self_attn.q_proj.adapter is not None:
        values["adapter"] = {"rank": 8}
    return plan_memory(build_job(load_recipe(values), Cluster(cpu_card()), config=config))


CASES = [
    ("llama", {}),
    ("llama", {"recompute": "full"}),
    ("llama", {"recompute": "selective"}),
    ("llama", {"accumulation": 2}),
    ("llama", {"precision": "fp32", "masters": True}),
    ("llama", {"masters": True}),
    ("bloom", {}),
    ("mixtral", {}),
    ("mixtral", {"recompute": "full"}),
]


@pytest.mark.parametrize("vocab", [256, 2048])
@pytest.mark.parametrize(("kind", "how"), CASES, ids=str)
def test_peak_of_a_step(kind, how, vocab):
    config = model(kind, vocab)
    how = {"precision": "bf16", "masters": False, "recompute": "none", "accumulation": 1, **how}
    assert planned(config, **how).allocated == pytest.approx(real_peak(config, **how), rel=0.04)


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_peak_of_a_step_with_adapters(quantize, recompute):
    config = add_adapters(add_quantization(model(), quantize), Lora(8, 16.0))
    found = real_peak(config, "bf16", False, recompute, 1, rows=4)
    assert planned(config, recompute=recompute, rows=4).allocated == pytest.approx(found, rel=0.04)
