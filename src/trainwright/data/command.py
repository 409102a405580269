"""What `trainwright prepare` does: prepare, then show samples and the doctor's opinion.

Owns choosing the tokenizer of a recipe. The command line's words are in cli/prepare.py.
"""

from __future__ import annotations

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
        accepted = f", apart from what data.accept names: {', '.join(recipe.data.accept)}" if recipe.data.accept else ""
        console.print(f"doctor: nothing wrong{accepted}", highlight=False)
    console.print(f"prepared data: {prepared.folder}", highlight=False, soft_wrap=True)
    return prepared


def recipe_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer that a recipe names, or its model's own.

    Raises:
        UserError: there is none.
    """
    spec = recipe.model.tokenizer or recipe.model.path
    if spec is None:
        raise UserError("model.config gives random weights and no tokenizer: set model.tokenizer, for example to byte")
    return load_tokenizer(spec)
