"""The data of a recipe, made ready once: tokenized into a cache, put into rows, checked.

Owns the order of the steps. Any number of processes may call `prepare` at once, outside of any collective: one does
the work while the others wait on a file lock, then all of them find it done.

    CACHE/shipped/                 rows of the shipped data set
    CACHE/tokens/KEY/              shards; KEY is of files, tokenizer, template and what else decides tokens
    CACHE/tokens/KEY/rows-KEY/     rows; this KEY is of seq_len, packing, filters: changing them tokenizes nothing
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainwright.data import doctor
from trainwright.data.arrange import Arrangement, arrange
from trainwright.data.encode import EncodeSettings
from trainwright.data.packing import Selection
from trainwright.data.progress import Progress, summary
from trainwright.data.rows import RowSet
from trainwright.data.tokenized import TokenSet, tokenize
from trainwright.data.tokenizer import Tokenizer
from trainwright.recipe.data import SourceRecipe
from trainwright.recipe.schema import Recipe


@dataclass
class Prepared:
    """What training reads, and the lines that say what became of the data. `folder` holds the shards."""

    folder: Path
    train: RowSet
    validation: RowSet | None
    summary: list[str]

    @property
    def fingerprint(self) -> str:
        return self.train.fingerprint


def prepare(recipe: Recipe, tokenizer: Tokenizer, *, vocab_size: int | None = None, progress: bool = True) -> Prepared:
    """Makes the data of `recipe` ready, or finds them ready.

    Args:
        vocab_size: rows of the model's embedding; token ids beyond it are refused.
        progress: shows a progress bar, and what became of the data.

    Raises:
        UserError: the data cannot be read, hold nothing to train on, or the doctor refuses them.
    """
    data = recipe.data
    shown = Progress(progress)
    limits = (data.filter.min_tokens, data.filter.max_tokens)
    held_out = data.validation if isinstance(data.validation, float) else 0.0
    tokens = tokenize(data, data.all_sources, encode_settings(recipe), tokenizer, shown)
    train = _rows(recipe, tokens, data.all_sources, Selection(*limits, held_out, "train"), tokenizer)
    lines = summary("train", tokens.figures, train.figures, data.seq_len, data.too_long)
    if tokens.bad_rows.exists():
        lines.append(f"  bad rows are listed in {tokens.bad_rows}")
    doctor.refuse(examine(recipe, tokens, train, tokenizer, vocab_size))

    validation = None
    if held_out:
        validation = _rows(recipe, tokens, data.all_sources, Selection(*limits, held_out, "validation"), tokenizer)
    elif isinstance(data.validation, str):
        sources = _validation_source(recipe)
        other = tokenize(data, sources, encode_settings(recipe), tokenizer, shown)
        validation = _rows(recipe, other, sources, Selection(*limits), tokenizer)
        doctor.refuse(examine(recipe, other, validation, tokenizer, vocab_size))
    if validation is not None:
        lines += summary("validation", {}, validation.figures, data.seq_len, data.too_long)
    for line in lines:
        shown.say(line)
    return Prepared(tokens.folder, train, validation, lines)


def encode_settings(recipe: Recipe) -> EncodeSettings:
    """What of a recipe decides the tokens of a sample."""
    data = recipe.data
    loss_on = "all" if recipe.task == "pretrain" else data.loss_on
    return EncodeSettings(data.template, data.system, loss_on, data.filter.min_characters, data.filter.max_characters)


def examine(
    recipe: Recipe, tokens: TokenSet, rows: RowSet, tokenizer: Tokenizer, vocab_size: int | None
) -> list[doctor.Complaint]:
    """The doctor's complaints about prepared data."""
    chats = any(source.format not in ("text", "indexed", "prompt_completion") for source in tokens.sources)
    return doctor.examine(tokens.figures, rows.figures, recipe.data, tokenizer, vocab_size, chats)


def _validation_source(recipe: Recipe) -> list[SourceRecipe]:
    """The held-out data at a path of their own, read as the first source is."""
    first = recipe.data.all_sources[0]
    return [
        SourceRecipe(path=str(recipe.data.validation), format="auto", columns=first.columns, document=first.document)
    ]


def _rows(
    recipe: Recipe, tokens: TokenSet, recipes: list[SourceRecipe], selection: Selection, tokenizer: Tokenizer
) -> RowSet:
    """Rows of a token set, with at least one from each source."""
    data = recipe.data
    stream = recipe.task == "pretrain" and data.packing
    mask = data.document_mask if data.document_mask is not None else data.packing and not stream
    how = Arrangement(data.seq_len, data.packing, stream, mask, data.too_long, data.filter.deduplicate)
    pad_id = next((each for each in (tokenizer.pad_id, tokenizer.eos_id) if each is not None), 0)
    rows = arrange(tokens, selection, how, recipes, pad_id)
    for source, packed in zip(tokens.sources, rows.sources, strict=True):
        if not len(packed):
            doctor.refuse_empty(source.name, tokens.figures, rows.figures, data, selection.side)
    return rows
