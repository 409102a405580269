"""Trainwright plans, trains, measures and proves LLM training runs.

Names load on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "UserError": "trainwright.errors",
    "Recipe": "trainwright.recipe.schema",
    "load_recipe": "trainwright.recipe.load",
    "load_config": "trainwright.model.source",
    "load_model": "trainwright.model.checkpoint",
    "save_model": "trainwright.model.checkpoint",
    "Transformer": "trainwright.model.transformer",
    "generate": "trainwright.model.generate",
    "load_tokenizer": "trainwright.data.tokenizer",
    "prepare": "trainwright.data.prepare",
    "plan": "trainwright.planner.plan",
}
__all__ = [*sorted(_WHERE), "train"]


def __getattr__(name: str) -> Any:
    if name == "train":  # the room itself; it is callable
        return import_module("trainwright.train")
    if name not in _WHERE:
        raise AttributeError(f"module 'trainwright' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_WHERE]
