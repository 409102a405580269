"""A recipe that trains in a second: two layers, the byte tokenizer, sums as data."""

import json
from pathlib import Path
from typing import Any

from trainwright.recipe.load import load_recipe
from trainwright.recipe.schema import Recipe

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def small_recipe(folder: Path, *overrides: str, **sections: dict[str, Any]) -> Recipe:
    """Writes its data below `folder` and trains below `folder`/runs."""
    data = folder / "sums.jsonl"
    if not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"instruction": f"{a}+{b}", "output": str(a + b)} for a in range(12) for b in range(12)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values: dict[str, Any] = {
        "name": "small",
        "output": str(folder / "runs"),
        "model": {"config": CONFIG, "tokenizer": "byte"},
        "data": {"path": str(data), "seq_len": 48, "validation": 0.1, "cache": str(folder / "cache"), "workers": 0},
        "train": {
            "steps": 12,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 5e-3,
            "precision": "fp32",
        },
        "tracking": {"tensorboard": False},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return load_recipe(values, overrides)
