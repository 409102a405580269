"""A model of two matrices with the forward contract of `Transformer`, for tests of the loop's arithmetic."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rows(NamedTuple):
    """One micro batch; the fields of the loader's Batch."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document_ids: Tensor


class Output(NamedTuple):
    loss_sum: Tensor
    num_tokens: Tensor
    aux_loss: Tensor


class TinyModel(nn.Module):
    """Embedding, one layer, head; `poison` puts a NaN into the layer's output for rows that hold this token."""

    def __init__(self, vocab: int = 13, width: int = 8, seed: int = 0, poison: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(vocab, width)
        self.layers = nn.ModuleDict({"0": nn.Sequential(nn.Linear(width, width), nn.Tanh())})
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.poison = poison

    def forward(self, input_ids, *, position_ids=None, document_ids=None, labels=None, **rest):
        x = self.layers["0"](self.embed_tokens(input_ids))
        if self.poison is not None:
            x = x + torch.where((input_ids == self.poison)[..., None], float("nan"), 0.0)
        logits = self.lm_head(self.norm(x))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        return Output(loss, (labels != -100).sum(), loss.new_zeros(()))


def rows(count: int, length: int = 6, supervised: list[int] | None = None, seed: int = 0, vocab: int = 13) -> Rows:
    """Random rows; row i has `supervised[i]` trained positions (all by default)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (count, length), generator=generator)
    labels = torch.randint(0, vocab, (count, length), generator=generator)
    for row, keep in enumerate(supervised or [length] * count):
        labels[row, keep:] = -100
    positions = torch.arange(length).expand(count, length)
    return Rows(ids, labels, positions, torch.zeros(count, length, dtype=torch.int32))


def split(batch: Rows, size: int) -> list[Rows]:
    """The same rows in micro batches of `size`."""
    return [Rows(*(field[i : i + size] for field in batch)) for i in range(0, batch.input_ids.shape[0], size)]
