"""Weights, gradients and optimizer states: predicted and really allocated bytes are equal, on every rank."""

import math

import pytest

from tests.parallel.models import MODELS
from tests.parallel.parity import Case
from tests.parallel.worlds import run
from tests.planner.real import allocated, job_of, predicted, tree
from trainwright.parallel.layout import Layout
from trainwright.planner.states import alone_elements, group_elements, is_expert, local_shape, whole_elements

FAMILIES = [
    "llama",
    "qwen",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "bloom",
    "opt",
    "gpt2",
    "chatglm",
    "baichuan2_13b",
]


def check(job, found, rank=0):
    states = predicted(job, rank)
    ours = {
        "weights": states.weights + states.quantized + states.adapters,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
    }
    assert ours == found


@pytest.mark.parametrize("model", [*MODELS, *(f"golden:{family}" for family in FAMILIES)])
def test_one_process(model):
    case = Case(model, Layout())
    check(job_of(case, tree(case)), allocated(case))


@pytest.mark.parametrize("model", ["mixtral", "golden:llama"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor", "lion", "muon", "sgd"])
def test_optimizers(model, optimizer):
    case = Case(model, Layout())
    check(job_of(case, tree(case), optimizer=optimizer), allocated(case, optimizer))


def test_half_width_weights_and_states():
    case = Case("llama", Layout())
    job = job_of(case, tree(case), precision="bf16", master_weights=False)
    check(job, allocated(case, precision="bf16", masters=False))


@pytest.mark.parametrize("model", ["llama", "bloom", "mixtral"])
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_adapters_beside_frozen_weights(model, quantize):
    case = Case(model, Layout())
    job = job_of(case, tree(case, quantize, 4), precision="bf16")
    check(job, allocated(case, precision="bf16", quantize=quantize, rank=4))


def test_dora():
    case = Case("llama", Layout())
    check(
        job_of(case, tree(case, None, 4, True), precision="bf16"), allocated(case, precision="bf16", rank=4, dora=True)
    )


LAYOUTS = [
    ("llama", Layout(2, zero=0)),
    ("llama", Layout(2, zero=1)),
    ("llama", Layout(2, zero=2)),
    ("llama", Layout(2, zero=3)),
    ("banded", Layout(2, tp=2)),
    ("qwen", Layout(2, tp=2)),  # one KV head on two ranks
    ("bloom", Layout(2, pp=2)),  # a tied table in both stages
    ("llama", Layout(2, cp=2)),
    ("glm", Layout(4, zero=3)),
    ("llama", Layout(4, dp_replicate=2, zero=3)),
    ("llama", Layout(4, tp=2, zero=2)),
    ("llama", Layout(4, tp=2, pp=2)),
    ("mixtral", Layout(4, ep=2)),
    ("mixtral", Layout(4, tp=2, ep=2)),
    ("mixtral", Layout(4, ep=2, zero=0)),
    ("bloom", Layout(4, pp=2, zero=1)),
]


@pytest.mark.parametrize(("model", "layout"), LAYOUTS, ids=lambda value: str(value))
def test_every_rank_of_every_layout(model, layout):
    case = Case(model, layout)
    job = job_of(case, tree(case))
    for rank, found in enumerate(run(layout.world_size, allocated, case)):
        check(job, found, rank)


ADAPTED = [
    ("llama", Layout(2, zero=3), {"quantize": "nf4"}),
    ("llama", Layout(2, zero=0), {"quantize": "int8"}),
    ("llama", Layout(2, tp=2), {"quantize": "fp8"}),
    ("llama", Layout(2, tp=2), {"dora": True}),
    ("bloom", Layout(2, pp=2), {"quantize": "nf4"}),
    ("mixtral", Layout(4, ep=2), {"quantize": "int8"}),
]


def test_both_ends_of_a_pipeline_on_one_rank_hold_a_tied_table_twice():
    case = Case("bloom", Layout(2, pp=2), options=(("pp_schedule", "zbv"),), accumulation=4, layers=4)
    job = job_of(case, tree(case))
    for rank, found in enumerate(run(2, allocated, case)):
        check(job, found, rank)


@pytest.mark.parametrize(("model", "layout", "how"), ADAPTED, ids=lambda value: str(value))
def test_adapters_on_every_rank_of_a_layout(model, layout, how):
    case = Case(model, layout)
    job = job_of(case, tree(case, rank=4, **how), precision="bf16")
    settings = ("adamw", "bf16", True, how.get("quantize"), 4, how.get("dora", False))
    for rank, found in enumerate(run(layout.world_size, allocated, case, *settings)):
        check(job, found, rank)


@pytest.mark.parametrize(
    ("optimizer", "layout"),
    [("adamw8bit", Layout(2, zero=3)), ("muon", Layout(2, tp=2)), ("adafactor", Layout(4, tp=2))],
    ids=str,
)
def test_optimizers_on_every_rank_of_a_layout(optimizer, layout):
    case = Case("golden:llama", layout)
    job = job_of(case, tree(case), optimizer=optimizer)
    for rank, found in enumerate(run(layout.world_size, allocated, case, optimizer)):
        check(job, found, rank)


@pytest.mark.parametrize(
    ("layout", "alone"),
    [
        (Layout(2, ep=2), True),
        (Layout(4, ep=2, tp=2), True),
        (Layout(4, ep=2), False),
        (Layout(4, ep=2, dp_replicate=2), False),
        (Layout(2, ep=2, zero=2), False),
        (Layout(4, ep=2, pp=2), False),
    ],
    ids=str,
)
def test_experts_that_no_other_rank_holds_are_not_gathered(layout, alone):
    """By the rule of `parallel/shard.py`."""
    case = Case("mixtral", layout)
    job = job_of(case, tree(case), precision="bf16")
    group = job.groups(job.stages[-1])[-1]
    experts = sum(math.prod(local_shape(job, item)) for item in group.parameters if is_expert(item))
    assert experts > 0
    assert job.experts_alone == alone
    assert sum(alone_elements(job, group)) == (experts if alone else 0)
    assert group_elements(job, group) + (experts if alone else 0) == whole_elements(job, group.parameters)
