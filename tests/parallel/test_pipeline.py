"""A pipeline's passes without gradients, generation, its measured cuts, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel import models
from tests.parallel.worlds import run, world_of
from trainwright.data.loader import Batch
from trainwright.errors import UserError
from trainwright.model.generate import generate
from trainwright.model.transformer import Transformer
from trainwright.parallel import apply
from trainwright.parallel.apply import parallelize
from trainwright.parallel.layout import Layout
from trainwright.parallel.pipeline import Pipeline
from trainwright.parallel.split import PartCosts, check_micro_batches, in_flight, stages_of_rank
from trainwright.parallel.stages import Cut, measure_costs, without_twins
from trainwright.recipe.parallel import ParallelRecipe
from trainwright.train.nonfinite import find_nonfinite
from trainwright.train.optimizer import build_optimizer
from trainwright.train.step import LossScale, TrainStep

CPU = torch.device("cpu")


def in_stages(
    name: str, layout: Layout, schedule: str, layers: int = 5, per_rank: int = 2
) -> tuple[Transformer, Pipeline]:
    with torch.device("meta"):
        model = Transformer(models.MODELS[name](layers))
    recipe = ParallelRecipe(pp=layout.pp, cp=layout.cp, tp=layout.tp, pp_schedule=schedule, pp_stages=per_rank)
    spread = parallelize(model, world_of(layout), recipe, precision="fp32", compile_layers=False, seq_len=32)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.reset_buffers(CPU)
    model.init_weights(3)
    assert spread.pipeline is not None
    return model, spread.pipeline


def passes(name: str, layout: Layout, schedule: str) -> dict[str, Any]:
    """Held-out losses of three micro batches, logits, and generated tokens, in stages and on one process."""
    plain = Transformer(models.MODELS[name](5)).init_weights(3).eval()
    _, pipeline = in_stages(name, layout, schedule)
    pipeline.eval()
    batches = [models.inputs(b, name) for b in models.batches(3, 2, 32, 7, prompts=name == "glm")]
    with torch.no_grad():
        expected = torch.stack([plain(**batch).loss_sum for batch in batches])
        found = torch.stack([pipeline(**batch).loss_sum for batch in batches])
        count = torch.stack([pipeline(**batch).num_tokens for batch in batches])
    torch.distributed.all_reduce(found)
    torch.distributed.all_reduce(count)
    ids = torch.randint(0, 90, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {
        "losses": (found / layout.tp - expected).abs().max().item() / expected.max().item(),
        "tokens": (count // layout.tp).tolist() == [int((batch["labels"] != -100).sum()) for batch in batches],
        "logits": (pipeline(ids) - plain(ids)).abs().max().item(),
        "tokens of": [
            torch.stack(list(generate(m, ids, attention_mask=mask, max_new_tokens=4))).tolist()  # type: ignore[arg-type]
            for m in (pipeline, plain)
        ],
    }


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
@pytest.mark.parametrize("name", ["bloom", "glm", "mixtral"])
def test_passes_are_those_of_one_process(name, schedule):
    check(run(2, passes, name, Layout(world_size=2, pp=2), schedule))


def test_passes_beside_rows_and_heads_over_ranks():
    check(run(8, passes, "llama", Layout(world_size=8, pp=2, cp=2, tp=2), "1f1b"))


def check(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["losses"] < 1e-5
        assert result["tokens"]
        assert result["logits"] < 1e-4
        ours, plain = result["tokens of"]
        assert ours == plain


def poisoned(backward: bool) -> tuple[str | None, list[int]]:
    """What each rank finds when a layer of the second stage makes a NaN for the second row of a micro batch."""
    layout = Layout(world_size=2, pp=2)
    model, pipeline = in_stages("llama", layout, "1f1b", layers=4)

    def poison(module: torch.nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor | None:
        hurt = torch.zeros_like(out)
        hurt[1, 5] = float("nan")
        if backward:
            out.register_hook(lambda grad: grad + hurt)
            return None
        return out + hurt

    assert model.layers is not None
    if "3" in model.layers:
        model.layers["3"].mlp.register_forward_hook(poison)
    optimizers = build_optimizer(model, "sgd", betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    step = TrainStep(pipeline, optimizers, world_of(layout), max_grad_norm=1.0, loss_scale=LossScale(False))
    batches = [Batch(**vars(batch)) for batch in models.batches(2, 2, 32, 7)]
    assert not step(batches, 0.1).finite
    found = find_nonfinite(model, batches, step.probe, lambda number, row: 2 * number + row)
    return (found.where, found.rows) if found else (None, [])


def test_nan_in_a_later_stage_is_found_there():
    first, second = run(2, poisoned, False)
    assert first[0] is None or "layers.0" not in first[0]
    assert second[0].startswith("the output of layers.3.mlp")
    assert second[1] == [1, 3]


def test_nan_of_a_gradient_is_found_in_the_stage_that_made_it():
    _, second = run(2, poisoned, True)
    assert second[0].startswith("the backward pass between")
    assert "layers.3.mlp" in second[0]


def held(schedule: str) -> dict[str, Any]:
    """What a rank has of a tied model, and what a checkpoint of it would hold."""
    model, pipeline = in_stages("bloom", Layout(world_size=2, pp=2), schedule)
    named = dict(model.named_parameters())
    kept, twins = without_twins(model, named)
    return {
        "names": sorted(named),
        "kept": sorted(kept),
        "twins": len(twins),
        "equal": all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in twins),  # type: ignore[attr-defined]
        "copies": len(pipeline.copies),
        "said": str(pipeline),
    }


def test_a_tied_table_has_one_name_in_every_stage():
    first, last = run(2, held, "1f1b")
    assert "embed_tokens.weight" in first["names"]
    assert "embed_tokens.weight" in last["names"]
    assert "lm_head.weight" not in first["names"] + last["names"]
    assert (first["copies"], last["copies"]) == (0, 1)
    assert not set(first["names"]) & set(last["names"]) - {"embed_tokens.weight"}
    assert "1f1b over 2 stages of" in first["said"]


def test_a_v_has_two_tables_and_saves_one():
    first, middle = run(2, held, "zbv")
    assert {"embed_tokens.weight", "lm_head.weight"} <= set(first["names"])
    assert "lm_head.weight" not in first["kept"]
    assert (first["twins"], first["equal"], first["copies"]) == (1, True, 1)
    assert (middle["twins"], middle["copies"]) == (0, 0)
    assert middle["names"] == middle["kept"]


def costs() -> list[float]:
    config = models.mixtral(4)
    found = measure_costs(config, device=CPU, dtype=torch.float32, length=32, full=True)
    return [*found.layers, found.embedding, found.head]


def test_measured_costs_are_the_same_on_every_rank_and_alike_for_alike_layers():
    first, second = run(2, costs)
    assert first == second
    assert all(seconds > 0 for seconds in first)
    assert len(set(first[1:4])) == 1  # three sparse layers, measured once


def test_stages_of_a_rank():
    assert [stages_of_rank(r, 2, "1f1b") for r in range(2)] == [(0,), (1,)]
    assert [stages_of_rank(r, 2, "interleaved", 3) for r in range(2)] == [(0, 2, 4), (1, 3, 5)]
    assert [stages_of_rank(r, 3, "zbv") for r in range(3)] == [(0, 5), (1, 4), (2, 3)]


def kept_together(pp: int, schedule: str) -> tuple[int, float]:
    """Stages of this rank times the micro batches between forward and backward in them, at most, as they run; and what
    of a budget of 12 GiB they keep together."""
    _, pipeline = in_stages("llama", Layout(world_size=pp, pp=pp), schedule, layers=2 * pp)
    recipe = ParallelRecipe(pp=pp, pp_schedule=schedule, recompute="selective", recompute_memory=12.0)
    pipeline.split_backward = False  # as with any recomputation
    own = list(pipeline.stages.values())
    share = {
        number: apply._kept_memory(pipeline.stages[number], own, recipe, pipeline.mesh) for number in pipeline.stages
    }
    now, chunks, kept = dict.fromkeys(pipeline.stages, 0), [0], [0.0]

    def count(number: int, step: int) -> None:
        now[number] += step
        chunks.append(sum(now.values()))
        kept.append(sum(now[one] * share[one] for one in now))

    for number, stage in pipeline.stages.items():
        layer = next(iter(stage.layers.values()))
        layer.register_forward_pre_hook(lambda *_, number=number: count(number, 1))
        layer.register_full_backward_hook(lambda *_, number=number: count(number, -1))
    batches = [models.inputs(batch, "llama") for batch in models.batches(8, 2, 32, 7)]
    pipeline.forward_backward(batches, lambda output: output.loss_sum)
    return max(chunks), max(kept)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
@pytest.mark.parametrize("pp", [2, 4])
def test_what_is_in_flight_shares_the_budget(pp, schedule):
    for rank, (chunks, kept) in enumerate(run(pp, kept_together, pp, schedule)):
        per_rank = len(stages_of_rank(rank, pp, schedule))
        assert chunks == in_flight(rank, pp, schedule, per_rank) * per_rank
        assert kept == pytest.approx(12.0)


def collectives(schedule: str, per_rank: int) -> list[str]:
    """In which order this rank gathers its stages' weights and lets go of them."""
    layout = Layout(world_size=2, pp=2)
    _, pipeline = in_stages("llama", layout, schedule, layers=8, per_rank=per_rank)
    made = pipeline._schedule(8, 2, 32).pipeline_order_with_comms[torch.distributed.get_rank()]
    return [str(action) for action in made if action.computation_type.name in ("UNSHARD", "RESHARD")]


@pytest.mark.parametrize(("schedule", "per_rank"), [("zbv", 2), ("interleaved", 3), ("interleaved", 4)])
def test_weights_of_a_stage_are_gathered_once_a_step(schedule, per_rank):
    for rank, found in enumerate(run(2, collectives, schedule, per_rank)):
        own = stages_of_rank(rank, 2, schedule, per_rank)
        assert sorted(found[:per_rank]) == [f"{stage}UNSHARD" for stage in own]
        assert sorted(found[per_rank:]) == [f"{stage}RESHARD" for stage in own]


def test_a_cut_covers_all_layers_once():
    even = PartCosts((1.0,) * 9, 0.0, 1.0)
    for schedule in ("1f1b", "interleaved", "zbv"):
        cuts = [Cut.of(even, rank=r, pp=2, schedule=schedule) for r in range(2)]  # type: ignore[arg-type]
        layers = [layer for cut in cuts for stage in cut.own for layer in cut.stages[stage]]
        assert sorted(layers) == list(range(9))


@pytest.mark.parametrize(("count", "fix"), [(5, "use 4 gradient"), (9, "use 8 gradient")])
def test_interleaved_says_what_it_can_order(count, fix):
    with pytest.raises(UserError, match=fix):
        check_micro_batches("interleaved", 2, count)
    check_micro_batches("1f1b", 2, count)
    check_micro_batches("interleaved", 2, 8)
