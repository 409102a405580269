"""Small models that together have every part a family can have, and batches of packed documents for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.golden import golden_dir
from trainwright.model.checkpoint import load_config
from trainwright.model.config import (
    AttentionConfig,
    BlockConfig,
    EmbeddingConfig,
    HeadConfig,
    LinearConfig,
    MaskConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    NormConfig,
    PositionTableConfig,
    PrefixConfig,
    ResidualConfig,
    RopeConfig,
)

VOCAB, HIDDEN = 96, 32
START, GMASK, MASK = 90, 91, 92  # GLM's special tokens


def _norm(kind: str = "rms") -> NormConfig:
    return NormConfig(HIDDEN, 1e-5, kind)  # type: ignore[arg-type]


def _model(family: str, blocks: tuple[BlockConfig, ...], **parts: object) -> ModelConfig:
    head = {"lm_head": HeadConfig(HIDDEN, VOCAB), "norm": _norm(), "max_position_embeddings": 256}
    return ModelConfig(family, EmbeddingConfig(VOCAB, HIDDEN), blocks, **{**head, **parts})  # type: ignore[arg-type]


def _block(attention: AttentionConfig, mlp: object = None, norm: str = "rms", **parts: object) -> BlockConfig:
    return BlockConfig(attention, mlp or MlpConfig.of(HIDDEN, 48), _norm(norm), _norm(norm), **parts)  # type: ignore[arg-type]


def _attention(heads: int = 4, kv: int | None = None, **parts: object) -> AttentionConfig:
    return AttentionConfig.of(HIDDEN, heads, kv, HIDDEN // 4, **parts)  # type: ignore[arg-type]


ROPE = RopeConfig(8, 1000.0)


def llama(layers: int = 3, heads: int = 4, kv: int = 2, tied: bool = False) -> ModelConfig:
    """RMSNorm, rotary, grouped queries, gated MLP."""
    head = HeadConfig(HIDDEN, VOCAB, tied=tied)
    return _model("llama", (_block(_attention(heads, kv, rope=ROPE)),) * layers, lm_head=head)


def bloom(layers: int = 3) -> ModelConfig:
    """ALiBi, LayerNorm with a norm after the embedding, biases everywhere, tied head."""
    attention = _attention(qkv_bias=True, o_bias=True, alibi=True)
    mlp = MlpConfig.of(HIDDEN, 64, gated=False, bias=True, activation="gelu_tanh")
    parts = {"embed_norm": _norm("layer"), "norm": _norm("layer"), "lm_head": HeadConfig(HIDDEN, VOCAB, tied=True)}
    return _model("bloom", (_block(attention, mlp, "layer"),) * layers, **parts)


def banded(layers: int = 3) -> ModelConfig:
    """Learned positions, projections around the stack, a window of 5 in every second layer: OPT's and GPT-3's parts."""
    whole = _attention(qkv_bias=True, o_bias=True)
    narrow = _attention(qkv_bias=True, o_bias=True, mask=MaskConfig(window=5))
    mlp = MlpConfig.of(HIDDEN, 64, gated=False, bias=True, activation="relu")
    blocks = tuple(_block(narrow if index % 2 else whole, mlp, "layer") for index in range(layers))
    return ModelConfig(
        "opt", EmbeddingConfig(VOCAB, 24), blocks, _norm("layer"), HeadConfig(24, VOCAB, tied=True), 128,
        embed_positions=PositionTableConfig(130, HIDDEN, 2), project_in=LinearConfig(24, HIDDEN),
        project_out=LinearConfig(HIDDEN, 24),
    )  # fmt: skip


def glm(layers: int = 3) -> ModelConfig:
    """Prefix masks, two-channel rotary positions read from the tokens, DeepNorm."""
    rope = RopeConfig(4, 1000.0, channels=2)
    attention = _attention(qkv_bias=True, o_bias=True, rope=rope, mask=MaskConfig("prefix"))
    mlp = MlpConfig.of(HIDDEN, 64, gated=False, bias=True, activation="gelu_tanh")
    blocks = (_block(attention, mlp, "layer", residual=ResidualConfig("scaled", (2 * layers) ** 0.5)),) * layers
    prefix = PrefixConfig(START, GMASK, MASK, two_dimensional=True)
    return _model("chatglm", blocks, norm=_norm("layer"), prefix=prefix)


def qwen(layers: int = 3) -> ModelConfig:
    """Norms on q and k, one KV head, a normalised head."""
    norm = NormConfig(HIDDEN // 4, 1e-5)
    attention = _attention(4, 1, rope=ROPE, qkv_bias=True, q_norm=norm, k_norm=norm)
    return _model("qwen3", (_block(attention),) * layers, lm_head=HeadConfig(HIDDEN, VOCAB, normalized=True))


def mixtral(layers: int = 3, experts: int = 4) -> ModelConfig:
    """Experts in all layers but the first, with a load-balancing loss over all of them."""
    moe = MoeConfig.of(HIDDEN, 24, experts, 2, "silu", aux_loss_coef=0.5)
    attention = _attention(4, 2, rope=ROPE)
    blocks = (_block(attention), *(_block(attention, moe),) * (layers - 1))
    return _model("mixtral", blocks)


def odd(layers: int = 3) -> ModelConfig:
    """Sizes that two ranks do not divide: a vocabulary of 97 with a bias on the head, three KV heads for six."""
    attention = AttentionConfig.of(HIDDEN, 6, 3, 8, qkv_bias=True, rope=ROPE)
    parts = {"norm": _norm(), "lm_head": HeadConfig(HIDDEN, 97, bias=True), "max_position_embeddings": 256}
    return ModelConfig("llama", EmbeddingConfig(97, HIDDEN, padding_idx=3), (_block(attention),) * layers, **parts)  # type: ignore[arg-type]


MODELS = {make.__name__: make for make in (llama, bloom, banded, glm, qwen, mixtral, odd)}


def build(name: str, layers: int) -> ModelConfig:
    """One of the above, or the tiny model `golden:FAMILY` of the golden numbers, whose layers are what they are."""
    kind, _, family = name.partition(":")
    return load_config(golden_dir(family), family) if kind == "golden" else MODELS[name](layers)


@dataclass
class Rows:
    """One micro batch as the loader gives it."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document_ids: Tensor


def packed_rows(count: int, length: int, seed: int, *, prompts: bool = False) -> list[Rows]:
    """`count` rows of one row each with one to four documents, some padding and an uneven number of supervised tokens.

    `prompts`: every document has GLM's mask and start tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows = []
    for _ in range(count):
        ids = torch.randint(0, 90, (length,), generator=generator)
        documents = torch.full((length,), -1, dtype=torch.int32)
        positions = torch.zeros(length, dtype=torch.int64)
        labels = torch.full((length,), -100)
        begin, filled = 0, length - draw(0, 4)
        for document in range(draw(1, 5)):
            size = min(draw(4, max(5, length // 2)), filled - begin)
            if size < 4:
                break
            end = begin + size
            documents[begin:end], positions[begin:end] = document, torch.arange(size)
            prompt = draw(1, size - 2)
            if prompts:
                ids[begin + prompt - 1 : begin + prompt + 1] = torch.tensor([draw(GMASK, MASK + 1), START])
            labels[begin + prompt : end - 1] = ids[begin + prompt + 1 : end]
            begin = end
        rows.append(Rows(ids[None], labels[None], positions[None], documents[None]))
    return rows


def batches(count: int, micro_batch: int, length: int, seed: int, *, prompts: bool = False) -> list[Rows]:
    """`count` micro batches of `micro_batch` rows."""
    rows = packed_rows(count * micro_batch, length, seed, prompts=prompts)
    names = ("input_ids", "labels", "position_ids", "document_ids")
    return [
        Rows(*(torch.cat([getattr(row, name) for row in rows[i : i + micro_batch]]) for name in names))
        for i in range(0, len(rows), micro_batch)
    ]


def inputs(batch: Rows, name: str) -> dict[str, Tensor]:
    """What the model of this name takes: GLM reads its positions from the tokens."""
    kept = vars(batch)
    return {key: value for key, value in kept.items() if name != "glm" or key != "position_ids"}
