"""How a model is divided over pipeline stages, and a row over context ranks. No torch.

Owns the estimate of each part's cost with the exact balanced partition of the layers (embedding and head counted), and
the choice between Ulysses and ring. The planner reads the same divisions that training builds from. Carrying them out
is `pipeline.py`'s and `sequence.py`'s work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import gcd, lcm
from typing import Literal

from trainwright.errors import UserError
from trainwright.model.config import ModelConfig


@dataclass(frozen=True)
class PartCosts:
    """Relative cost of forward and backward of one token: any unit, the same for all parts."""

    layers: tuple[float, ...]
    embedding: float
    head: float


def estimate_costs(config: ModelConfig, seq_len: int, recompute: str = "none") -> PartCosts:
    """FLOPs of each part by the causal convention (DESIGN section 5).

    Full recompute runs each layer's forward once more (a third on top); the head is outside it. The lookup itself costs
    nothing, but its weight gradient writes the whole table's rows: counted as one multiply per element of the output.
    """
    again = 4 / 3 if recompute == "full" else 1.0
    layers = tuple(
        again * (6 * block.num_active_parameters() + block.self_attn.flops_per_token(seq_len, causal=True))
        for block in config.layers
    )
    head = config.lm_head
    return PartCosts(layers, 6.0 * config.embed_tokens.embedding_dim, 6.0 * head.in_features * head.out_features)


def split_layers(
    costs: PartCosts, num_stages: int, counts: Sequence[int] | None = None, per_rank: int = 1
) -> tuple[range, ...]:
    """The layers of each stage, first stage first; embedding is in the first, the head in the last.

    The dearest stage is as cheap as any contiguous split allows; among those splits, the most even one (least sum of
    squares). The first and the last stage may be left with the embedding or the head alone. `counts` says the numbers
    of layers outright. Raises UserError where a stage would be empty; `per_rank`: stages of a rank, for its advice.
    """
    num_layers = len(costs.layers)
    if counts is not None:
        return _given(counts, num_layers, num_stages)
    if num_stages > num_layers + min(num_stages - 1, 2):
        each = f" with {per_rank} stages a rank" if per_rank > 1 else ""
        raise UserError(
            f"{num_stages} pipeline stages cannot share {num_layers} layers, an embedding and a head: "
            f"use at most {num_layers + 2} stages, parallel.pp={max(1, (num_layers + 2) // per_rank)}{each}"
        )
    limit = _cheapest_maximum(costs, num_stages)
    return _most_even(costs, num_stages, limit * (1 + 1e-12))


Schedule = Literal["1f1b", "interleaved", "zbv"]


def stages_of_rank(rank: int, pp: int, schedule: Schedule, per_rank: int = 2) -> tuple[int, ...]:
    """The stages of one pipeline rank. interleaved: every pp-th. zbv: down and up again, so both ends are on rank 0."""
    if schedule == "1f1b":
        return (rank,)
    if schedule == "zbv":
        return (rank, 2 * pp - 1 - rank)
    return tuple(range(rank, pp * per_rank, pp))


def in_flight(rank: int, pp: int, schedule: Schedule, per_rank: int = 2) -> float:
    """Micro batches between forward and backward on one pipeline rank, at most, in units of all of its layers."""
    if schedule == "1f1b":
        return float(pp - rank)
    if schedule == "zbv":
        return float(pp)
    return ((pp - rank - 1) * 2 + (per_rank - 1) * pp + 1) / per_rank  # Narayanan et al. 2021, section 2.2


def check_micro_batches(schedule: Schedule, pp: int, count: int) -> None:
    """Raises UserError where a schedule cannot order `count` micro batches; any other number works, with bubbles."""
    rounds = max(1, count // pp)
    if pp > 1 and schedule == "interleaved" and count % rounds:
        raise UserError(
            f"parallel.pp_schedule=interleaved cannot order {count} micro batches over pp={pp} ranks: use "
            f"{rounds * pp} gradient accumulation steps, or parallel.pp_schedule=1f1b"
        )


def away_layers(count: int, share: float) -> list[int]:
    """Which of `count` layers keep their activations in host memory: this share of them, evenly spread; never the last,
    whose backward pass comes at once, nor where others can go the one before it, which has one layer's time to return.
    """
    away = [number for number in range(count - 1) if int((number + 1) * share + 1e-9) > int(number * share + 1e-9)]
    earlier = bool(away) and away[0] > 0 and away[-1] == count - 2
    return [number - earlier for number in away]


def rich_layers(room: float, layers: int, attention: int, everything: int) -> tuple[int, int]:
    """How many of `layers` keep (`everything`, at least `attention`) bytes beyond their input within `room` bytes.

    As many as fit keep what their attention gave, then everything. Where not all can keep everything, the first keeps
    its input only: its backward pass comes last, when all gradients are there.
    """
    if layers * everything <= room:
        return layers, layers
    layers = max(1, layers - 1)
    several = int(min(layers, room // max(1, attention)))
    more = max(1, everything - attention)
    whole = int(min(layers, (room - several * attention) // more)) if several == layers else 0
    return whole, several


def check_one_pass(in_backward: bool, accumulation: int) -> None:
    """Raises UserError where updates within the backward pass meet several passes a step."""
    if in_backward and accumulation > 1:
        raise UserError(
            f"train.optimizer_in_backward=true updates after each backward pass, and a step has {accumulation}: use "
            "train.gradient_accumulation_steps=1 with larger micro batches, or leave it out"
        )


def _given(counts: Sequence[int], num_layers: int, num_stages: int) -> tuple[range, ...]:
    """Ranges of the given lengths."""
    if len(counts) != num_stages or sum(counts) != num_layers or min(counts) < 0 or 0 in counts[1:-1]:
        raise UserError(
            f"parallel.pp_layers={list(counts)} does not give {num_layers} layers to {num_stages} stages: "
            f"write {num_stages} numbers whose sum is {num_layers}, 0 at most at both ends"
        )
    ends = list(accumulate(counts, initial=0))
    return tuple(range(start, end) for start, end in pairwise(ends))


class _Stages:
    """Cost of a stage with layers [start, end)."""

    def __init__(self, costs: PartCosts, num_stages: int) -> None:
        self.sums = list(accumulate(costs.layers, initial=0.0))
        self.costs, self.last = costs, num_stages - 1
        self.num_layers = len(costs.layers)

    def cost(self, stage: int, start: int, end: int) -> float:
        """Infinite where a stage in the middle would be empty."""
        if start == end and 0 < stage < self.last:
            return float("inf")
        extra = (self.costs.embedding if stage == 0 else 0.0) + (self.costs.head if stage == self.last else 0.0)
        return self.sums[end] - self.sums[start] + extra


def _cheapest_maximum(costs: PartCosts, num_stages: int) -> float:
    """The least possible cost of the dearest stage (linear partition, by dynamic programming)."""
    stages = _Stages(costs, num_stages)
    total = stages.num_layers
    best = [stages.cost(0, 0, end) for end in range(total + 1)]
    for stage in range(1, num_stages):
        best = [_least_maximum(stages, best, stage, end) for end in range(total + 1)]
    return best[total]


def _least_maximum(stages: _Stages, before: list[float], stage: int, end: int) -> float:
    """The least cost of the dearest of stages 0 to `stage` that share `end` layers. A stage only grows as its start
    goes back, so the search ends where it alone costs more than what was found."""
    least = float("inf")
    for cut in range(end, -1, -1):
        own = stages.cost(stage, cut, end)
        if own >= least and cut < end:  # one without layers may cost more: none is allowed in the middle
            break
        least = min(least, max(before[cut], own))
    return least


def _most_even(costs: PartCosts, num_stages: int, limit: float) -> tuple[range, ...]:
    """Least sum of squared stage costs with no stage above `limit`."""
    stages = _Stages(costs, num_stages)
    total = stages.num_layers

    def evenest(stage: int, before: list[float], end: int) -> tuple[float, int]:
        """(sum of squares, start of this stage) of stages 0 to `stage` that share `end` layers."""
        found = (float("inf"), 0)
        for cut in range(end, -1, -1):
            own = stages.cost(stage, cut, end)
            if own <= limit:
                found = min(found, (before[cut] + own * own, cut))
            elif cut < end:  # a stage only grows as its start goes back
                break
        return found

    first = [stages.cost(0, 0, end) for end in range(total + 1)]
    best = [own * own if own <= limit else float("inf") for own in first]
    cuts: list[list[int]] = []
    for stage in range(1, num_stages):
        found = [evenest(stage, best, end) for end in range(total + 1)]
        best, cut_of = [value for value, _ in found], [cut for _, cut in found]
        cuts.append(cut_of)
    ends = [total]
    for cut_of in reversed(cuts):
        ends.append(cut_of[ends[-1]])
    edges = [0, *reversed(ends)]
    return tuple(range(start, end) for start, end in pairwise(edges))


@dataclass(frozen=True)
class RowSplit:
    """A row over ulysses x ring context ranks; rank = ring index x ulysses + ulysses index.

    The row is cut into 2 x ring chunks; ring index i holds the chunks i and 2 x ring - 1 - i, so every index has the
    same share of the causal triangle. Its chunks, joined, are cut once more into `ulysses` pieces.
    """

    ulysses: int = 1
    ring: int = 1
    why: str = ""

    @property
    def multiple(self) -> int:
        """Row lengths that divide evenly are multiples of this."""
        return self.ring * lcm(2, self.ulysses) if self.ring > 1 else self.ulysses

    def chunks(self, ring_index: int) -> tuple[int, ...]:
        """The chunks of one ring index, in the row's order."""
        return (0,) if self.ring == 1 else (ring_index, 2 * self.ring - 1 - ring_index)


def choose_row_split(
    num_heads: int, num_kv_heads: int, cp: int, method: Literal["auto", "ulysses", "ring"] = "auto"
) -> RowSplit:
    """How `cp` ranks share a row in attention, for heads as one tensor-parallel rank holds them.

    Ulysses exchanges heads for tokens: it needs a degree that divides the query heads, and copies KV heads that it does
    not divide. A ring gathers keys and values, whatever the heads. `ulysses` takes the largest degree that divides, and
    a ring for the rest. `auto` takes Ulysses where cp divides all heads, because attention then sees whole rows, as on
    one rank; else the pair that moves the fewest bytes, forward and backward.
    """
    if method == "ring":
        return RowSplit(1, cp, f"ring over {cp} ranks, as asked")
    degrees = [u for u in range(1, cp + 1) if cp % u == 0 and num_heads % u == 0]
    if method == "ulysses":
        best, reason = degrees[-1], "as asked"
    elif num_heads % cp == 0 and num_kv_heads % cp == 0:
        best, reason = cp, "they divide evenly"
    else:
        best = min(reversed(degrees), key=lambda u: _traffic(num_heads, num_kv_heads, u, cp // u))
        reason = "fewest bytes moved"
    parts = [f"Ulysses over {best}"] if best > 1 else []
    parts += [f"ring over {cp // best}"] if best < cp else []
    limit = f"; {num_heads} heads do not divide by {cp}" if num_heads % cp else ""
    heads = f"{num_heads} query and {num_kv_heads} KV heads a rank"
    return RowSplit(best, cp // best, f"{' x '.join(parts)} ranks for {heads} ({reason}{limit})")


def kv_copies(num_kv_heads: int, ulysses: int) -> int:
    """How often each KV head is copied so that `ulysses` ranks get whole ones."""
    return ulysses // gcd(num_kv_heads, ulysses)


def _traffic(num_heads: int, num_kv_heads: int, ulysses: int, ring: int) -> float:
    """Head vectors that a rank sends for one row of cp tokens.

    Ulysses moves q, k, v there and the output back, in both passes. A ring gathers k and v, gathers them again for the
    backward pass and scatters their gradients.
    """
    kv = num_kv_heads * kv_copies(num_kv_heads, ulysses)
    exchanged = 2 * (2 * num_heads + 2 * kv) * (ulysses - 1) / ulysses
    gathered = 3 * 2 * (kv / ulysses) * ulysses * (ring - 1)
    return exchanged + gathered
