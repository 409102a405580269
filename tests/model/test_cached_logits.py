"""Logits with a key-value cache against those of the whole row, number by number: every family, and the options that
make a cache hard. Rows are padded on the left, longer than every window and than the trained length.

test_rows.py compares tokens; a token hides a difference that this sees.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.golden import golden_dir
from trainwright.model import families, generate
from trainwright.model.cache import KVCache
from trainwright.model.checkpoint import materialize
from trainwright.model.source import load_config
from trainwright.model.transformer import Transformer

DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}
GLM = {"mask_token_id": 150, "gmask_token_id": 151, "sop_token_id": 154, "eop_token_id": 155}
HARD: dict[str, tuple[str, dict[str, Any]]] = {
    "window of 3": ("mistral", {"sliding_window": 3}),
    "window of 1": ("mistral", {"sliding_window": 1}),
    "windows in some layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "window and experts": ("mixtral", {"sliding_window": 4}),
    "dynamic NTK": ("llama", DYNAMIC),
    "dynamic NTK, q and k norm": ("qwen3", DYNAMIC),
    "yarn": ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}}),
    "dynamic NTK and log-n by rows": ("qwen", {"seq_length": 8}),
    "log-n alone": ("qwen", {"seq_length": 8, "use_dynamic_ntk": False}),
    "banded layers": ("gpt2", {"banded_window": 4}),
    "350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "ALiBi of 6 heads": ("bloom", {"num_attention_heads": 6, "n_embed": 48}),
    "ALiBi of 5 heads": ("baichuan_13b", {"num_attention_heads": 5, "hidden_size": 60}),
    "positions divided": ("chatglm2", {"rope_ratio": 4, "rope_ratio_scales": "positions"}),
    "one KV head": ("llama", {"num_key_value_heads": 1, "head_dim": 24}),
}
PROMPTS = {"gMASK": (151, 154), "MASK": (150, 154), "no answer yet": (20, 21)}


def model_of(family: str, changes: dict[str, Any]) -> Transformer:
    keys = json.loads((golden_dir(family) / "config.json").read_text())
    config = load_config(keys | (GLM if family == "glm_130b" else {}) | changes, family)
    model = materialize(config, dtype=torch.float32, device="cpu").init_weights(1).eval()
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return model


@torch.no_grad()
def largest_difference(model: Transformer, rows: list[list[int]], said: Sequence[int] = range(30, 38)) -> float:
    """Over the tokens `said` and appended, the same for both, of logits with a cache and of the whole rows."""
    ids, mask = generate.pad_left(rows)
    cache, worst = KVCache(), 0.0
    for token in said:
        cached, whole = (generate._next_logits(model, ids, mask, kept) for kept in (cache, None))
        worst = max(worst, (cached - whole).abs().max().item() / max(1.0, whole.abs().max().item()))
        assert cache.length == ids.shape[1]
        ids = torch.cat([ids, torch.full_like(ids[:, :1], token)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return worst


def prompts(marks: tuple[int, int] | None) -> list[list[int]]:
    rows = [list(range(40, 40 + length)) for length in (13, 6, 9)]
    for row in rows if marks else ():
        row[len(row) // 2 : len(row) // 2 + 2] = marks
    return rows


@pytest.mark.parametrize("family", families.names())
def test_every_family(family: str) -> None:
    model = model_of(family, {})
    for marks in PROMPTS.values() if model.config.prefix else (None,):
        assert largest_difference(model, prompts(marks)) < 1e-5


@pytest.mark.parametrize("name", HARD)
def test_hard_options(name: str) -> None:
    assert largest_difference(model_of(*HARD[name]), prompts(None)) < 1e-5


@pytest.mark.parametrize("family", ["chatglm", "glm_130b"])
def test_an_answer_that_the_model_itself_begins(family: str) -> None:
    assert largest_difference(model_of(family, {}), prompts(None), [30, 151, 154, 31, 32]) < 1e-5


def test_a_stale_cache_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that were turned by the angles of a shorter row: kept, they move logits."""
    monkeypatch.setattr(generate, "_stale", lambda *_: False)
    assert largest_difference(model_of("llama", DYNAMIC), prompts(None)) > 1e-3


def test_the_cache_is_kept_where_angles_stay() -> None:
    """Qwen's angles change where a row passes 8 and 16 and 32 tokens, not in between."""
    model = model_of("qwen", {"seq_length": 8})
    cache = KVCache()
    counts: list[int] = []
    model.embed_tokens.register_forward_hook(lambda _m, args, _o: counts.append(args[0].shape[1]))
    for length in range(6, 20):
        generate._next_logits(model, torch.arange(40, 40 + length)[None], None, cache)
    assert counts == [6, 1, 1, 9, 1, 1, 1, 1, 1, 1, 1, 17, 1, 1]
