"""Packed documents, padding on both sides, and cached generation, for every family: a row computes what it computes
alone. The masks and positions that would break this are tried too, so these tests can fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.golden import golden_dir
from trainwright.model import families
from trainwright.model import mask as masks
from trainwright.model.checkpoint import load_model
from trainwright.model.config import ModelConfig
from trainwright.model.generate import generate
from trainwright.model.transformer import Transformer

CLOSE = 1e-5


@pytest.fixture(scope="module", params=families.names())
def model(request: pytest.FixtureRequest) -> Transformer:
    return load_model(golden_dir(request.param), family=request.param, dtype=torch.float32)


def document(config: ModelConfig, length: int, seed: int) -> Tensor:
    """Random tokens but no pad id, whose row has no gradient; for GLM a prompt, gMASK, sop and an answer."""
    ids = torch.randint(10, 140, (length,), generator=torch.Generator().manual_seed(seed))
    if config.prefix is not None:
        ids[length // 3], ids[length // 3 + 1] = config.prefix.gmask_token_id, config.prefix.start_token_id
    return ids


def small_ids(model: Transformer) -> Transformer:
    """GLM-130B's golden folder has a small vocabulary and no token ids: gives it some."""
    from dataclasses import replace

    prefix = model.config.prefix
    if prefix is not None and prefix.start_token_id >= model.config.vocab_size:
        tokens = replace(prefix, start_token_id=154, gmask_token_id=151, mask_token_id=150)
        model.config = replace(model.config, prefix=tokens)
    return model


def gradients(model: Transformer) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def shifted(ids: Tensor) -> Tensor:
    return torch.cat([ids[1:], torch.full((1,), -100)])


def alone(model: Transformer, documents: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Each document in a row of its own: logits, and the gradient of the summed loss."""
    with torch.no_grad():
        logits = [model(ids[None])[0] for ids in documents]
    for ids in documents:
        model(ids[None], labels=shifted(ids)[None]).loss_sum.backward()
    return logits, gradients(model)


def assert_same(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        scale = max(1.0, gradient.abs().max().item())
        assert (given[name] - gradient).abs().max().item() / scale < CLOSE, name


def packed(documents: list[Tensor], padding: int = 3) -> dict[str, Tensor]:
    """One row of documents one behind the other, and some padding at its end."""
    pads = torch.zeros(padding, dtype=torch.int64)
    ids = torch.cat([*documents, pads])
    numbers = torch.cat([torch.full_like(d, n) for n, d in enumerate(documents)] + [torch.full_like(pads, -1)])
    labels = torch.cat([*map(shifted, documents), torch.full_like(pads, -100)])
    return {"input_ids": ids[None], "document_ids": numbers[None].int(), "labels": labels[None]}


def packed_error(model: Transformer) -> float:
    """How far the logits of three packed documents are from those of each alone."""
    small_ids(model)
    documents = [document(model.config, length, length) for length in (11, 7, 16)]
    row = packed(documents)
    with torch.no_grad():
        together = model(row["input_ids"], document_ids=row["document_ids"])[0]
        single = torch.cat([model(ids[None])[0] for ids in documents])
    return (together[:-3] - single).abs().max().item()


def test_packed_documents(model: Transformer) -> None:
    assert packed_error(model) < CLOSE
    documents = [document(model.config, length, length) for length in (11, 7, 16)]
    _, expected = alone(model, documents)
    out = model(**packed(documents))
    assert out.num_tokens == sum(len(d) - 1 for d in documents)
    out.loss_sum.backward()
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model: Transformer, side: str) -> None:
    small_ids(model)
    documents = [document(model.config, length, length) for length in (9, 16)]
    logits, expected = alone(model, documents)
    rows, real, labels = [], [], []
    for ids in documents:
        pads = torch.zeros(16 - len(ids), dtype=torch.int64)
        ones, nothing = torch.ones_like(ids), torch.full_like(pads, -100)
        order = (lambda pad, own: torch.cat([pad, own])) if side == "left" else (lambda pad, own: torch.cat([own, pad]))
        rows.append(order(pads, ids))
        real.append(order(pads, ones))
        labels.append(order(nothing, shifted(ids)))
    inputs = (torch.stack(rows), torch.stack(real))
    with torch.no_grad():
        together = model(*inputs)
    for n, one in enumerate(logits):
        assert (together[n][inputs[1][n].bool()] - one).abs().max() < CLOSE
    model(*inputs, labels=torch.stack(labels)).loss_sum.backward()
    assert_same(gradients(model), expected)


def test_cached_generation_equals_the_full_forward(model: Transformer) -> None:
    small_ids(model)
    rows = [document(model.config, length, length).tolist() for length in (8, 12, 5)]
    options = {"max_new_tokens": 10, "eos_token_ids": ()}
    cached = torch.stack(list(generate(model, rows, **options)), 1)
    assert torch.equal(cached, torch.stack(list(generate(model, rows, use_cache=False, **options)), 1))
    for n, row in enumerate(rows):
        single = torch.stack(list(generate(model, row, use_cache=False, **options)), 1)
        assert torch.equal(single[0], cached[n]), "a padded row generates what it generates alone"


@pytest.mark.parametrize("wrong", ["no documents", "everything visible"])
def test_a_wrong_mask_is_noticed(model: Transformer, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """Mutants of the packed mask: each moves logits by far more than the bound above."""
    small_ids(model)
    row = packed([document(model.config, length, length) for length in (11, 16)])
    with torch.no_grad():
        right = model(row["input_ids"], document_ids=row["document_ids"])
    if wrong == "everything visible":
        monkeypatch.setattr(masks.AttentionMask, "dense", all_visible)
    options = {} if wrong == "no documents" else {"document_ids": row["document_ids"]}
    with torch.no_grad():
        different = model(row["input_ids"], **options)
    assert (different - right)[:, :27].abs().max() > 1e-3


def all_visible(mask: masks.AttentionMask, device: torch.device) -> Tensor:
    return torch.ones(1, 1, mask.seen.num_queries, mask.seen.num_keys, dtype=torch.bool, device=device)


@pytest.mark.parametrize("family", ["gpt2", "opt", "chatglm"])
def test_positions_that_run_on_are_noticed(family: str) -> None:
    """Where positions are absolute, a second document that does not begin at 0 computes something else."""
    model = load_model(golden_dir(family), family=family, dtype=torch.float32)
    row = packed([document(model.config, length, length) for length in (11, 16)])
    count = torch.arange(row["input_ids"].shape[1])[None]
    positions = torch.stack([count, count], 1) if family == "chatglm" else count
    with torch.no_grad():
        right = model(row["input_ids"], document_ids=row["document_ids"])
        different = model(row["input_ids"], document_ids=row["document_ids"], position_ids=positions)
    assert (different - right)[:, 11:27].abs().max() > 1e-3
