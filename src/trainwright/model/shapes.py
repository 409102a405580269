"""Names and shapes of a model's weights, from its tree alone. No torch: the planner and the checkpoints read it."""

from __future__ import annotations

from collections.abc import Iterator

from trainwright.model.config import (
    EmbeddingConfig,
    ExpertsConfig,
    HeadConfig,
    LinearConfig,
    ModelConfig,
    MoeConfig,
    NormConfig,
    PositionTableConfig,
)

Shape = tuple[int, ...]
_PARTS = ("embed_tokens", "embed_positions", "embed_norm", "project_in", "layers", "norm", "project_out", "lm_head")


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of every weight of the base model (adapters left out), in module order. A tied head has none."""
    shapes: dict[str, Shape] = {}
    for part in _PARTS:
        shapes.update(_below(part, getattr(config, part)))
    return shapes


def _below(path: str, node: object) -> Iterator[tuple[str, Shape]]:
    match node:
        case LinearConfig() | HeadConfig():
            if not (isinstance(node, HeadConfig) and node.tied):
                yield f"{path}.weight", (node.out_features, node.in_features)
            if node.bias:
                yield f"{path}.bias", (node.out_features,)
        case NormConfig():
            yield f"{path}.weight", (node.size,)
            if node.kind == "layer":
                yield f"{path}.bias", (node.size,)
        case EmbeddingConfig() | PositionTableConfig():
            yield f"{path}.weight", (node.num_embeddings, node.embedding_dim)
        case tuple():
            for index, child in enumerate(node):
                yield from _below(f"{path}.{index}", child)
        case ExpertsConfig():
            for name in ("gate_proj", "up_proj", "down_proj"):
                if linear := getattr(node, name):
                    yield f"{path}.{name}.weight", (node.num_experts, linear.out_features, linear.in_features)
        case None:
            return
        case _:
            for name in _CHILDREN[type(node).__name__]:
                yield from _below(f"{path}.{name}", getattr(node, name))


_CHILDREN = {
    "BlockConfig": ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    "AttentionConfig": ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),
    "MlpConfig": ("gate_proj", "up_proj", "down_proj"),
    MoeConfig.__name__: ("gate", "experts"),
}
