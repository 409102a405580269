"""Named models: what `model.config: qwen-7b` means, with exact parameter counts, context, licence and template.

Owns the published sizes, nothing else: a family turns these keys into a tree. No torch. Counts are checked against the
published ones by tests/model/test_named.py.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from trainwright.errors import UserError
from trainwright.model import families


@dataclass(frozen=True)
class NamedModel:
    """A published model: its family and the keys of its config.json that matter."""

    name: str
    family: str
    keys: dict[str, Any]
    licence: str
    template: str

    @property
    def parameters(self) -> int:
        return families.get(self.family).from_hf(self.keys).num_parameters()

    @property
    def context(self) -> int:
        return families.get(self.family).from_hf(self.keys).max_position_embeddings

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "parameters": self.parameters, "context": self.context}


_LLAMA1 = ("LLaMA, research only", "alpaca")
_LLAMA2 = ("Llama 2 Community", "llama2")
_LLAMA3 = ("Llama 3 Community", "llama3")
_LLAMA31 = ("Llama 3.1 Community", "llama3")
_LLAMA32 = ("Llama 3.2 Community", "llama3")
_APACHE_MISTRAL = ("Apache-2.0", "mistral")
_APACHE_QWEN = ("Apache-2.0", "chatml")


def _llama(hidden: int, width: int, layers: int, heads: int, kv: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv or heads,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def _llama1(hidden: int, width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return _llama(hidden, width, layers, heads, **{"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, **more})


def _llama3(hidden: int, width: int, layers: int, heads: int, factor: float = 0, **more: Any) -> dict[str, Any]:
    longer: dict[str, Any] = {}
    if factor:
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        longer["rope_scaling"] = {**scaling, "original_max_position_embeddings": 8192}
    ids = {"bos_token_id": 128000, "eos_token_id": 128001}
    length = 131072 if factor else 8192
    both = {"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": length, **longer, **ids}
    return _llama(hidden, width, layers, heads, 8, **both, **more)


def _baichuan(hidden: int, width: int, layers: int, vocab: int, length_key: str) -> dict[str, Any]:
    second = {"z_loss_weight": 0} if vocab == 125696 else {}
    keys = _llama1(hidden, width, layers, hidden // 128, vocab_size=vocab, pad_token_id=0, **second)
    keys.pop("max_position_embeddings")
    keys.pop("num_key_value_heads")
    return {**keys, length_key: 4096}


def _bloom(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    sizes = {"vocab_size": 250880, "hidden_size": hidden, "n_layer": layers, "n_head": heads}
    return {**sizes, "seq_length": 2048, "layer_norm_epsilon": 1e-5, **ids}


def _qwen(hidden: int, width: int, layers: int, vocab: int, trained: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "kv_channels": 128,
        "seq_length": trained,
        "layer_norm_epsilon": 1e-6,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "no_bias": True,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    }


def _qwen25(hidden: int, width: int, layers: int, heads: int, kv: int, *, tied: bool) -> dict[str, Any]:
    small = tied or hidden == 2048
    return _llama(
        hidden,
        width,
        layers,
        heads,
        kv,
        vocab_size=151936 if small else 152064,
        max_position_embeddings=32768 if small else 131072,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        tie_word_embeddings=tied,
        bos_token_id=151643,
        eos_token_id=151643,
    )


def _qwen3(hidden: int, width: int, layers: int, heads: int, kv: int = 8, **more: Any) -> dict[str, Any]:
    fixed = {"vocab_size": 151936, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
    ids = {"bos_token_id": 151643, "eos_token_id": 151645}
    return _llama(hidden, width, layers, heads, kv, **{**fixed, **ids, "max_position_embeddings": 40960, **more})


def _qwen3_moe(hidden: int, layers: int, heads: int, width: int) -> dict[str, Any]:
    experts = {"moe_intermediate_size": width, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
    return _qwen3(hidden, 3 * hidden, layers, heads, 4, decoder_sparse_step=1, mlp_only_layers=[], **experts)


def _gpt(hidden: int, layers: int, heads: int, length: int = 2048) -> dict[str, Any]:
    sizes = {"vocab_size": 50257, "n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": length}
    return {**sizes, "layer_norm_epsilon": 1e-5, "bos_token_id": 50256, "eos_token_id": 50256}


def _opt(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 50272, "hidden_size": hidden, "ffn_dim": 4 * hidden, "num_hidden_layers": layers}
    ids = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    return {**sizes, "num_attention_heads": heads, "max_position_embeddings": 2048, **ids, **more}


_CHATGLM = {
    "vocab_size": 130528,
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "num_layers": 28,
    "num_attention_heads": 32,
    "layernorm_epsilon": 1e-5,
    "max_sequence_length": 2048,
    "position_encoding_2d": True,
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "pad_token_id": 3,
    "tie_word_embeddings": True,
}
_CHATGLM2 = {
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "num_layers": 28,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
    "layernorm_epsilon": 1e-5,
    "seq_length": 32768,
    "original_rope": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GLM_130B = {
    "vocab_size": 150528,
    "hidden_size": 12288,
    "inner_hidden_size": 32768,
    "num_layers": 70,
    "num_attention_heads": 96,
    "max_sequence_length": 2048,
    "layernorm_order": "post",
}
_B7, _B13 = (4096, 11008, 32), (5120, 13696, 40)
_L7, _L13 = (4096, 11008, 32, 32), (5120, 13824, 40, 40)
_MIXTRAL: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
_MISTRAL = (4096, 14336, 32, 32, 8)
_QWEN_LICENCE = ("Tongyi Qianwen", "qwen")
_GPT3 = ("sizes of the paper, no weights", "alpaca")
_OPT = ("OPT-175B, research only", "alpaca")
_BLOOM = ("BigScience RAIL 1.0", "bloomz")

_TABLE: list[tuple[str, str, dict[str, Any], tuple[str, str]]] = [
    ("facebook/llama-7b", "llama", _llama1(*_L7), _LLAMA1),
    ("facebook/llama-13b", "llama", _llama1(*_L13), _LLAMA1),
    ("facebook/llama-30b", "llama", _llama1(6656, 17920, 60, 52), _LLAMA1),
    ("facebook/llama-65b", "llama", _llama1(8192, 22016, 80, 64), _LLAMA1),
    ("meta-llama/Llama-2-7b", "llama", _llama(*_L7), _LLAMA2),
    ("meta-llama/Llama-2-7b-chat", "llama", _llama(*_L7), _LLAMA2),
    ("meta-llama/Llama-2-13b", "llama", _llama(*_L13), _LLAMA2),
    ("meta-llama/Llama-2-13b-chat", "llama", _llama(*_L13), _LLAMA2),
    ("meta-llama/Llama-2-70b", "llama", _llama(8192, 28672, 80, 64, 8), _LLAMA2),
    ("meta-llama/Meta-Llama-3-8B", "llama", _llama3(4096, 14336, 32, 32), _LLAMA3),
    ("meta-llama/Meta-Llama-3-70B", "llama", _llama3(8192, 28672, 80, 64), _LLAMA3),
    ("meta-llama/Llama-3.1-8B", "llama", _llama3(4096, 14336, 32, 32, 8.0), _LLAMA31),
    ("meta-llama/Llama-3.1-70B", "llama", _llama3(8192, 28672, 80, 64, 8.0), _LLAMA31),
    ("meta-llama/Llama-3.1-405B", "llama", _llama3(16384, 53248, 126, 128, 8.0), _LLAMA31),
    ("meta-llama/Llama-3.2-1B", "llama", _llama3(2048, 8192, 16, 32, 32.0, tie_word_embeddings=True), _LLAMA32),
    (
        "meta-llama/Llama-3.2-3B",
        "llama",
        _llama3(3072, 8192, 28, 24, 32.0, head_dim=128, tie_word_embeddings=True),
        _LLAMA32,
    ),
    ("FlagAlpha/Llama2-Chinese-7b-Chat", "llama", _llama(*_L7), _LLAMA2),
    ("FlagAlpha/Llama2-Chinese-13b-Chat", "llama", _llama(*_L13), _LLAMA2),
    ("idea-ccnl/ziya-llama-13b-v1", "llama", _llama1(*_L13, vocab_size=39424), ("GPL-3.0", "alpaca")),
    ("linly-ai/chinese-llama-2-7b", "llama", _llama(*_L7, vocab_size=40076), _LLAMA2),
    ("linly-ai/chinese-llama-2-13b", "llama", _llama(*_L13, vocab_size=40076), _LLAMA2),
    ("THUDM/chatglm-6b-v1.1", "chatglm", _CHATGLM, ("ChatGLM-6B", "chatglm")),
    ("THUDM/chatglm2-6b", "chatglm2", _CHATGLM2, ("ChatGLM2-6B", "chatglm2")),
    ("THUDM/chatglm3-6b", "chatglm2", _CHATGLM2 | {"seq_length": 8192}, ("ChatGLM3-6B", "chatglm2")),
    ("THUDM/glm-130b", "glm_130b", _GLM_130B, ("GLM-130B, research only", "chatglm")),
    ("bigscience/bloom-560m", "bloom", _bloom(1024, 24, 16), _BLOOM),
    ("bigscience/bloom-1b1", "bloom", _bloom(1536, 24, 16), _BLOOM),
    ("bigscience/bloom-1b7", "bloom", _bloom(2048, 24, 16), _BLOOM),
    ("bigscience/bloom-3b", "bloom", _bloom(2560, 30, 32), _BLOOM),
    ("bigscience/bloom-7b1", "bloom", _bloom(4096, 30, 32), _BLOOM),
    ("bigscience/bloomz-7b1", "bloom", _bloom(4096, 30, 32), _BLOOM),
    ("bigscience/bloomz-7b1-mt", "bloom", _bloom(4096, 30, 32), _BLOOM),
    ("bigscience/bloom-176b", "bloom", _bloom(14336, 70, 112), _BLOOM),
    ("qwen/qwen-1_8b", "qwen", _qwen(2048, 11008, 24, 151936, 8192), _QWEN_LICENCE),
    ("qwen/qwen-7b", "qwen", _qwen(4096, 22016, 32, 151936, 8192), _QWEN_LICENCE),
    ("qwen/qwen-7b-chat", "qwen", _qwen(4096, 22016, 32, 151936, 8192), _QWEN_LICENCE),
    ("qwen/qwen-14b", "qwen", _qwen(5120, 27392, 40, 152064, 2048), _QWEN_LICENCE),
    ("qwen/qwen-14b-chat", "qwen", _qwen(5120, 27392, 40, 152064, 2048), _QWEN_LICENCE),
    ("qwen/qwen-72b", "qwen", _qwen(8192, 49152, 80, 152064, 32768) | {"rotary_emb_base": 1000000}, _QWEN_LICENCE),
    ("Qwen/Qwen2.5-0.5B", "qwen2", _qwen25(896, 4864, 24, 14, 2, tied=True), _APACHE_QWEN),
    ("Qwen/Qwen2.5-1.5B", "qwen2", _qwen25(1536, 8960, 28, 12, 2, tied=True), _APACHE_QWEN),
    ("Qwen/Qwen2.5-3B", "qwen2", _qwen25(2048, 11008, 36, 16, 2, tied=True), ("Qwen Research", "chatml")),
    ("Qwen/Qwen2.5-7B", "qwen2", _qwen25(3584, 18944, 28, 28, 4, tied=False), _APACHE_QWEN),
    ("Qwen/Qwen2.5-14B", "qwen2", _qwen25(5120, 13824, 48, 40, 8, tied=False), _APACHE_QWEN),
    ("Qwen/Qwen2.5-32B", "qwen2", _qwen25(5120, 27648, 64, 40, 8, tied=False), _APACHE_QWEN),
    ("Qwen/Qwen2.5-72B", "qwen2", _qwen25(8192, 29568, 80, 64, 8, tied=False), ("Qwen", "chatml")),
    ("Qwen/Qwen3-0.6B", "qwen3", _qwen3(1024, 3072, 28, 16, tie_word_embeddings=True), _APACHE_QWEN),
    ("Qwen/Qwen3-1.7B", "qwen3", _qwen3(2048, 6144, 28, 16, tie_word_embeddings=True), _APACHE_QWEN),
    ("Qwen/Qwen3-4B", "qwen3", _qwen3(2560, 9728, 36, 32, tie_word_embeddings=True), _APACHE_QWEN),
    ("Qwen/Qwen3-8B", "qwen3", _qwen3(4096, 12288, 36, 32), _APACHE_QWEN),
    ("Qwen/Qwen3-14B", "qwen3", _qwen3(5120, 17408, 40, 40), _APACHE_QWEN),
    ("Qwen/Qwen3-32B", "qwen3", _qwen3(5120, 25600, 64, 64), _APACHE_QWEN),
    ("Qwen/Qwen3-30B-A3B", "qwen3_moe", _qwen3_moe(2048, 48, 32, 768), _APACHE_QWEN),
    ("Qwen/Qwen3-235B-A22B", "qwen3_moe", _qwen3_moe(4096, 94, 64, 1536), _APACHE_QWEN),
    (
        "mistralai/Mistral-7B-v0.1",
        "mistral",
        _llama(*_MISTRAL, max_position_embeddings=32768, sliding_window=4096),
        _APACHE_MISTRAL,
    ),
    (
        "mistralai/Mistral-7B-v0.3",
        "mistral",
        _llama(*_MISTRAL, vocab_size=32768, max_position_embeddings=32768, rope_theta=1e6, sliding_window=None),
        _APACHE_MISTRAL,
    ),
    (
        "mistralai/Mixtral-8x7B-v0.1",
        "mixtral",
        _llama(*_MISTRAL, max_position_embeddings=32768, rope_theta=1e6, **_MIXTRAL),
        _APACHE_MISTRAL,
    ),
    ("openai/gpt2", "gpt2", _gpt(768, 12, 12, 1024), ("MIT", "alpaca")),
    ("openai/gpt2-medium", "gpt2", _gpt(1024, 24, 16, 1024), ("MIT", "alpaca")),
    ("openai/gpt2-large", "gpt2", _gpt(1280, 36, 20, 1024), ("MIT", "alpaca")),
    ("openai/gpt2-xl", "gpt2", _gpt(1600, 48, 25, 1024), ("MIT", "alpaca")),
    ("openai/gpt3-small", "gpt2", _gpt(768, 12, 12), _GPT3),
    ("openai/gpt3-medium", "gpt2", _gpt(1024, 24, 16), _GPT3),
    ("openai/gpt3-large", "gpt2", _gpt(1536, 24, 16), _GPT3),
    # The paper gives 1.3B 24 heads of 128 in a width of 2048, and 13B a width of 5140: neither divides. As others do,
    # 16 heads and 5120.
    ("openai/gpt3-1.3b", "gpt2", _gpt(2048, 24, 16), _GPT3),
    ("openai/gpt3-2.7b", "gpt2", _gpt(2560, 32, 32), _GPT3),
    ("openai/gpt3-6.7b", "gpt2", _gpt(4096, 32, 32), _GPT3),
    ("openai/gpt3-13b", "gpt2", _gpt(5120, 40, 40), _GPT3),
    ("openai/gpt3-175b", "gpt2", _gpt(12288, 96, 96), _GPT3),
    ("facebook/opt-125m", "opt", _opt(768, 12, 12), _OPT),
    ("facebook/opt-350m", "opt", _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False), _OPT),
    ("facebook/opt-1.3b", "opt", _opt(2048, 24, 32), _OPT),
    ("facebook/opt-2.7b", "opt", _opt(2560, 32, 32), _OPT),
    ("facebook/opt-6.7b", "opt", _opt(4096, 32, 32), _OPT),
    ("facebook/opt-13b", "opt", _opt(5120, 40, 40), _OPT),
    ("facebook/opt-30b", "opt", _opt(7168, 48, 56), _OPT),
    ("facebook/opt-66b", "opt", _opt(9216, 64, 72), _OPT),
    ("facebook/opt-175b", "opt", _opt(12288, 96, 96), _OPT),
]
_BAICHUAN = [
    ("Baichuan-7B", "baichuan_7b", 64000),
    ("Baichuan-13B-Base", "baichuan_13b", 64000),
    ("Baichuan-13B-Chat", "baichuan_13b", 64000),
    ("Baichuan2-7B-Base", "baichuan2_7b", 125696),
    ("Baichuan2-7B-Chat", "baichuan2_7b", 125696),
    ("Baichuan2-13B-Base", "baichuan2_13b", 125696),
    ("Baichuan2-13B-Chat", "baichuan2_13b", 125696),
]


@cache
def named_models() -> tuple[NamedModel, ...]:
    """All of them, by family."""
    rows = [NamedModel(name, family, keys, *words) for name, family, keys, words in _TABLE]
    for name, family, vocab in _BAICHUAN:
        wide = family.endswith("13b")
        length = "model_max_length" if wide else "max_position_embeddings"
        keys = _baichuan(*(_B13 if wide else _B7), vocab, length)
        second = vocab == 125696
        words = ("Baichuan 2 Community", "baichuan2") if second else ("Baichuan Community", "baichuan")
        rows.append(NamedModel(f"baichuan-inc/{name}", family, keys, *words))
    return tuple(sorted(rows, key=lambda row: row.family))


def find(name: str) -> NamedModel | None:
    """By its full name or by what follows the owner, capitals ignored; None where there is none.

    What people leave out may be left out: Llama-3-8B for Meta-Llama-3-8B, Mistral-7B for its first version.
    """
    wanted = name.lower()
    for row in named_models():
        short = row.name.lower().split("/")[1]
        if wanted in (row.name.lower(), short, short.removeprefix("meta-"), short.removesuffix("-v0.1")):
            return row
    return None


# What hub ids add to a name whose shape is the same.
_SAME_SHAPE = re.compile(r"^meta-|-(hf|instruct|chat|base)(?=-|$)")


def of_hub(path: str) -> NamedModel | None:
    """The named model behind a hub id such as hf:meta-llama/Llama-2-7b-chat-hf@main: its shape without the network."""
    kind, colon, rest = path.partition(":")
    if not colon or kind not in ("hf", "modelscope"):
        return None
    name = rest.partition("@")[0].rpartition("/")[2].lower()
    plain = _SAME_SHAPE.sub("", name)
    return find(name) or find(plain)


def unknown(name: str) -> UserError:
    """What to say about a name that is neither a model nor a file."""
    short = [row.name.split("/")[1].lower() for row in named_models()]
    near = difflib.get_close_matches(name.lower().split("/")[-1], short, 3)
    hint = f"; named models near it: {', '.join(near)}" if near else "; `trainwright models` lists the named ones"
    return UserError(f"{name} is no folder, no config.json and no named model{hint}")
