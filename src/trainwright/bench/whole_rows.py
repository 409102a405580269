"""The loss of a model folder on rows of a recipe's data, in this process, packed as they are or document by document.

Owns nothing but that: `prove.py` compares the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from trainwright.adapt.files import CONFIG
from trainwright.adapt.merge import load_adapted
from trainwright.data.loader import Batch, Loader
from trainwright.data.prepare import prepare
from trainwright.device import default_device
from trainwright.model.checkpoint import load_model
from trainwright.model.transformer import Transformer
from trainwright.recipe.schema import Recipe
from trainwright.train.build import find_sources
from trainwright.train.step import to_inputs


def next_batches(recipe: Recipe, micro_batch_size: int, rows: int, *, after: int) -> list[Batch]:
    """The micro batches of the step that follows step `after`, in steps of `rows`, as one process reads them."""
    sources = find_sources(recipe.model, recipe.data.seq_len)
    data = prepare(recipe, sources.tokenizer, vocab_size=sources.config.vocab_size, progress=False)
    count = rows // micro_batch_size
    loader = Loader(
        data.train,
        micro_batch_size=micro_batch_size,
        seed=recipe.train.seed,
        shuffle=recipe.data.shuffle,
        accumulation=count,
    )
    try:
        return list(islice(loader, after * count, (after + 1) * count))
    finally:
        loader.close()


def alone(batches: Sequence[Batch]) -> list[Batch] | None:
    """Every document in a row of its own; None where every row is one document already."""
    apart = [document for batch in batches for document in documents(batch)]
    return None if len(apart) == sum(batch.input_ids.shape[0] for batch in batches) else apart


def documents(batch: Batch) -> list[Batch]:
    """Each document of each row as a batch of one row, without padding."""
    found = []
    for row in range(batch.input_ids.shape[0]):
        ids = batch.document_ids[row] if batch.document_ids is not None else torch.zeros_like(batch.input_ids[row])
        for number in ids.unique().tolist():
            if number >= 0:
                kept = ids == number
                inputs, labels, positions = (tensor[row, kept][None] for tensor in batch[:3])
                found.append(Batch(inputs, labels, positions, None))
    return found


def load(folder: Path, recipe: Recipe, dtype: torch.dtype) -> Transformer:
    """A run's result, ready for `mean_loss`: a model folder, or an adapter folder beside its base as the recipe keeps
    it, in fewer bits if it was trained so."""
    if not (folder / CONFIG).is_file():
        return load_model(folder, dtype=dtype, device=default_device()).train()
    bits = {"quantize": recipe.quantize, "tables": recipe.quantize_tables}
    model = load_adapted(folder, base=recipe.model.path, dtype=dtype, device=default_device(), **bits)
    return model.train()


@torch.no_grad()
def mean_loss(model: Transformer, batches: Sequence[Batch]) -> float:
    """Mean loss over the supervised tokens, the forward pass being that of training."""
    total, tokens = 0.0, 0
    for batch in batches:
        output = model(**to_inputs(batch, model.device))
        total += float(output.loss_sum)
        tokens += int(output.num_tokens)
    return total / max(tokens, 1)
