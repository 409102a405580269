"""GGUF files to Hugging Face folders: dequantized weights, config.json, tokenizer.

Owns the names and shapes of GGUF's Llama-like architectures. Writing weights is `checkpoint.py`'s, the tokenizer is
`gguf_tokenizer.py`'s. Holds one tensor, and one file of the result, in memory at a time.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainwright.errors import UserError
from trainwright.model.checkpoint import load_config, write_weights
from trainwright.model.config import ModelConfig
from trainwright.model.gguf_tokenizer import write_tokenizer

# GGUF architecture -> Hugging Face's model_type and class.
_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
_OUTER = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROPE_FACTORS = "rope_freqs.weight"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def import_gguf(path: str | Path, folder: str | Path, dtype: str = "float32") -> ModelConfig:
    """Writes the Hugging Face folder of a GGUF file; -> the model's config.

    Args:
        path: a GGUF file of architecture llama, qwen2 or qwen3, of any quantization that package gguf reads.
        folder: the new folder; complete or absent afterwards.
        dtype: of the written weights: float32, bfloat16 or float16.

    Raises:
        UserError: not a whole GGUF file, an architecture that is not known, or a folder that is not empty.
    """
    if dtype not in _DTYPES:
        raise UserError(f"dtype={dtype} is not a type to write: use {', '.join(_DTYPES)}")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty: choose another name, nothing was written")
    source = _Source(Path(path))
    config = load_config(source.config())
    source.check_names(config)
    beside = target.with_name(f".{target.name}.{os.getpid()}.import")
    try:
        made = beside / "model"
        write_weights(config, lambda name: source.weight(name, config), made, dtype=_DTYPES[dtype])
        write_tokenizer(source.values, made)
        _sync_all(made)
        if target.exists():
            target.rmdir()
        made.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return config


class _Source:
    """An open GGUF file: its metadata by key, its tensors by our names."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise UserError("reading GGUF needs the package gguf: pip install 'trainwright[formats]'") from None
        if not path.is_file():
            raise UserError(f"{path} is not a file")
        try:
            reader = gguf.GGUFReader(path)
            self.values: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        except (
            Exception
        ) as error:  # the reader slices a memory map: what a broken file raises depends on where it breaks
            raise UserError(f"{path} is no whole GGUF file: {str(error) or type(error).__name__}") from None
        self._path = path
        self._dequantize = gguf.dequantize
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(self.values.get("general.architecture"))
        if self.architecture not in _ARCHITECTURES:
            raise UserError(
                f"{path} is of architecture {self.architecture!r}: {', '.join(_ARCHITECTURES)} can be imported"
            )

    def _value(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own section; it must be one number for all layers."""
        name = f"{self.architecture}.{key}"
        value = self.values.get(name, default)
        if value is None:
            raise UserError(f"{self._path} does not say {name}")
        if isinstance(value, list):
            raise UserError(f"{self._path}: {name} differs from layer to layer, which no family here has")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        """A value stored in 32 bits, as the decimal number that was meant (1e-05, not 9.999999747378752e-06)."""
        return float(str(np.float32(self._value(key, default))))

    def config(self) -> dict[str, Any]:
        """config.json's keys."""
        model_type, architecture = _ARCHITECTURES[self.architecture]
        if self._value("expert_count", 0):
            raise UserError(f"{self._path} is a mixture of experts, which is not imported from GGUF")
        if "token_embd.weight" not in self._tensors:
            raise UserError(f"{self._path} has no tensor token_embd.weight")
        hidden, heads = int(self._value("embedding_length")), int(self._value("attention.head_count"))
        keys = {
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": int(self._tensors["token_embd.weight"].shape[1]),
            "hidden_size": hidden,
            "intermediate_size": int(self._value("feed_forward_length")),
            "num_hidden_layers": int(self._value("block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(self._value("attention.head_count_kv", heads)),
            "head_dim": int(self._value("attention.key_length", hidden // heads)),
            "hidden_act": "silu",
            "max_position_embeddings": int(self._value("context_length")),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._number("rope.freq_base", 10000.0),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "torch_dtype": "float32",
        }
        rotated = int(self._value("rope.dimension_count", keys["head_dim"]))
        if rotated != keys["head_dim"]:
            raise UserError(f"{self._path} rotates {rotated} of {keys['head_dim']} dimensions: not a Llama shape")
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            if f"tokenizer.ggml.{theirs}_token_id" in self.values:
                keys[f"{ours}_token_id"] = int(self.values[f"tokenizer.ggml.{theirs}_token_id"])
        return keys | self._rope_scaling(keys)

    def _rope_scaling(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Rotary scaling: named in the metadata, or (Llama 3.1 and later) a tensor of one factor a frequency."""
        kind = self._value("rope.scaling.type", "none")
        if kind == "linear":
            return {"rope_scaling": {"rope_type": "linear", "factor": self._number("rope.scaling.factor")}}
        if kind != "none":
            raise UserError(f"{self._path} scales rotary positions by {kind!r}: linear and llama3 can be imported")
        if _ROPE_FACTORS not in self._tensors:
            return {}
        factors = np.asarray(self._read(_ROPE_FACTORS), dtype=np.float64)
        scaling = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        wavelengths = 2 * math.pi * keys["rope_theta"] ** (np.arange(len(factors)) / len(factors))
        if not np.allclose(factors, _llama3_factors(wavelengths, scaling), rtol=1e-4):
            raise UserError(f"{self._path}: {_ROPE_FACTORS} are not the factors of Llama 3.1's rotary scaling")
        return {"rope_scaling": scaling}

    def check_names(self, config: ModelConfig) -> None:
        """Refuses tensors that the model has no place for."""
        layers = range(config.num_layers)
        known = {*_OUTER.values(), _ROPE_FACTORS, "rope_freqs"}
        known |= {f"blk.{n}.{name}.{kind}" for n in layers for name in _INNER.values() for kind in ("weight", "bias")}
        odd = sorted(set(self._tensors) - known)
        if odd:
            raise UserError(f"{self._path} holds {odd[0]} ({len(odd)} such), which {config.family} has no place for")

    def weight(self, name: str, config: ModelConfig) -> torch.Tensor:
        """One of our weights, in float32."""
        if name in _OUTER:
            return torch.from_numpy(self._read(_OUTER[name]))
        _, layer, rest = name.split(".", 2)
        module, kind = rest.rsplit(".", 1)
        tensor = torch.from_numpy(self._read(f"blk.{layer}.{_INNER[module]}.{kind}"))
        attention = config.layers[int(layer)].self_attn
        if self.architecture == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = attention.num_heads if module.endswith("q_proj") else attention.num_kv_heads
            return _halves(tensor, heads)
        return tensor

    def _read(self, name: str) -> np.ndarray:
        if name not in self._tensors:
            raise UserError(f"{self._path} has no tensor {name}")
        tensor = self._tensors[name]
        try:
            values = self._dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{self._path}: {name} is stored as {tensor.tensor_type.name}, which package gguf does not read"
            ) from None
        return np.array(values, dtype=np.float32)  # a copy: the file's own numbers are a read-only map


def _halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from neighbouring pairs, as llama.cpp rotates them, to two halves, as Hugging Face does."""
    rows = tensor.shape[0]
    return tensor.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)


def _llama3_factors(wavelengths: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    """What each frequency is divided by (Llama 3.1, Grattafiori et al. 2024, as published in its code)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def _sync_all(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
