"""Parts of rows: every token once, the same work for every rank, masks and offsets that say what whole rows say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.parallel import models
from tests.parallel.worlds import run, world_of
from trainwright.model.generate import generate
from trainwright.model.mask import AttentionMask, Visibility
from trainwright.model.transformer import Transformer
from trainwright.parallel.layout import Layout
from trainwright.parallel.sequence import Rows, _chunk_mask, apply_sequence, offsets
from trainwright.parallel.split import RowSplit, choose_row_split

SPLITS = [
    RowSplit(1, 2),
    RowSplit(2, 1),
    RowSplit(2, 2),
    RowSplit(1, 4),
    RowSplit(4, 2),
    RowSplit(3, 2),
    RowSplit(1, 8),
]


class Place(Rows):
    """A rank's place without any group."""

    def __init__(self, split: RowSplit, rank: int) -> None:
        self.split = split
        self.ring_index, self.ulysses_index = divmod(rank, split.ulysses)


def parts(split: RowSplit, length: int) -> list[Tensor]:
    return [Place(split, rank).part(length) for rank in range(split.ulysses * split.ring)]


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: f"ulysses{split.ulysses}-ring{split.ring}")
def test_every_token_has_one_place(split):
    length = 3 * split.multiple
    held = parts(split, length)
    assert torch.cat(held).sort().values.tolist() == list(range(length))
    assert len({len(part) for part in held}) == 1
    for ring_index in range(split.ring):  # the ranks of one Ulysses group, joined, are chunks in the row's order
        joined = torch.cat(held[ring_index * split.ulysses : (ring_index + 1) * split.ulysses])
        assert joined.tolist() == joined.sort().values.tolist()


@pytest.mark.parametrize("split", [s for s in SPLITS if s.ring > 1], ids=lambda s: f"ring{s.ring}x{s.ulysses}")
def test_a_ring_shares_the_causal_triangle_evenly(split):
    length = 8 * split.multiple
    groups = [torch.cat(parts(split, length)[i * split.ulysses : (i + 1) * split.ulysses]) for i in range(split.ring)]
    pairs = [int((group + 1).sum()) for group in groups]  # position p sees p + 1 keys
    assert len(set(pairs)) == 1


@pytest.mark.parametrize(
    ("heads", "kv", "cp", "method", "expected"),
    [
        (32, 8, 8, "auto", (8, 1)),
        (32, 8, 16, "auto", (16, 1)),  # KV heads copied twice
        (32, 32, 4, "auto", (4, 1)),
        (32, 2, 8, "auto", (1, 8)),  # two KV heads are less to gather than all heads to exchange
        (32, 2, 8, "ulysses", (8, 1)),
        (4, 4, 8, "ulysses", (4, 2)),
        (6, 3, 4, "ulysses", (2, 2)),
        (7, 7, 4, "auto", (1, 4)),
        (32, 8, 8, "ring", (1, 8)),
    ],
)
def test_the_choice(heads, kv, cp, method, expected):
    split = choose_row_split(heads, kv, cp, method)
    assert (split.ulysses, split.ring) == expected
    assert f"{heads} query and {kv} KV heads" in split.why or method == "ring"


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("chunk", range(4))
def test_offsets_of_a_part_give_variable_length_kernels_the_same_mask(documents, chunk):
    """The kernel's rule, written out: each document's queries are its last ones, causal from the end."""
    batch = models.batches(1, 3, 32, seed=5)[0]
    ids = batch.document_ids if documents else None
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 32, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    whole = attend(q, k, v, AttentionMask(Visibility(32, 32, ids)).dense(q.device)[:, 0])
    begin, end = 8 * chunk, 8 * (chunk + 1)
    part = Visibility(8, end, None if ids is None else ids[:, :end])
    keys, queries = (found.tolist() for found in offsets(part, 3, q.device))
    assert (keys[-1], queries[-1], len(keys)) == (3 * end, 3 * 8, len(queries))
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q[:, begin:end], k[:, :end], v[:, :end]))
    out = torch.empty_like(flat_q)
    for i in range(len(keys) - 1):
        own_q, own_k = flat_q[queries[i] : queries[i + 1]], flat_k[keys[i] : keys[i + 1]]
        S, T = len(own_q), len(own_k)
        seen = torch.arange(T)[None] <= torch.arange(T - S, T)[:, None]
        out[queries[i] : queries[i + 1]] = attend(own_q, own_k, flat_v[keys[i] : keys[i + 1]], seen)
    assert torch.allclose(out.unflatten(0, (3, 8)), whole[:, begin:end])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("prefix", [False, True])
def test_chunk_masks_are_rows_of_the_whole_mask(window, prefix):
    ids = models.batches(1, 2, 32, seed=9)[0].document_ids
    prompt = (torch.arange(32) % 7 < 3)[None].expand(2, -1) if prefix else None
    whole = AttentionMask(Visibility(32, 32, ids, prompt), window)
    for chunk in range(4):
        part = _chunk_mask(whole, chunk, 4, 2, ids.device)
        expected = whole.dense(ids.device)[:, :, 8 * chunk : 8 * chunk + 8, : part.seen.num_keys]
        assert torch.equal(part.dense(ids.device), expected)
        assert not whole.dense(ids.device)[:, :, 8 * chunk : 8 * chunk + 8, part.seen.num_keys :].any()


def answers(name: str) -> list[list[int]]:
    """Generation takes whole rows; so does a pass without labels."""
    world = world_of(Layout(world_size=2, cp=2))
    model = Transformer(models.MODELS[name]()).init_weights(3)
    plain = Transformer(models.MODELS[name]()).init_weights(3)
    mesh = world.axis("cp")
    assert mesh is not None
    apply_sequence(model, mesh, RowSplit(1, 2))
    ids = torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(ids), plain(ids))
    return [torch.stack(list(generate(m, ids, max_new_tokens=5))).tolist() for m in (model, plain)]


@pytest.mark.parametrize("name", ["llama", "bloom", "glm"])
def test_generation_is_that_of_one_process(name):
    for split, plain in run(2, answers, name):
        assert split == plain
