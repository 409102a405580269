"""Products of layouts: losses, norms and every gradient of three steps are those of one process."""

from __future__ import annotations

import pytest

from tests.parallel.parity import Case, expect
from trainwright.parallel.layout import Layout

PRODUCTS = [
    Case("llama", Layout(world_size=4, tp=2, pp=2)),
    Case("bloom", Layout(world_size=4, cp=2, pp=2)),
    Case("glm", Layout(world_size=4, cp=2, pp=2), (("cp_method", "ring"),)),
    Case("qwen", Layout(world_size=4, cp=2, tp=2), (("cp_method", "ring"),)),
    Case("banded", Layout(world_size=4, cp=4), (("cp_method", "ulysses"),)),
    Case("llama", Layout(world_size=4, cp=4), (("cp_method", "ulysses"),)),  # two KV heads over four ranks
    Case("mixtral", Layout(world_size=4, cp=2, ep=2)),  # experts shared by ranks of one row
    Case("mixtral", Layout(world_size=4, tp=2, ep=2)),
    Case("mixtral", Layout(world_size=4, ep=4), (("recompute", "selective"),)),
    Case("llama", Layout(world_size=4, pp=2, zero=3), (("recompute", "full"),)),
    Case(
        "banded",
        Layout(world_size=4, pp=2, zero=1),
        (("recompute", "selective"), ("pp_schedule", "interleaved")),
        layers=4,
    ),
    Case("mixtral", Layout(world_size=4, pp=2, ep=2), (("pp_schedule", "interleaved"),), layers=5),
    Case("mixtral", Layout(world_size=4, pp=2, cp=2), (("pp_schedule", "zbv"),), layers=5),
    Case("bloom", Layout(world_size=4, pp=2), (("pp_schedule", "zbv"),), layers=5),
    Case("bloom", Layout(world_size=4, pp=4), layers=3),  # one stage is the head alone
    Case("llama", Layout(world_size=4, dp_replicate=2, cp=2), (("offload", "activations"),)),
    Case("llama", Layout(world_size=8, tp=2, pp=2)),  # TP2 x PP2 x DP2
    Case("qwen", Layout(world_size=8, tp=2, cp=2), (("cp_method", "ring"),)),  # CP2 x TP2 x DP2
    Case("bloom", Layout(world_size=8, cp=2, tp=2, pp=2), (("recompute", "full"),)),
    Case("mixtral", Layout(world_size=8, tp=2, pp=2, ep=2)),
    Case("mixtral", Layout(world_size=8, cp=2, pp=2, ep=4, zero=1), (("pp_schedule", "zbv"),), layers=5),
    Case("glm", Layout(world_size=8, cp=8)),  # four heads: Ulysses over 4 inside a ring over 2
]


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_product(case: Case) -> None:
    expect(case)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_any_number_of_micro_batches(schedule: str, accumulation: int) -> None:
    """Fewer than stages, and no multiple of them."""
    expect(Case("bloom", Layout(world_size=2, pp=2), (("pp_schedule", schedule),), accumulation=accumulation))


@pytest.mark.parametrize("counts", [[0, 3], [3, 0], [2, 1]])
def test_layers_as_given(counts: list[int]) -> None:
    expect(Case("bloom", Layout(world_size=2, pp=2), (("pp_layers", counts),)))


def test_layers_by_measured_cost() -> None:
    expect(Case("mixtral", Layout(world_size=2, pp=2), (("pp_layers", "measured"),)))


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_in_stages(schedule: str, recompute: str) -> None:
    expect(Case("mixtral", Layout(world_size=2, pp=2), (("pp_schedule", schedule), ("recompute", recompute))))


@pytest.mark.parametrize("method", ["ulysses", "ring"])
@pytest.mark.parametrize("model", ["llama", "bloom", "banded", "glm", "qwen", "mixtral"])
def test_rows_over_ranks(model: str, method: str) -> None:
    """A row length that does not divide is padded."""
    length = 32 if method == "ulysses" else 30
    expect(Case(model, Layout(world_size=2, cp=2), (("cp_method", method),), length=length))
