"""What `trainwright prepare` does: prepare, then show samples and the doctor's opinion.

Owns choosing the tokenizer of a recipe. The command line's words are in cli/prepare.py.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from trainwright.data.prepare import Prepared, prepare
from trainwright.data.preview import show as show_samples
from trainwright.data.tokenizer import Tokenizer, load_tokenizer
from trainwright.errors import UserError
from trainwright.recipe.schema import Recipe


def prepare_command(recipe: Recipe, show: int = 0, doctor: bool = False, vocab_size: int | None = None) -> Prepared:
    """Prepares the data of `recipe`; prints `show` samples, and that the doctor found nothing if it was asked.

    Args:
        vocab_size: rows of the model's embedding, where it is known.

    Raises:
        UserError: the data cannot be prepared, or the doctor refuses them.
    """
    tokenizer = recipe_tokenizer(recipe)
    prepared = prepare(recipe, tokenizer, vocab_size=vocab_size)
    console = Console()
    if show:
        show_samples(prepared.train, tokenizer, show, recipe.train.seed, recipe.data.shuffle, console)
    if doctor:
        said = "doctor: nothing wrong"
        if recipe.data.accept:
            said += f", apart from what data.accept names: {', '.join(recipe.data.accept)}"
        if vocab_size is None:
            said += "; the model is not here, so token ids were not compared with its embedding"
        console.print(said, highlight=False, soft_wrap=True)
    console.print(f"prepared data: {prepared.folder}", highlight=False, soft_wrap=True)
    return prepared


def recipe_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer that a recipe names, or its model's own.

    Raises:
        UserError: there is none.
    """
    model = recipe.model
    spec = model.tokenizer or model.path
    if spec is None and isinstance(model.config, str) and Path(model.config).is_dir():  # as train/build.py finds it
        spec = model.config
    if spec is None:
        raise UserError("model.config gives random weights and no tokenizer: set model.tokenizer, for example to byte")
    return load_tokenizer(spec)
