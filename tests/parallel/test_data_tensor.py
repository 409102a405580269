"""Data and tensor parallelism: what is special about them holds, and what breaks them is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from tests.parallel import models
from tests.parallel.parity import STEPS, TOLERANCE, Case, Trace, differences, expect, micro_batches, trace_of
from tests.parallel.test_mutants import replaced
from tests.parallel.worlds import run, world_of
from trainwright.adapt.lora import Lora, add_adapters
from trainwright.adapt.setup import freeze_base, start_adapters
from trainwright.errors import UserError
from trainwright.model import init
from trainwright.model.transformer import Transformer
from trainwright.parallel import local, shard, tensor
from trainwright.parallel.apply import parallelize
from trainwright.parallel.layout import Layout
from trainwright.train import step
from trainwright.train.step import to_inputs

TP2, TP4 = Layout(world_size=2, tp=2), Layout(world_size=4, tp=4)
CASES = [
    Case("odd", TP2),  # vocabulary and KV heads that tp does not divide
    Case("odd", Layout(world_size=4, tp=2)),  # and the shards of what is left
    Case("odd", Layout(world_size=4, tp=2, zero=0)),
    Case("qwen", TP4),  # one KV head (MQA), norms on q and k, normalised head
    Case("llama", TP4),  # two KV heads over four ranks
    Case("bloom", TP4),  # ALiBi slopes, biases everywhere, tied table
    Case("mixtral", Layout(world_size=4, tp=2), (("recompute", "full"),)),  # experts' widths, router statistics
    Case("banded", Layout(world_size=4, tp=2, zero=1)),
    Case("llama", Layout(world_size=2, zero=0), accumulation=3),
    Case("llama", Layout(world_size=2, zero=1), accumulation=3),
    Case("bloom", Layout(world_size=2, zero=2), accumulation=3),
    Case("llama", Layout(world_size=4, dp_replicate=2), accumulation=3),
    Case("llama", Layout(world_size=4, dp_replicate=2, zero=1), accumulation=3),
    Case("llama", Layout(world_size=3), accumulation=1),  # uneven shards
    Case("llama", Layout(world_size=2), (("offload", "all"),)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case) -> None:
    expect(case)


# ---- mutants ----


def unsummed_norms() -> Any:
    """The gradients of weights that see a part of the tokens stay parts."""
    return _table(tensor.Block, dict.fromkeys(("input_layernorm", "post_attention_layernorm"), tensor.OUTSIDE))


def biases_on_every_rank() -> Any:
    """The bias of a row-parallel layer is added once a rank."""
    return _table(tensor.Mlp, {**tensor.TABLE[tensor.Mlp], "down_proj": {**tensor.ROW, "bias": tensor.PART}})


def first_kv_head() -> Any:
    """Every rank reads the first KV head."""
    return replaced(tensor, "kv_heads_of_rank", lambda heads, kv, tp, rank: [0])


def first_slopes() -> Any:
    """Every rank takes the first heads' ALiBi slopes."""

    def call(self: Any, model: Any, _: Any) -> None:
        if model.alibi_slopes.numel() == self.num_heads:
            model.alibi_slopes = model.alibi_slopes.chunk(self.ranks)[0]

    return replaced(tensor._OwnSlopes, "__call__", call)


def counted_statistics() -> Any:
    """The load-balancing loss pulls at the router once a rank."""
    return replaced(tensor, "scale_gradient", lambda x, factor: x)


def own_vocabulary() -> Any:
    """The softmax runs over this rank's slice of the vocabulary."""
    real = tensor.VocabShard

    def alone(**parts: Any) -> Any:
        return real(**{**parts, "reduce_sum": lambda values: None})

    return replaced(tensor, "VocabShard", alone)


def mean_over_ranks() -> Any:
    """FSDP's own habit: gradients are divided by the number of ranks."""
    real = shard._tune

    def tune(model: Any, layers: Any, world: Any) -> None:
        real(model, layers, world)
        for module in shard.fsdp_modules(model):
            module.set_gradient_divide_factor(2.0)

    return replaced(shard, "_tune", tune)


def copies_never_agree() -> Any:
    """The all-reduce between the copies of a hybrid layout is left out."""
    return replaced(step, "begin_micro_batch", lambda model, world, *, last: model.set_requires_all_reduce(False))


def stale_random_numbers() -> Any:
    """Every rank draws its own part from the same numbers, instead of its part of the same whole."""

    def copy(parameter: Tensor, whole: Tensor) -> None:
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        local.copy_(whole.flatten()[: local.numel()].view_as(local))

    return replaced(init, "copy_whole", copy)


def _table(part: type, rules: Any) -> Any:
    return replaced(tensor, "TABLE", {**tensor.TABLE, part: {**tensor.TABLE[part], **rules}})


MUTANTS = [
    (unsummed_norms, Case("llama", TP2)),
    (biases_on_every_rank, Case("bloom", TP2)),
    (first_kv_head, Case("llama", TP4)),
    (first_slopes, Case("bloom", TP2)),
    (counted_statistics, Case("mixtral", TP2)),
    (own_vocabulary, Case("llama", TP2)),
    (mean_over_ranks, Case("llama", Layout(world_size=2))),
    (copies_never_agree, Case("llama", Layout(world_size=2, dp_replicate=2))),
    (stale_random_numbers, Case("llama", Layout(world_size=2))),
]


def broken(case: Case, mutant: Callable[[], Any]) -> Trace:
    with mutant():
        return trace_of(case)


@pytest.mark.parametrize(("mutant", "case"), MUTANTS, ids=lambda part: getattr(part, "__name__", str(part)))
def test_a_mutant_fails(mutant: Callable[[], Any], case: Case) -> None:
    worst = differences(case, run(case.layout.world_size, broken, case, mutant))
    assert max(worst.values()) > 100 * TOLERANCE


# ---- what travels ----


def gathers() -> int:
    """All-gathers of one forward and backward pass of three layers under ZeRO-3."""
    calls = []
    real = _fsdp_param_group.foreach_all_gather

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return real(*args, **options)

    case = Case("llama", Layout(world_size=2), accumulation=1)
    with replaced(_fsdp_param_group, "foreach_all_gather", counted):
        trace_of(case)
    return len(calls) // STEPS


def test_a_lookup_gathers_nothing_for_its_gradient() -> None:
    """Embedding, three layers and the head forward; the layers again backward."""
    assert run(2, gathers) == [5 + 3] * 2


# ---- adapters ----


def adapter_gradients(layout: Layout) -> dict[str, Tensor]:
    """Gradients of LoRA's A and B on every linear layer, after one micro batch."""
    case = Case("odd" if layout.tp < 4 else "bloom", layout, accumulation=4 // layout.data_ranks)
    world = world_of(layout)
    with torch.device("meta"):
        model = Transformer(add_adapters(models.build(case.model, 2), Lora(rank=4, alpha=8.0)))
    freeze_base(model)
    parallelize(model, world, case.recipe, precision="fp32", compile_layers=False, seq_len=case.length)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.init_weights(3).train()
    start_adapters(model, 5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                whole = torch.empty(parameter.shape).normal_(0, 0.1, generator=init.generator(name, parameter.device))
                init.copy_whole(parameter, whole)
    batches = micro_batches(case, 0, world.data_rank)
    for number, batch in enumerate(batches, 1):
        shard.begin_micro_batch(model, world, last=number == len(batches))
        model(**to_inputs(batch, world.device)).loss_sum.backward()
    if layout.tp > 1:
        local.sum_partial_gradients(model, world.meshes["tp"])
    held = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in held.items()}  # type: ignore[misc]


@pytest.mark.parametrize("layout", [TP2, Layout(world_size=4, tp=2), Layout(world_size=2, zero=3)], ids=str)
def test_adapters(layout: Layout) -> None:
    plain = adapter_gradients(Layout())
    spread = run(layout.world_size, adapter_gradients, layout)[0]
    assert plain.keys() == spread.keys()
    floor = 1e-4 * max(float(grad.norm()) for grad in plain.values())
    for name, grad in plain.items():
        assert float((spread[name] - grad).norm()) <= TOLERANCE * max(float(grad.norm()), floor), name


def refused(key: str, value: Any) -> str:
    case = Case("llama", TP2, ((key, value),))
    try:
        trace_of(case)
    except UserError as error:
        return str(error)
    return ""


def test_what_this_machine_has_not_is_refused() -> None:
    said = run(2, refused, "fsdp_transport", "copy")[0]
    assert "fsdp_transport=copy needs shards on several GPUs" in said
    assert "1 on cpu, pp=1: set nccl" in said
