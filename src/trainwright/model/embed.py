"""Token and position tables; the head: logits, or the loss of labels without all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainwright.model.config import EmbeddingConfig, HeadConfig
from trainwright.model.kernels.cross_entropy import VocabShard, linear_cross_entropy
from trainwright.model.kernels.embedding import embedding


def build_embedding(table: EmbeddingConfig) -> nn.Module:
    """The token table; in fewer bits it builds itself."""
    if table.quantization is not None:
        return table.quantization.build_embedding(table)
    return Table(table.num_embeddings, table.embedding_dim, padding_idx=table.padding_idx)


def build_head(head: HeadConfig) -> nn.Module:
    """The head; in fewer bits it builds itself."""
    return Head(head) if head.quantization is None else head.quantization.build_head(head)


class Table(nn.Embedding):
    """torch's own but for its gradient, which takes no float32 rows beside it. [...] int -> [..., H]."""

    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.weight, self.padding_idx)


class Head(nn.Module):
    """x W^T + b. A tied head holds the token table itself; a normalised one divides W's rows by their L2 norm."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.normalized = config.normalized
        self.shard: VocabShard | None = None  # set from outside where the rows of W are a slice of the vocabulary
        self.loss_chunk = 0  # tokens whose logits exist at once; 0: chosen by their size
        self.weight = nn.Parameter(torch.empty(config.out_features, config.in_features))
        self.bias = nn.Parameter(torch.zeros(config.out_features)) if config.bias else None

    def forward(self, x_BSH: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] in x's dtype; with labels the float32 sum of cross entropies over labels != -100."""
        weight = F.normalize(self.weight, dim=-1, eps=1e-12) if self.normalized else self.weight
        weight = weight.to(x_BSH.dtype)
        if labels_BS is None:
            return F.linear(x_BSH, weight, self.bias if self.bias is None else self.bias.to(x_BSH.dtype))
        return linear_cross_entropy(x_BSH, weight, labels_BS, self.bias, self.shard, self.loss_chunk)
