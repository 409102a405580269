"""Rotary positions in the config tree: variants and scalings as numbers. Their formulas are position.py's. No torch.

Read it through config.py, which is the whole tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023): every frequency divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class DynamicNtkScaling:
    """The base grows with the longest position beyond the trained length (HF rope_type `dynamic`)."""

    factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023). `attention_factor` multiplies cos and sin."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class QwenNtkScaling:
    """Qwen 1 in evaluation beyond `seq_length`: base x alpha^(d/(d-2)), alpha by powers of two, one alpha a row."""

    seq_length: int


RopeScaling = LinearScaling | DynamicNtkScaling | Llama3Scaling | YarnScaling | QwenNtkScaling


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021) on the first `channels * rotary_dim` dimensions of a head.

    `layout` half pairs dimension i with i + rotary_dim/2, interleaved pairs 2i with 2i + 1. With two channels
    (ChatGLM) each `rotary_dim` dimensions turn by their own position. `float16_frequencies`: GLM's rounding.
    """

    rotary_dim: int
    theta: float = 10000.0
    layout: Literal["half", "interleaved"] = "half"
    channels: int = 1
    scaling: RopeScaling | None = None
    float16_frequencies: bool = False

    def __post_init__(self) -> None:
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"rotary positions turn pairs, which {self.rotary_dim} dimensions are not")

    @property
    def dynamic(self) -> bool:
        """Whether the frequencies depend on the length: then a KV cache is stale when they change (generate.py)."""
        return isinstance(self.scaling, DynamicNtkScaling | QwenNtkScaling)
