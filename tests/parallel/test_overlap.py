"""Products beside gathers and scatters of tensor parallelism: losses and every gradient stay those of one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.parity import Case, expect
from trainwright.parallel.layout import Layout

TP2 = Layout(world_size=2, tp=2)


def overlapped(model: str, layout: Layout = TP2, *more: tuple[str, Any], **rest: Any) -> Case:
    return Case(model, layout, (("async_tp", True), *more), **rest)


CASES = [
    overlapped("golden:llama"),
    overlapped("golden:bloom"),  # no gate, biases everywhere, a tied table
    overlapped("golden:qwen2"),  # biases of q, k and v alone
    overlapped("golden:chatglm2", Layout(world_size=4, tp=4)),  # two KV heads over four ranks
    overlapped("golden:mixtral"),  # attention alone
    overlapped("llama", Layout(world_size=4, tp=2), ("recompute", "selective")),
    overlapped("llama", Layout(world_size=4, tp=2), ("recompute", "full")),
    overlapped("llama", TP2, ("recompute", "selective"), ("recompute_memory", 0.0001)),
    overlapped("llama", TP2, ("mlp_tokens", 4)),
    overlapped("llama", Layout(world_size=4, tp=2, pp=2)),
    overlapped("qwen", Layout(world_size=4, cp=2, tp=2), ("cp_method", "ring")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_same_run(case: Case) -> None:
    expect(case)
