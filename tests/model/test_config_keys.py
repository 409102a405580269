"""Every key of the published config classes: read, refused in one line, or known to change no arithmetic.

A key that is ignored in silence is a model that computes something else. New keys of a new transformers fail here.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.golden import golden_dir
from trainwright.errors import UserError
from trainwright.model import families
from trainwright.model.config import LinearScaling, ModelConfig
from trainwright.model.source import load_config, spelled_config

HF = {"llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
HF |= {"qwen3_moe": "Qwen3Moe", "gpt2": "GPT2", "bloom": "Bloom", "opt": "OPT"}
MUTE = {
    "about the file": "architectures auto_map dtype model_type tokenizer_class torch_dtype transformers_version "
    "_from_model_config _name_or_path tokenizer_type prefix",
    "what a call returns": "output_attentions output_hidden_states output_router_logits return_dict use_cache "
    "use_return_dict",
    "heads for other tasks": "id2label label2id problem_type summary_activation summary_first_dropout "
    "summary_proj_to_labels summary_type summary_use_proj unk_token_id",
    "dropout, which is not applied (docs/families.md)": "activation_dropout attention_dropout attn_dropout_prob "
    "attn_pdrop dropout embd_pdrop emb_dropout_prob hidden_dropout layerdrop resid_pdrop",
    "how the same numbers are computed": "apply_query_key_layer_scaling attention_softmax_in_fp32 bf16 "
    "bias_dropout_fusion chunk_size_feed_forward fp16 fp32 fp32_residual_connection gradient_checkpointing "
    "masked_softmax_fusion model_parallel_size onnx_safe pretraining_tp reorder_and_upcast_attn skip_bias_add "
    "skip_bias_add_qkv slow_but_exact use_flash_attn",
    "read by nothing in the published code": "n_ctx n_inner offset_alibi",
}
SILENT = {key for keys in MUTE.values() for key in keys.split()}
OF_FAMILY = {
    "qwen": {"max_position_embeddings"},  # seq_length is what counts
    "baichuan2_7b": {"model_max_length"},  # beside max_position_embeddings
}
WINDOWS = {"layer_types": None, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
AWAKE = {"qwen2": WINDOWS, "qwen3": WINDOWS, "qwen3_moe": WINDOWS | {"max_window_layers": 0, "mlp_only_layers": [1]}}
"""Options without which others mean nothing."""


def published(family: str) -> dict[str, Any]:
    """The keys of the family's golden config.json, and all of its class in transformers with their defaults."""
    keys = json.loads((golden_dir(family) / "config.json").read_text())
    if family in HF:
        transformers = pytest.importorskip("transformers")
        keys = getattr(transformers, HF[family] + "Config")(**keys).to_dict()
    return keys | AWAKE.get(family, {})


def another(key: str, value: Any) -> Any:
    """Any other value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return 2 * value or 1
    if isinstance(value, str):
        return "gelu" if "act" in key else value + "x"
    if isinstance(value, list):
        return [*value, 0]
    return {**value, "factor": 3.0} if isinstance(value, dict) else 6


@pytest.mark.parametrize("family", families.names())
def test_no_key_is_ignored_in_silence(family: str) -> None:
    keys = published(family)
    before = load_config(keys, family)
    skipped = SILENT | OF_FAMILY.get(family, set())
    mute = [key for key in keys.keys() - skipped if read(keys | {key: another(key, keys[key])}, family) == before]
    assert not mute, "these change nothing and say nothing"


def read(keys: dict[str, Any], family: str) -> ModelConfig | UserError:
    try:
        return load_config(keys, family)
    except UserError as error:
        return error


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "fewer bits": ("llama", {"quantization_config": {"quant_method": "fp8"}}, "take the unquantized ones"),
    "encoder": ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder=True"),
    "z loss": ("baichuan2_7b", {"z_loss_weight": 1e-4}, "z_loss_weight"),
    "jitter": ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
    "layer by layer scale": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    "cross attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    "prefix tuning": ("chatglm", {"pre_seq_len": 8}, "pre_seq_len"),
    "int4 chatglm": ("chatglm2", {"quantization_bit": 4}, "quantization_bit"),
    "other rotary": ("chatglm2", {"original_rope": False}, "original_rope"),
    "two readings": ("chatglm2", {"rope_ratio": 16, "padded_vocab_size": 65024}, "rope_ratio_scales"),
    "other biases": ("qwen", {"no_bias": False}, "no_bias"),
    "norms before": ("glm_130b", {"layernorm_order": "pre"}, "layernorm_order"),
    "norms without weights": ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
    "longrope": (
        "llama",
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}},
        "linear, dynamic, llama3",
    ),
    "unknown scaling key": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2, "alpha": 9}}, "alpha=9"),
    "two rope_thetas": ("llama", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3"}}, "rope_theta=10000.0"),
    "two scalings": ("llama", {"rope_parameters": {"factor": 4.0}}, "differ in factor"),
    "layers of another kind": ("qwen2", {"layer_types": ["linear_attention"] * 3}, "'linear_attention'"),
    "too many layer types": (
        "qwen3",
        {"layer_types": ["full_attention"] * 4},
        "names 4 layers, num_hidden_layers is 3",
    ),
    "windows without a window": ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "set use_sliding_window"),
    "some windows": (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        "max_window_layers to 0",
    ),
    "mixed Mistral": ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    "pad beyond the table": (
        "llama",
        {"pad_token_id": 160},
        "pad_token_id=160 of config.json is beyond vocab_size=160",
    ),
    "uneven heads": ("gpt2", {"n_head": 5}, "64 is no multiple of 5 attention heads"),
    "uneven groups": ("llama", {"num_key_value_heads": 3}, "4 attention heads are no multiple of 3"),
    "odd heads": ("llama", {"head_dim": 15}, "pairs, which 15 dimensions are not"),
    "too few experts": ("mixtral", {"num_experts_per_tok": 5}, "5 experts a token of 4"),
    "a size with a point": ("llama", {"vocab_size": 160.0}, "160.0, not a whole number"),
    "a word for a number": ("gpt2", {"layer_norm_epsilon": "1e-5"}, "eps is '1e-5', not a number"),
    "no number": ("llama", {"rms_norm_eps": float("nan")}, "eps is nan, not a number"),
    "half a token": ("baichuan_7b", {"pad_token_id": 0.5}, "padding_idx is 0.5, not a whole number"),
    "a flag for a window": ("mistral", {"sliding_window": True}, "window is True, not a whole number"),
    "a window of nothing": ("mistral", {"sliding_window": 0}, "1 is the least"),
    "no heads": ("bloom", {"num_attention_heads": -1}, "no multiple of -1"),
    "more than a head": ("qwen3", {"partial_rotary_factor": 2.0}, "32 rotated dimensions in heads of 16"),
    "less than nothing": ("qwen", {"rotary_pct": -0.5}, "which -8 dimensions are not"),
    "trained on nothing": ("qwen", {"seq_length": 1}, "2 is the least"),
    "no positions": ("llama", {"max_position_embeddings": -1}, "-1 positions"),
    "no layers": ("llama", {"num_hidden_layers": 0}, "it has 0 layers"),
    "a list for a type": ("llama", {"model_type": ["llama"]}, "is not a name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name: str) -> None:
    family, changes, words = REFUSED[name]
    keys = json.loads((golden_dir(family) / "config.json").read_text()) | changes
    with pytest.raises(UserError) as caught:
        load_config(keys, None if "model_type" in changes else family)
    assert words in str(caught.value)


def test_baichuan_without_its_size_is_told_so() -> None:
    with pytest.raises(UserError, match="no 'hidden_size', which tells the family"):
        load_config({"model_type": "baichuan"})


def test_keys_that_are_not_there_mean_what_the_published_code_takes() -> None:
    """Null is not the same as absent where the code says so: Mistral's window."""
    for family, missing in (("mistral", {"sliding_window"}), ("mixtral", {"rope_theta", "rms_norm_eps"})):
        transformers = pytest.importorskip("transformers")
        keys = json.loads((golden_dir(family) / "config.json").read_text())
        keys = {key: value for key, value in keys.items() if key not in missing}
        full = getattr(transformers, HF[family] + "Config")(**keys).to_dict()
        assert load_config(keys) == load_config(full)
    keys = json.loads((golden_dir("mistral") / "config.json").read_text()) | {"sliding_window": None}
    assert load_config(keys).layers[0].self_attn.mask.window is None
    assert load_config(keys | {"rms_norm_eps": None}).norm.eps == 1e-6


def test_rope_ratio_means_what_it_says() -> None:
    keys = json.loads((golden_dir("chatglm2") / "config.json").read_text()) | {"padded_vocab_size": 65024}
    rope = {
        scales: load_config(keys | {"rope_ratio": 16, "rope_ratio_scales": scales}).layers[0].self_attn.rope
        for scales in ("base", "positions")
    }
    assert (rope["base"].theta, rope["base"].scaling) == (160000.0, None)
    assert (rope["positions"].theta, rope["positions"].scaling) == (10000.0, LinearScaling(16))
    assert load_config(keys | {"rope_ratio": 500, "padded_vocab_size": 151552}).layers[0].self_attn.rope.theta == 5e6


CHANGED: dict[str, dict[str, Any]] = {
    "gpt2": {"banded_window": 8, "tie_word_embeddings": False},  # three layers: the last one is not banded
    "bloom": {"tie_word_embeddings": False},
    "chatglm2": {"rope_ratio": 16, "rope_ratio_scales": "positions"},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    },
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "mlp_only_layers": [1]},
    "llama": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
}


@pytest.mark.parametrize("family", CHANGED)
def test_options_survive_being_written(family: str) -> None:
    """From the tree alone, without the config.json that it came from."""
    keys = json.loads((golden_dir(family) / "config.json").read_text()) | CHANGED[family]
    config = load_config(keys, family)
    assert spelled_config(config) == keys
    assert load_config(families.get(family).to_hf(config), family) == config
