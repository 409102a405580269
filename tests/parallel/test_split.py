"""Layers to stages: as good as trying every split, embedding and head counted, refusals that say the numbers."""

from itertools import combinations_with_replacement, pairwise

import pytest

from trainwright.errors import UserError
from trainwright.model.config import (
    AttentionConfig,
    BlockConfig,
    EmbeddingConfig,
    HeadConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
)
from trainwright.parallel.split import PartCosts, estimate_costs, split_layers


def stage_costs(costs: PartCosts, ranges) -> list[float]:
    sums = [sum(costs.layers[i] for i in part) for part in ranges]
    sums[0] += costs.embedding
    sums[-1] += costs.head
    return sums


def every_split(layers: int, stages: int):
    for cuts in combinations_with_replacement(range(layers + 1), stages - 1):
        ranges = [range(a, b) for a, b in pairwise((0, *cuts, layers))]
        if all(len(part) for part in ranges[1:-1]):
            yield ranges


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "costs",
    [
        PartCosts((1.0,) * 8, 0.0, 0.0),
        PartCosts((1.0,) * 7, 0.1, 3.5),
        PartCosts((5.0, 1.0, 1.0, 1.0, 1.0, 9.0), 2.0, 0.5),
        PartCosts((1.0, 2.0, 3.0), 0.0, 40.0),
    ],
)
def test_no_other_split_is_better(costs, stages):
    chosen = split_layers(costs, stages)
    assert [i for part in chosen for i in part] == list(range(len(costs.layers)))
    best = min(
        (max(found := stage_costs(costs, ranges)), sum(x * x for x in found))
        for ranges in every_split(len(costs.layers), stages)
    )
    got = stage_costs(costs, chosen)
    assert max(got) == pytest.approx(best[0])
    assert sum(x * x for x in got) == pytest.approx(best[1])


def tiny(layers: int, vocab: int) -> ModelConfig:
    block = BlockConfig(AttentionConfig.of(64, 4), MlpConfig.of(64, 172), NormConfig(64, 1e-5), NormConfig(64, 1e-5))
    return ModelConfig(
        "llama", EmbeddingConfig(vocab, 64), (block,) * layers, NormConfig(64, 1e-5), HeadConfig(64, vocab), 128
    )


def test_a_large_vocabulary_takes_layers_off_the_last_stage():
    small = [len(part) for part in split_layers(estimate_costs(tiny(8, 16), 32), 2)]
    large = [len(part) for part in split_layers(estimate_costs(tiny(8, 2048), 32), 2)]
    assert small == [4, 4]
    assert large[1] < 4


def test_full_recompute_makes_layers_dearer_than_the_head():
    plain, full = (estimate_costs(tiny(4, 512), 32, recompute) for recompute in ("none", "full"))
    assert full.layers[0] == pytest.approx(plain.layers[0] * 4 / 3)
    assert full.head == plain.head


def test_given_counts():
    costs = PartCosts((1.0,) * 5, 0.0, 0.0)
    assert split_layers(costs, 3, [3, 2, 0]) == (range(3), range(3, 5), range(5, 5))
    for wrong in ([3, 2], [3, 0, 2], [3, 1, 0], [6, -1, 0]):
        with pytest.raises(UserError, match="5 layers to 3 stages"):
            split_layers(costs, 3, wrong)


def test_too_many_stages_say_how_many_work():
    with pytest.raises(UserError, match=r"use at most 5 stages, parallel.pp=5$"):
        split_layers(PartCosts((1.0,) * 3, 0.0, 0.0), 6)
    with pytest.raises(UserError, match=r"use at most 5 stages, parallel.pp=2 with 2 stages a rank$"):
        split_layers(PartCosts((1.0,) * 3, 0.0, 0.0), 6, per_rank=2)
    assert [len(part) for part in split_layers(PartCosts((1.0,) * 3, 0.0, 0.0), 5)] == [0, 1, 1, 1, 0]
