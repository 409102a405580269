"""What training really allocates, and the planner's job for the same: models and layouts of the parallel tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.parallel import models
from tests.parallel.parity import Case, micro_batches
from tests.parallel.worlds import world_of
from trainwright.adapt.lora import Lora, add_adapters
from trainwright.adapt.quantize import add_quantization
from trainwright.adapt.setup import freeze_base, start_adapters
from trainwright.model.config import ModelConfig
from trainwright.model.transformer import Transformer
from trainwright.parallel.apply import DTYPES, parallelize
from trainwright.planner.build import build_job
from trainwright.planner.hardware import Cluster, cpu_card
from trainwright.planner.job import Job
from trainwright.planner.states import Rank, States, stage_states
from trainwright.recipe.load import load_recipe
from trainwright.train.optimizer import Optimizers, build_optimizer
from trainwright.train.step import LossScale, TrainStep


def tree(case: Case, quantize: str | None = None, rank: int | None = None, dora: bool = False) -> ModelConfig:
    config = add_quantization(models.build(case.model, case.layers), quantize)  # type: ignore[arg-type]
    return config if rank is None else add_adapters(config, Lora(rank, 2.0 * rank, dora=dora))


def job_of(case: Case, config: ModelConfig, **train: Any) -> Job:
    """The planner's view of a case."""
    values = {
        "task": "pretrain",
        "model": {"config": {"model_type": "llama"}, "tokenizer": "byte"},
        "data": {"path": "shipped:arithmetic", "seq_len": case.length},
        "train": {
            "steps": 1,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": case.accumulation,
            "precision": "fp32",
            **train,
        },
        "parallel": case.recipe.model_dump(mode="json"),
    }
    if any(True for _ in _adapters(config)):
        values["adapter"] = {"rank": 2}
    return build_job(load_recipe(values), Cluster(cpu_card(), case.layout.world_size), config=config)


def _adapters(config: ModelConfig) -> Any:
    from trainwright.model.config import linears

    return (leaf for _, leaf in linears(config) if leaf.adapter is not None)


def predicted(job: Job, rank: int) -> States:
    """The states of one process of a layout."""
    layout = job.layout
    per_stage = layout.world_size // layout.pp
    data = rank % per_stage // layout.tp
    place = Rank(tp=rank % layout.tp, ep=data % layout.ep, shard=data % job.shards)
    return stage_states(job, job.stages[rank // per_stage], place)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def storages(tensors: list[Tensor]) -> int:
    """Bytes of all storages behind some tensors, each counted once."""
    held = {}
    for tensor in tensors:
        storage = local(tensor).untyped_storage()
        held[storage.data_ptr() or id(tensor)] = storage.nbytes()
    return sum(held.values())


class _Weighed(Optimizers):
    """Notes what gradients take when the optimizer gets them."""

    gradients = 0

    def step(self, coefficient: Tensor, bad: Tensor) -> None:
        self.gradients = storages([tensor.grad for tensor in self.parameters if tensor.grad is not None])
        super().step(coefficient, bad)


def allocated(
    case: Case,
    optimizer: str = "adamw",
    precision: str = "fp32",
    masters: bool = True,
    quantize: str | None = None,
    rank: int | None = None,
    dora: bool = False,
) -> dict[str, int]:
    """One step of training in this process's place; bytes of weights, gradients and states afterwards."""
    world, config = world_of(case.layout), tree(case, quantize, rank, dora)
    with torch.device("meta"):
        model = Transformer(config)
    model.compute_dtype = DTYPES[precision]
    if rank is not None:
        freeze_base(model)
    model.to(torch.float32 if masters and rank is None else DTYPES[precision])
    spread = parallelize(model, world, case.recipe, precision=precision, compile_layers=False, seq_len=case.length)  # type: ignore[arg-type]
    model.to_empty(device="cpu")
    model.tie_weights()
    model.reset_buffers(torch.device("cpu"))
    model.init_weights(3).train()
    if rank is not None:
        start_adapters(model, 3)
    inner = build_optimizer(model, optimizer, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1)
    optimizers = _Weighed(inner.parts, dict(inner.names))
    take = TrainStep(spread.pipeline or model, optimizers, world, max_grad_norm=1.0, loss_scale=LossScale(False))
    take(micro_batches(case, 0, world.data_rank), 1e-3)
    nested = [tensor for name, tensor in model.named_buffers() if "nested" in name]
    return {
        "weights": storages([*model.parameters(), *nested]),
        "gradients": optimizers.gradients,
        "optimizer": storages(list(optimizers.state_tensors().values())),
    }
