"""Follows docs/add_a_family.md literally: its file, its two table rows; then all that a family must do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from trainwright.model import families
from trainwright.model.checkpoint import load_config, load_model, materialize, save_model
from trainwright.model.generate import generate

PAGE = Path(__file__).parents[2] / "docs" / "add_a_family.md"
CONFIG: dict[str, Any] = {
    "model_type": "toy",
    "architectures": ["ToyForCausalLM"],
    "vocab_size": 50,
    "width": 32,
    "heads": 4,
    "kv_heads": 2,
    "depth": 2,
    "length": 64,
    "eos_token_id": 1,
}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's first block as the file it names, its second as the rows it names."""
    file, table = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "toy.py").write_text(file, encoding="utf-8")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    rows: dict[str, Any] = {}
    exec(table, rows)
    monkeypatch.setattr(families, "_WHERE", families._WHERE | rows["_WHERE"])
    monkeypatch.setattr(families, "_MODEL_TYPES", families._MODEL_TYPES | rows["_MODEL_TYPES"])
    families.get.cache_clear()
    yield
    families.get.cache_clear()


def reference(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """What Toy computes, written out for one row and nothing else."""
    heads, kv, dim = 4, 2, 8
    x = weights["toy.tokens.weight"][ids]
    angle = torch.arange(len(ids))[:, None] / 10000 ** (torch.arange(0, 4, 2) / 4)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[name]

    def turn(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x[..., :4].reshape(*x.shape[:-1], 2, 2).contiguous())
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([torch.view_as_real(pairs).flatten(-2), x[..., 4:]], -1)

    for n in range(2):
        p = f"toy.blocks.{n}."
        qkv = F.linear(norm(x, p + "norm1.weight"), weights[p + "qkv.weight"], weights[p + "qkv.bias"])
        q, k, v = qkv.split([heads * dim, kv * dim, kv * dim], -1)
        q, k = turn(q.view(-1, heads, dim)), turn(k.view(-1, kv, dim)).repeat_interleave(2, 1)
        v = v.view(-1, kv, dim).repeat_interleave(2, 1)
        scores = torch.einsum("snd,tnd->nst", q, k) / dim**0.5
        scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), float("-inf"))
        out = torch.einsum("nst,tnd->snd", scores.softmax(-1), v).flatten(1)
        x = x + F.linear(out, weights[p + "out.weight"])
        inner = F.relu(F.linear(norm(x, p + "norm2.weight"), weights[p + "up.weight"]))
        x = x + F.linear(inner, weights[p + "down.weight"])
    return norm(x, "toy.norm.weight") @ weights["toy.tokens.weight"].t()


@pytest.mark.usefixtures("toy")
def test_the_page(tmp_path: Path) -> None:
    config = load_config(CONFIG)
    assert config.family == "toy"
    assert load_config(families.get("toy").to_hf(config)) == config
    model = materialize(config, dtype=torch.float32, device="cpu").init_weights(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    save_model(model, tmp_path / "toy")
    assert json.loads((tmp_path / "toy" / "config.json").read_text()) == CONFIG
    weights = load_file(tmp_path / "toy" / "model.safetensors")
    assert weights["toy.blocks.0.qkv.weight"].shape == (64, 32)

    again = load_model(tmp_path / "toy")
    ids = torch.randint(0, 50, (1, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = again(ids)
    assert (logits[0] - reference(weights, ids[0])).abs().max() < 1e-4
    assert sum(p.numel() for p in again.parameters()) == config.num_parameters()
    with torch.no_grad():
        cached = list(generate(again, ids, max_new_tokens=5, eos_token_ids=()))
        plain = list(generate(again, ids, max_new_tokens=5, eos_token_ids=(), use_cache=False))
    assert cached == plain


def test_a_family_s_file_is_short() -> None:
    """One that needs more is missing a part (config.py), which all families would have."""
    for folder in families.__path__:
        for file in Path(folder).glob("*.py"):
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 200, file.name
