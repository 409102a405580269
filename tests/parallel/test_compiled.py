"""Compiled layers train as eager ones do, whole and split. The graph is captured and differentiated, not lowered."""

from __future__ import annotations

import functools

import pytest
import torch

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
        return parity.trace_of(case)


@pytest.mark.parametrize(
    "case",
    [
        Case("llama", Layout(world_size=2)),
        Case("llama", Layout(world_size=2, tp=2)),
        Case("bloom", Layout(world_size=2, tp=2)),
    ],
    ids=str,
)
def test_compiled_layers(case: Case) -> None:
    worst = differences(case, run(2, compiled, case))
    assert max(worst.values()) <= TOLERANCE, worst
