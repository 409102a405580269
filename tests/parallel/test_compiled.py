"""Compiled layers train as eager ones do, whole and split, each as one graph. It is captured and differentiated, not
lowered."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.utils import counters

from tests.parallel import parity
from tests.parallel.parity import TOLERANCE, Case, Trace, differences
from tests.parallel.test_mutants import replaced
from tests.parallel.worlds import run
from trainwright.parallel.layout import Layout


def compiled(case: Case) -> Trace:
    """The case with every layer compiled for torch's own `aot_eager`."""
    real = parity.parallelize

    def with_compile(*args, **options):  # type: ignore[no-untyped-def]
        return real(*args, **{**options, "compile_layers": True})

    with (
        replaced(torch, "compile", functools.partial(torch.compile, backend="aot_eager")),
        replaced(parity, "parallelize", with_compile),
    ):
        torch._dynamo.reset()
        counters.clear()
        trace = parity.trace_of(case)
    breaks = dict(counters["graph_break"])
    assert not breaks or case.layout.ep > 1, f"a layer is not one graph, or not compiled at all: {breaks}"
    assert counters["stats"]["unique_graphs"] >= 1
    return trace


@pytest.mark.parametrize(
    "case",
    [
        Case("llama", Layout(world_size=2)),
        Case("llama", Layout(world_size=2, tp=2)),
        Case("llama", Layout(world_size=2, tp=2), (("recompute", "full"),)),
        Case("bloom", Layout(world_size=2, tp=2), (("recompute", "selective"),)),
        Case("llama", Layout(world_size=2, cp=2), (("recompute", "full"),)),
        Case("mixtral", Layout(world_size=2, ep=2)),  # the journey of the rows is not compiled
    ],
    ids=str,
)
def test_compiled_layers(case: Case) -> None:
    worst = differences(case, run(2, compiled, case))
    assert max(worst.values()) <= TOLERANCE, worst
