"""Packed, padded and split over ranks, the same samples give the same loss and gradients: from files to the model."""

import json
from pathlib import Path

import pytest
import torch

from trainwright.data.loader import Loader
from trainwright.data.prepare import prepare
from trainwright.data.tokenizer import load_tokenizer
from trainwright.model.checkpoint import load_config
from trainwright.model.transformer import Transformer
from trainwright.recipe.schema import Recipe

SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 272,
    "max_position_embeddings": 128,
}


def whole_epoch(
    path: Path, cache: Path, model: Transformer, packing: bool, ranks: int
) -> tuple[float, int, list[torch.Tensor]]:
    """Summed loss, targets and gradients of all rows, as `ranks` ranks read them."""
    data = {"path": str(path), "seq_len": 96, "packing": packing, "cache": str(cache), "workers": 0}
    recipe = Recipe.model_validate({"model": {"config": "any"}, "train": {"steps": 1}, "data": data})
    rows = prepare(recipe, load_tokenizer("byte"), progress=False).train
    model.zero_grad()
    loss, targets = 0.0, 0
    for rank in range(ranks):
        loader = Loader(rows, micro_batch_size=3, rank=rank, world_size=ranks, epochs=1)  # type: ignore[arg-type]
        for batch in loader:
            out = model(
                batch.input_ids, position_ids=batch.position_ids, document_ids=batch.document_ids, labels=batch.labels
            )
            out.loss_sum.backward()
            loss, targets = loss + out.loss_sum.item(), targets + int(out.num_tokens)
        loader.close()
    return loss, targets, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_packing_changes_no_loss_and_no_gradient(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"instruction": f"Say {'so ' * (n % 5)}", "output": "yes" * (n % 4 + 1)} for n in range(17)]
    path.write_text("\n".join(map(json.dumps, rows)))
    torch.manual_seed(0)
    model = Transformer(load_config(SHAPE))
    model.init_weights(0)
    loss, targets, gradients = whole_epoch(path, tmp_path, model, packing=False, ranks=1)
    assert targets == sum(len(row["output"]) + 1 for row in rows)
    for packing, ranks in ((True, 1), (True, 2), (False, 3)):
        again = whole_epoch(path, tmp_path, model, packing, ranks)
        assert again[1] == targets
        assert again[0] == pytest.approx(loss, rel=1e-5)
        for one, other in zip(gradients, again[2], strict=True):
            assert (one - other).abs().max() <= 1e-5 * max(1.0, one.abs().max().item())
