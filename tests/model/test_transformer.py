"""The decoder as others use it: built on no device, cut into stages, sharded by heads, compiled, initialised alike in
any layout, and long rows whose rotary angles depend on their length."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden import golden_dir
from tests.model.golden_case import GoldenCase
from trainwright.errors import UserError
from trainwright.model import families, folder
from trainwright.model.checkpoint import load_config, load_model, load_weights, materialize, save_model
from trainwright.model.config import DynamicNtkScaling, QwenNtkScaling, RopeConfig
from trainwright.model.generate import generate, pad_left
from trainwright.model.named import named_models
from trainwright.model.position import inverse_frequencies
from trainwright.model.shapes import parameter_shapes
from trainwright.model.transformer import Transformer

NAMED = [next(m for m in named_models() if m.family == family) for family in families.names()]
IN_TRANSFORMERS = ("bloom", "gpt2", "llama", "mistral", "mixtral", "opt", "qwen2", "qwen3", "qwen3_moe")


@pytest.mark.parametrize("model", NAMED, ids=lambda model: model.name)
def test_a_named_model_on_the_meta_device(model: Any) -> None:
    """A published size without its memory: names, shapes and the exact count are those of the tree."""
    config = load_config(model.name)
    with torch.device("meta"):
        built = Transformer(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    assert shapes == parameter_shapes(config)
    assert sum(parameter.numel() for parameter in built.parameters()) == config.num_parameters()


def small(family: str) -> dict[str, int]:
    """Overrides that make a named model tiny, in the family's own keys."""
    if family == "gpt2":
        return {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 1}
    if family == "bloom":
        return {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    sizes |= {"ffn_dim": 48} if family == "opt" else {"num_key_value_heads": 2, "intermediate_size": 48}
    sizes |= {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2} if family == "qwen3_moe" else {}
    return sizes | {"bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("family", IN_TRANSFORMERS)
def test_random_weights_of_a_named_model_load_in_transformers(family: str, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    name = next(model.name for model in named_models() if model.family == family)
    config = load_config(name, overrides=small(family))
    model = materialize(config, dtype=torch.float32, device="cpu").init_weights(1).eval()
    save_model(model, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.randint(3, 99, (2, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    config = load_config("llama-2-7b", overrides=small("llama"))
    whole = materialize(config, dtype=torch.float32, device="cpu").init_weights(5)
    stage = materialize(config, dtype=torch.float32, device="cpu").keep([1], embedding=False, head=True).init_weights(5)
    held = dict(whole.named_parameters())
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter, held[name]), name
    other = materialize(config, dtype=torch.float32, device="cpu").init_weights(6)
    assert not torch.equal(other.lm_head.weight, whole.lm_head.weight)
    assert whole.layers["0"].self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert whole.layers["0"].self_attn.o_proj.weight.std().item() == pytest.approx(0.01, rel=0.1)  # 0.02 / sqrt(2 x 2)


@pytest.mark.parametrize("family", families.names())
def test_stages_one_behind_the_other(family: str) -> None:
    """Two stages with parts removed compute what the whole does, and load their own weights from the same folder."""
    case = GoldenCase(golden_dir(family), family)
    layers = case.config.num_layers
    stages = []
    for keep, first in ((range(1), True), (range(1, layers), False)):
        stage = materialize(case.config, dtype=torch.float32, device="cpu")
        stage.keep(keep, embedding=first, head=not first).eval()
        load_weights(stage, case.folder)
        stages.append(stage)
    inputs = case.inputs()
    whole, parts = case.model(case.input_ids, **inputs), None
    if case.config.prefix is not None:  # later stages see no tokens, so they are told
        from trainwright.model.mask import prompt_parts

        prefix, positions = prompt_parts(case.input_ids, case.config.prefix, None)
        inputs = {"prefix_mask": prefix, "position_ids": positions, **inputs}
    with torch.no_grad():
        parts = stages[1](stages[0](case.input_ids, **inputs), **inputs)
    assert (parts - whole).abs().max() < 1e-6


@pytest.mark.parametrize("family", ["llama", "bloom", "qwen3", "chatglm", "mistral"])
def test_a_layer_that_holds_a_slice_of_the_heads(family: str) -> None:
    """Tensor parallelism's arithmetic: attention with half the heads' weights, twice, adds up to the whole."""
    case = GoldenCase(golden_dir(family), family)
    model, part = case.model, case.model.layers["0"].self_attn
    x = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(0))
    seen = model._visibility(case.input_ids, 24, None, case.inputs().get("prefix_mask"), 0, None, None)
    positions = model.positions(case.input_ids)
    context = model._contexts(x, seen, positions, slice(-24, None))["0"]
    with torch.no_grad():
        whole = part(x, context)
        total = torch.zeros_like(whole) - (part.o_proj.bias if part.o_proj.bias is not None else 0)
        kept = {name: getattr(part, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        slopes = model.alibi_slopes
        for half in range(2):
            for name, linear in kept.items():
                setattr(part, name, half_of(linear, half, dim=1 if name == "o_proj" else 0))
            if slopes is not None:
                model.alibi_slopes = slopes.chunk(2)[half]
            total += part(x, model._contexts(x, seen, positions, slice(-24, None))["0"])
    assert (total - whole).abs().max() < 1e-5


def half_of(linear: torch.nn.Linear, half: int, dim: int) -> torch.nn.Linear:
    weight = linear.weight.chunk(2, dim)[half]
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None)
    made.weight.copy_(weight)
    if linear.bias is not None:
        made.bias.copy_(linear.bias.chunk(2)[half] if dim == 0 else linear.bias)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "chatglm"])
def test_a_block_compiles_whole(family: str) -> None:
    """No graph break in a block, forward or backward (traced without a C++ compiler)."""
    case = GoldenCase(golden_dir(family), family)
    expected = case.run()[2]
    plain = {name: p.grad.clone() for name, p in case.model.named_parameters()}
    case.model.zero_grad()
    for key, layer in case.model.layers.items():
        case.model.layers[key] = torch.compile(layer, backend="aot_eager", fullgraph=True)
    out = case.model(case.input_ids, **case.inputs(), labels=case.labels)
    (out.loss_sum / out.num_tokens).backward()
    assert (out.loss_sum - expected.loss_sum).abs() < 1e-3
    for name, parameter in case.model.named_parameters():
        reference = plain[name.replace("_orig_mod.", "")]
        assert (parameter.grad - reference).abs().max() < 1e-5, name


def test_too_many_positions_are_refused_in_words() -> None:
    model = load_model(golden_dir("gpt2"))
    with pytest.raises(UserError, match="65 positions are more than the 64"):
        model(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(UserError, match="max_new_tokens"):
        list(generate(model, [1, 2, 3], max_new_tokens=62))


def test_hub_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a named id reaches for the hub, with its revision; a missing client is said in words."""
    asked: list[Any] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        return str(golden_dir("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_model("hf:some/model@v2").config.family == "llama"
    assert asked[0] == ("some/model", "v2")
    monkeypatch.setitem(__import__("sys").modules, "modelscope", None)
    with pytest.raises(UserError, match="pip install modelscope"):
        folder.resolve("modelscope:some/model")


# ---- rows longer than the trained length ------------------------------------------------------------------------


def test_qwen_alpha_by_powers_of_two() -> None:
    """alpha = 2^(ceil(log2(L / trained)) + 1) - 1, at least 1, exactly at the powers too."""
    rope = RopeConfig(16, scaling=QwenNtkScaling(8))
    lengths = torch.tensor([[1], [8], [9], [16], [17], [64], [65]])
    found = inverse_frequencies(rope, lengths)
    for length, row in zip(lengths.flatten().tolist(), found, strict=True):
        alpha = max(2 ** math.ceil(math.log2(length / 8) + 1) - 1, 1)
        base = 10000.0 * alpha ** (16 / 14)
        assert torch.allclose(row, 1.0 / base ** (torch.arange(0, 16, 2) / 16), rtol=1e-5)


def long_model(family: str, **changes: Any) -> Transformer:
    """A golden model whose trained length is 8."""
    model = load_model(golden_dir(family), family=family, dtype=torch.float32)
    layers = []
    for block, module in zip(model.config.layers, model.layers.values(), strict=True):
        rope = replace(block.self_attn.rope, **changes)
        logn = 8 if block.self_attn.logn_length else None
        layers.append(replace(block, self_attn=replace(block.self_attn, rope=rope, logn_length=logn)))
        module.self_attn.rope = rope
    model.config = replace(model.config, layers=tuple(layers))
    return model


@pytest.mark.parametrize(
    ("family", "scaling"), [("qwen", QwenNtkScaling(8)), ("llama", DynamicNtkScaling(2.0, 8))], ids=["qwen", "llama"]
)
def test_rows_beyond_the_trained_length(family: str, scaling: Any) -> None:
    """Cached generation equals the full forward, and Qwen's padded rows equal each row alone, while angles change."""
    model = long_model(family, scaling=scaling)
    rows = [list(range(10, 10 + length)) for length in (20, 6, 13)]
    options: dict[str, Any] = {"max_new_tokens": 14, "eos_token_ids": ()}
    for row in rows:
        cached = torch.stack(list(generate(model, row, **options)))
        assert torch.equal(cached, torch.stack(list(generate(model, row, use_cache=False, **options))))
    if family == "qwen":
        ids, real = pad_left(rows)
        with torch.no_grad():
            together = model(ids, real)
            for n, row in enumerate(rows):
                alone = model(torch.tensor([row]))[0]
                assert (together[n, -len(row) :] - alone).abs().max() < 1e-5


def test_qwen_beyond_its_length_as_published() -> None:
    """Scores of one layer with the stretched base and log-n, written out; neither acts in training."""
    model = long_model("qwen", scaling=QwenNtkScaling(8))
    part = model.layers["0"].self_attn
    ids = torch.randint(4, 150, (1, 20), generator=torch.Generator().manual_seed(0))
    taken: list[Tensor] = []
    part.core.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    with torch.no_grad():
        model(ids)
        x = model.layers["0"].input_layernorm(model.embed_tokens(ids))
    q = F.linear(x, part.q_proj.weight, part.q_proj.bias).view(20, 4, 16)

    def turned(base: float) -> Tensor:
        angle = torch.arange(20)[:, None] / base ** (torch.arange(0, 16, 2) / 16)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = q.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    logn = torch.tensor([math.log(p + 1, 8) if p + 1 > 8 else 1.0 for p in range(20)])
    stretched = 10000.0 * 7 ** (16 / 14)  # 20 tokens of 8: alpha = 2^(ceil(log2(2.5)) + 1) - 1
    assert (taken[0][0] - turned(stretched) * logn[:, None, None]).abs().max() < 1e-5
    model.train()
    model(ids)
    assert (taken[1][0] - turned(10000.0)).abs().max() < 1e-5
