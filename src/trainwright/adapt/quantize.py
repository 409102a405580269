"""Which frozen weights are kept in fewer bits: a rewrite of the config tree before the build. No torch.

Number formats and their arithmetic are `model/kernels/quantized.py`; the modules are `frozen.py` and `linear.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from trainwright.errors import UserError
from trainwright.model.config import EmbeddingConfig, HeadConfig, LinearConfig, ModelConfig, map_linears

Kind = Literal["nf4", "int8", "fp8"]
NF4_BLOCK = 64


@dataclass(frozen=True)
class FewerBits:
    """A weight in nf4 (4.13 bits with its scales), int8 or fp8 (8 bits and a scale a row)."""

    kind: Kind

    @property
    def block(self) -> int:
        """So many weights of a row share a scale and stay together where columns are cut; 1: a scale a row."""
        return NF4_BLOCK if self.kind == "nf4" else 1

    def num_bytes(self, *shape: int, levels: int = 2) -> int:
        """What a weight [..., out, in] takes, scales included; nf4's in two levels, or in one (`single_level`)."""
        *rows, columns = shape
        count = 1
        for size in rows:
            count *= size
        if self.kind != "nf4":
            return count * (columns + 4)
        blocks = count * -(-columns // NF4_BLOCK)
        codes = blocks * NF4_BLOCK // 2
        return codes + blocks + 4 * -(-blocks // 256) + 4 if levels == 2 else codes + 4 * blocks

    def build(self, linear: LinearConfig, num_experts: int | None = None) -> Any:
        """A linear layer with a fixed weight in this format; a stack of them for experts."""
        from trainwright.adapt.frozen import FrozenExperts, FrozenLinear

        return FrozenLinear(linear) if num_experts is None else FrozenExperts(linear, num_experts)

    def build_embedding(self, table: EmbeddingConfig) -> Any:
        from trainwright.adapt.frozen import FrozenEmbedding

        return FrozenEmbedding(table, self.kind)

    def build_head(self, head: HeadConfig) -> Any:
        from trainwright.adapt.frozen import FrozenHead

        return FrozenHead(head, self.kind)


def add_quantization(config: ModelConfig, kind: Kind | None, tables: Kind | None = None) -> ModelConfig:
    """Every linear layer in `kind`, the experts' too, but for routers; token table and head in `tables`.

    Routers stay as they are: they are small, and a token that goes elsewhere is a large error.
    """
    if kind is not None:
        config = map_linears(config, lambda path, linear: _quantized(path, linear, kind))
    if tables is None:
        return config
    if config.lm_head.tied or config.lm_head.normalized:
        why = "shares the token table" if config.lm_head.tied else "normalises its rows"
        raise UserError(f"quantize_tables={tables}: this model's head {why}: leave quantize_tables out")
    bits = FewerBits(tables)
    embed, head = replace(config.embed_tokens, quantization=bits), replace(config.lm_head, quantization=bits)
    return replace(config, embed_tokens=embed, lm_head=head)


def _quantized(path: str, linear: LinearConfig, kind: Kind) -> LinearConfig:
    return linear if is_router(path) else replace(linear, quantization=FewerBits(kind))


def is_router(path: str) -> bool:
    """Whether this is what sends tokens to experts."""
    return path.endswith(".mlp.gate")
