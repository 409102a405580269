"""The result of a run: `model/`, in the family's own Hugging Face format, complete with tokenizer and template.

Owns what stands beside the weights. Weights and config.json are `model/checkpoint.py`'s.
"""

from __future__ import annotations

import json
from pathlib import Path

from trainwright.adapt.peft import beside_original, write_adapter
from trainwright.data.template import Template
from trainwright.data.tokenizer import Tokenizer
from trainwright.model.checkpoint import write_weights
from trainwright.model.config import without_adapters
from trainwright.model.transformer import Transformer
from trainwright.parallel.apply import DTYPES, Precision
from trainwright.parallel.mesh import World
from trainwright.parallel.whole import WholeWeights


def export_model(
    model: Transformer,
    folder: Path,
    tokenizer: Tokenizer,
    template: Template | None,
    *,
    base: str | None,
    precision: Precision,
    world: World,
    began: Path | None = None,
) -> Path:
    """Writes the model in the type that it was computed in; every rank calls it. The trained template goes with it.

    Of a model with adapters only these are written, in PEFT's format; `base` is what they belong to, as it was before
    they took a part of it: the folder `began` says which.
    """
    whole = WholeWeights(model, world)
    if model.config != without_adapters(model.config):
        name = None if base is None else base.removeprefix("hf:")
        config, tensors = (model.config, whole) if began is None else beside_original(model.config, whole, began)
        write_adapter(config, tensors, folder, base=name, write=world.is_main)
    else:
        write_weights(model.config, whole, folder, dtype=DTYPES[precision], write=world.is_main)
    if world.is_main:
        tokenizer.save(folder, template.jinja if template else None)
        _write_generation_config(folder, tokenizer, template)
    world.barrier()
    return folder


def stop_ids(tokenizer: Tokenizer, template: Template | None) -> list[int]:
    """The ids that end an answer: the template's, then the tokenizer's."""
    return list(dict.fromkeys([*(template.stop if template else ()), *tokenizer.stop_ids]))


def _write_generation_config(folder: Path, tokenizer: Tokenizer, template: Template | None) -> None:
    """Tells servers and transformers where an answer ends."""
    values = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stop_ids(tokenizer, template),
        "pad_token_id": tokenizer.pad_id,
    }
    kept = {key: value for key, value in values.items() if value not in (None, [])}
    (folder / "generation_config.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
