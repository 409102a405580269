"""Random configurations against transformers itself: logits and gradients, with left padding, through saved folders.

The golden folders fix one case a family; here hypothesis varies heads, head_dim, layers, biases, tying, rotary scaling,
windows and experts. What transformers writes (its own config spelling, its own names) is what is read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainwright.model import families
from trainwright.model.checkpoint import load_model
from trainwright.model.shapes import parameter_shapes

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
LENGTH = 24
Draw = Callable[[st.SearchStrategy[Any]], Any]


def rope_scaling(draw: Draw) -> dict[str, Any] | None:
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn"]))
    theta = draw(st.sampled_from([10000.0, 500000.0]))
    options: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "llama3": {
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
        "yarn": {
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            **({"truncate": False} if draw(st.booleans()) else {}),
        },
    }
    return {"rope_type": kind, "rope_theta": theta, **options[kind]}


def llama_shape(draw: Draw) -> dict[str, Any]:
    kv = draw(st.sampled_from([1, 2, 3]))
    head_dim = draw(st.sampled_from([8, 16]))
    heads = kv * draw(st.sampled_from([1, 2]))
    return {
        "vocab_size": 99,
        "hidden_size": heads * 8,
        "head_dim": head_dim,
        "intermediate_size": draw(st.sampled_from([24, 40])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 16,
        "rope_parameters": rope_scaling(draw),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
    }


def llama(draw: Draw) -> Any:
    bias = {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    return transformers.LlamaConfig(**llama_shape(draw), **bias)


def mistral(draw: Draw) -> Any:
    return transformers.MistralConfig(**llama_shape(draw), sliding_window=draw(st.sampled_from([None, 4])))


def qwen2(draw: Draw) -> Any:
    shape = llama_shape(draw)
    shape["hidden_size"] = shape["num_attention_heads"] * shape.pop("head_dim")
    return transformers.Qwen2Config(**shape, **windows(draw))


def windows(draw: Draw) -> dict[str, Any]:
    return {
        "use_sliding_window": draw(st.booleans()),
        "sliding_window": 4,
        "max_window_layers": draw(st.integers(0, 2)),
    }


def qwen3(draw: Draw) -> Any:
    return transformers.Qwen3Config(**llama_shape(draw), attention_bias=draw(st.booleans()), **windows(draw))


def mixtral(draw: Draw) -> Any:
    shape = llama_shape(draw)
    experts = {"num_local_experts": 4, "num_experts_per_tok": draw(st.integers(1, 3))}
    return transformers.MixtralConfig(**shape, **experts, sliding_window=draw(st.sampled_from([None, 4])))


def qwen3_moe(draw: Draw) -> Any:
    return transformers.Qwen3MoeConfig(
        **llama_shape(draw),
        num_experts=4,
        num_experts_per_tok=draw(st.integers(1, 3)),
        moe_intermediate_size=16,
        norm_topk_prob=draw(st.booleans()),
        mlp_only_layers=draw(st.sampled_from([[], [0]])) if draw(st.booleans()) else [],
        decoder_sparse_step=1,
        use_sliding_window=draw(st.booleans()),
        sliding_window=4,
    )


def gpt2(draw: Draw) -> Any:
    heads = draw(st.sampled_from([1, 2, 4]))
    return transformers.GPT2Config(
        vocab_size=99,
        n_positions=32,
        n_embd=heads * 8,
        n_head=heads,
        n_layer=draw(st.integers(1, 3)),
        n_inner=draw(st.sampled_from([None, 24])),
        activation_function=draw(st.sampled_from(["gelu_new", "gelu", "relu"])),
        tie_word_embeddings=draw(st.booleans()),
        reorder_and_upcast_attn=draw(st.booleans()),
        bos_token_id=1,
        eos_token_id=1,
    )


def bloom(draw: Draw) -> Any:
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    return transformers.BloomConfig(
        vocab_size=99,
        hidden_size=heads * 8,
        n_head=heads,
        n_layer=draw(st.integers(1, 3)),
        apply_residual_connection_post_layernorm=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


def opt(draw: Draw) -> Any:
    heads, before = draw(st.sampled_from([1, 2, 4])), draw(st.booleans())
    return transformers.OPTConfig(
        vocab_size=99,
        hidden_size=heads * 8,
        word_embed_proj_dim=draw(st.sampled_from([heads * 8, 8])),
        ffn_dim=24,
        num_attention_heads=heads,
        num_hidden_layers=draw(st.integers(1, 3)),
        do_layer_norm_before=before,
        enable_bias=draw(st.booleans()),
        max_position_embeddings=32,
    )


BUILDERS = {
    builder.__name__: builder for builder in (llama, mistral, qwen2, qwen3, mixtral, qwen3_moe, gpt2, bloom, opt)
}
EXPERTS = ("mixtral", "qwen3_moe")


def padded_rows() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(4, 99, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    real[1, :4] = 0
    positions = (real.cumsum(1) - 1).clamp(min=0)
    return ids, real, positions


@pytest.mark.parametrize("family", BUILDERS)
def test_logits_and_gradients(family: str) -> None:
    @given(st.data())
    @settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
    def compare(data: st.DataObject) -> None:
        compare_with(BUILDERS[family](data.draw), family)

    compare()


SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
QWEN_MOE = SMALL | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
YARN = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e6, "original_max_position_embeddings": 8}
UNUSUAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one KV head, wide heads, all biases": (
        "llama",
        "LlamaConfig",
        SMALL | {"num_key_value_heads": 1, "head_dim": 24, "attention_bias": True, "mlp_bias": True},
    ),
    "yarn with its weights": (
        "llama",
        "LlamaConfig",
        SMALL | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 16, "beta_slow": 2}},
    ),
    "windows by layer": (
        "qwen3",
        "Qwen3Config",
        SMALL
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "num_key_value_heads": 2}
        | {"use_sliding_window": True, "sliding_window": 5, "head_dim": 16},
    ),
    "every second layer sparse": (
        "qwen3_moe",
        "Qwen3MoeConfig",
        QWEN_MOE | {"decoder_sparse_step": 2, "num_key_value_heads": 4},
    ),
    "dense layers by name, windows": (
        "qwen3_moe",
        "Qwen3MoeConfig",
        QWEN_MOE
        | {"mlp_only_layers": [1], "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 5}
        | {"num_key_value_heads": 1},
    ),
    "350m": (
        "opt",
        "OPTConfig",
        {"vocab_size": 99, "hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 3}
        | {"num_attention_heads": 4, "do_layer_norm_before": False, "max_position_embeddings": 32},
    ),
    "no last norm": (
        "opt",
        "OPTConfig",
        {"vocab_size": 99, "hidden_size": 32, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"_remove_final_layer_norm": True, "max_position_embeddings": 32, "word_embed_proj_dim": 32},
    ),
    "14 heads, a head of its own": (
        "bloom",
        "BloomConfig",
        {"vocab_size": 99, "hidden_size": 56, "n_head": 14, "n_layer": 2, "tie_word_embeddings": False},
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_configurations(name: str) -> None:
    family, made_by, keys = UNUSUAL[name]
    compare_with(getattr(transformers, made_by)(**keys), family)


def compare_with(config: Any, family: str) -> None:
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_model(folder, dtype=torch.float32)
    assert ours.config.family == family
    assert ours.config.num_parameters() == sum(p.numel() for p in theirs.parameters())
    check(theirs, ours, gradients=family not in EXPERTS)


def check(theirs: Any, ours: Any, *, gradients: bool) -> None:
    ids, real, positions = padded_rows()
    extra = {} if theirs.config.model_type in ("bloom", "opt") else {"position_ids": positions}
    expected = theirs(ids, attention_mask=real, **extra).logits
    given_ = ours(ids, real)
    scale = max(1.0, expected.abs().max().item())
    assert (given_ - expected)[real.bool()].abs().max().item() / scale < 1e-4
    if not gradients:
        return
    weight = real[..., None].float() * torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    (given_ * weight).sum().backward()
    held = dict(theirs.named_parameters())
    mine = dict(ours.named_parameters())
    shapes = parameter_shapes(ours.config)
    family = families.get(ours.config.family)
    for entry in family.weights(ours.config):
        full = [find(held, name) for name in entry.theirs]
        for name, gradient in zip(entry.ours, entry.to_ours(full, [shapes[n] for n in entry.ours]), strict=True):
            floor = max(gradient.abs().max().item(), 0.1)  # K biases without rotary have none but noise
            assert (mine[name].grad - gradient).abs().max().item() / floor < 2e-4, name


def find(held: dict[str, Any], name: str) -> Tensor:
    """The gradient of the parameter whose name ends so: transformers puts its own prefix before published names."""
    found = [p for full, p in held.items() if full == name or full.endswith("." + name)]
    assert len(found) == 1, name
    return found[0].grad if found[0].grad is not None else torch.zeros_like(found[0])
