"""Broken layouts fail the proof: each mutant takes one thing away that a layout needs, and a difference must appear.

`harmless` cases show that the same machinery passes when nothing is broken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.parity import TOLERANCE, Case, Trace, differences, trace_of
from tests.parallel.worlds import run
from trainwright.parallel import expert, overlap, pipeline, sequence
from trainwright.parallel.layout import Layout
from trainwright.train.step import TrainStep


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside."""
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


def nothing() -> Any:
    return contextlib.nullcontext()


def local_positions() -> Any:
    """Every part of a row counts its positions from 0."""
    real = sequence._Cut.__call__

    def cut(self: Any, model: Any, args: Any, kwargs: Any) -> Any:
        given, facts = real(self, model, args, kwargs)
        positions = facts["position_ids"].clone()
        positions[..., facts["index_S"]] = torch.arange(facts["index_S"].numel())
        return given, {**facts, "position_ids": positions}

    return replaced(sequence._Cut, "__call__", cut)


def local_masks() -> Any:
    """A ring rank's chunks see keys as if they began the row."""
    return replaced(sequence, "_chunk_mask", _first_chunk)


def _first_chunk(mask: Any, chunk: int, chunks: int, rows: int, device: Any) -> Any:
    return real_chunk_mask(mask, chunk % 2, chunks, rows, device)


real_chunk_mask = sequence._chunk_mask


def first_slopes() -> Any:
    """Every rank takes the first heads' ALiBi slopes."""
    real = sequence.Rows._own

    def own(self: Any, context: Any, x: Tensor) -> Any:
        index, self.ulysses_index = self.ulysses_index, 0
        found = real(self, context, x)
        self.ulysses_index = index
        return found

    return replaced(sequence.Rows, "_own", own)


def unsummed_statistics() -> Any:
    """The load-balancing loss of a part of the row."""
    return replaced(sequence, "all_reduce", lambda x, group: x)


def ring_without_reduction() -> Any:
    """Gathered keys and values keep the gradient of this rank's queries only."""
    from trainwright.parallel.collectives import _AllGather

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].chunk(ctx.group.size())[ctx.group.rank()], None

    return replaced(_AllGather, "backward", staticmethod(backward))


def untied() -> Any:
    """First and last stage keep their own gradients of the table."""
    return replaced(pipeline.Pipeline, "_share_tied_gradient", lambda self: None)


def forgotten_statistics() -> Any:
    """A stage counts its own experts only."""

    def before(self: Any, stage: Any, args: Any, kwargs: Any) -> Any:
        args, given = real(self, stage, args, kwargs)
        if "router_statistics" in given:
            given["router_statistics"] = torch.zeros_like(given["router_statistics"])
        return args, given

    real = pipeline._StageCall.before
    return replaced(pipeline._StageCall, "before", before)


def sums_in_line_by_token() -> Any:
    """What comes back is taken as if it stood by token and then rank."""

    def line_up(reach_MR: Tensor) -> tuple[Tensor, Tensor]:
        places_MR = (reach_MR.flatten().cumsum(0) - 1).view_as(reach_MR)
        return real(reach_MR)[0], torch.where(reach_MR, places_MR, reach_MR.numel())

    real = expert.line_up
    return replaced(expert, "line_up", line_up)


def one_rank_of_experts() -> Any:
    """A token's row goes to the first of its experts' ranks only."""

    def line_up(reach_MR: Tensor) -> tuple[Tensor, Tensor]:
        return real(reach_MR & (reach_MR.cumsum(1) == 1))

    real = expert.line_up

    def announce(self: Any, mine_MRC: Tensor) -> Any:
        first_MR1 = mine_MRC.any(-1).cumsum(1)[..., None] == 1
        return real_announce(self, mine_MRC & first_MR1)

    real_announce = expert.Journey._announce
    stack = contextlib.ExitStack()
    stack.enter_context(replaced(expert, "line_up", line_up))
    stack.enter_context(replaced(expert.Journey, "_announce", announce))
    return stack


def experts_without_gradients_of_weights() -> Any:
    """The gradients of a choice's weight do not come back from the experts' rank."""
    real = expert.weights_back
    return replaced(expert, "weights_back", lambda letters_NC, *line: real(torch.zeros_like(letters_NC), *line))


def own_experts_weights_only() -> Any:
    """They come back from this rank's own experts, not from others."""

    def weights_back(letters_NC: Tensor, order_N: Tensor, places_MR: Tensor) -> Tensor:
        own_N = order_N % places_MR.shape[1] == torch.distributed.get_rank()
        return real(letters_NC * own_N[:, None], order_N, places_MR)

    real = expert.weights_back
    return replaced(expert, "weights_back", weights_back)


def scattered_without_a_sum() -> Any:
    """Products beside exchanges: a rank keeps its own part of its own product."""

    def scatter(self: Any, rows: int, width: int, like: Tensor, product: Any) -> Any:
        whole = like.new_empty(self.ranks * rows, width)
        product(slice(None), whole)
        return lambda: whole.chunk(self.ranks)[self.group.rank()].clone()

    return replaced(overlap.Exchange, "scatter", scatter)


def gathered_from_nobody() -> Any:
    """Products beside exchanges: a rank's own tokens stand for the others'."""
    return replaced(overlap.Exchange, "gather", lambda self, x: (x.repeat(self.ranks, 1), iter([slice(None)])))


def mean_of_means() -> Any:
    """Each micro batch divides by its own tokens."""

    def share(self: TrainStep, output: Any, count: Tensor) -> Tensor:
        return output.loss_sum / output.num_tokens.clamp(min=1) / 4

    return replaced(TrainStep, "share", share)


def broken(case: Case, mutant: Callable[[], Any]) -> Trace:
    with mutant():
        return trace_of(case)


RING = (("cp_method", "ring"),)
ULYSSES = (("cp_method", "ulysses"),)
EP = Case("mixtral", Layout(world_size=2, ep=2))
MUTANTS = [
    (local_positions, Case("llama", Layout(world_size=2, cp=2), ULYSSES)),
    (local_positions, Case("banded", Layout(world_size=2, cp=2), RING)),
    (local_masks, Case("llama", Layout(world_size=2, cp=2), RING)),
    (first_slopes, Case("bloom", Layout(world_size=2, cp=2), ULYSSES)),
    (unsummed_statistics, Case("mixtral", Layout(world_size=2, cp=2))),
    (ring_without_reduction, Case("llama", Layout(world_size=2, cp=2), RING)),
    (untied, Case("bloom", Layout(world_size=2, pp=2))),
    (untied, Case("bloom", Layout(world_size=2, pp=2), (("pp_schedule", "zbv"),))),
    (forgotten_statistics, Case("mixtral", Layout(world_size=2, pp=2))),
    (sums_in_line_by_token, EP),
    (one_rank_of_experts, EP),
    (experts_without_gradients_of_weights, EP),
    (own_experts_weights_only, EP),
    (scattered_without_a_sum, Case("llama", Layout(world_size=2, tp=2), (("async_tp", True),))),
    (gathered_from_nobody, Case("llama", Layout(world_size=2, tp=2), (("async_tp", True),))),
    (mean_of_means, Case("llama", Layout(world_size=2))),
]


@pytest.mark.parametrize(("mutant", "case"), MUTANTS, ids=lambda part: getattr(part, "__name__", str(part)))
def test_a_mutant_fails(mutant: Callable[[], Any], case: Case) -> None:
    worst = differences(case, run(case.layout.world_size, broken, case, mutant))
    assert max(worst.values()) > 100 * TOLERANCE


@pytest.mark.parametrize("case", {case: None for _, case in MUTANTS}, ids=str)
def test_without_the_mutant_it_holds(case: Case) -> None:
    worst = differences(case, run(case.layout.world_size, broken, case, nothing))
    assert max(worst.values()) <= TOLERANCE
