"""The data of a recipe, made ready once: tokenized into a cache, put into rows, checked.

Owns the order of the steps. Any number of processes may call `prepare` at once, outside of any collective: one does
the work while the others wait on a file lock, then all of them find it done.

    CACHE/shipped/                 rows of the shipped data set
    CACHE/tokens/KEY/              shards; KEY is of files, tokenizer, template and what else decides tokens
    CACHE/tokens/KEY/rows-KEY/     rows; this KEY is of seq_len, packing, filters: changing them tokenizes nothing
    CACHE/stream/KEY/              with data.streaming: the shards around the place where training is
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainwright.data import doctor
from trainwright.data.arrange import Arrangement, arrange
from trainwright.data.cache import cache_folder, digest, only_writer
from trainwright.data.encode import EncodeSettings
from trainwright.data.packing import Selection
from trainwright.data.pool import plan_parts, save_tokenizer
from trainwright.data.progress import Progress, summary
from trainwright.data.rows import RowSet
from trainwright.data.sources import Source
from trainwright.data.stream import StreamSet
from trainwright.data.tokenized import TokenSet, plan_work, tokenize
from trainwright.data.tokenizer import Tokenizer
from trainwright.errors import UserError
from trainwright.recipe.data import DataFormat, SourceRecipe
from trainwright.recipe.schema import Recipe


@dataclass
class Prepared:
    """What training reads, and the lines that say what became of the data. `folder` holds the shards."""

    folder: Path
    train: RowSet | StreamSet
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
        UserError: the data cannot be read, hold nothing to train on, or the doctor refuses them; or the cache cannot
            be written.
    """
    try:
        return _prepare(recipe, tokenizer, vocab_size, progress)
    except OSError as error:
        cache = cache_folder(recipe.data.cache)
        raise UserError(
            f"{error.filename or cache}: {error.strerror or error}; prepared data go to {cache}, "
            "data.cache chooses another place"
        ) from error


def _prepare(recipe: Recipe, tokenizer: Tokenizer, vocab_size: int | None, progress: bool) -> Prepared:
    data = recipe.data
    shown = Progress(progress)
    limits = (data.filter.min_tokens, data.filter.max_tokens)
    held_out = data.validation if isinstance(data.validation, float) else 0.0
    train: RowSet | StreamSet
    validation = None
    if data.streaming:
        train = _streamed(recipe, tokenizer, vocab_size, shown)
        folder, lines = train.folder, [f"train: a stream of {sum(map(len, train.lanes)):,} parts"]
        if data.on_bad_row == "skip":
            lines.append(f"  bad rows are listed as they come in {folder}/part-*.bad.txt")
    else:
        tokens = tokenize(data, data.all_sources, encode_settings(recipe), tokenizer, shown)
        train = _rows(recipe, tokens, data.all_sources, Selection(*limits, held_out, "train"), tokenizer)
        folder, lines = tokens.folder, summary("train", tokens.figures, train.figures, data.seq_len, data.too_long)
        if tokens.bad_rows.exists():
            lines.append(f"  bad rows are listed in {tokens.bad_rows}")
        doctor.refuse(_examine(recipe, tokens.sources, tokens.figures, train.figures, tokenizer, vocab_size))
        if held_out:
            validation = _rows(recipe, tokens, data.all_sources, Selection(*limits, held_out, "validation"), tokenizer)
    if isinstance(data.validation, str):
        sources = _validation_source(recipe)
        other = tokenize(data, sources, encode_settings(recipe), tokenizer, shown)
        validation = _rows(recipe, other, sources, Selection(*limits), tokenizer)
        doctor.refuse(_examine(recipe, other.sources, other.figures, validation.figures, tokenizer, vocab_size))
    if validation is not None:
        lines += summary("validation", {}, validation.figures, data.seq_len, data.too_long)
    for line in lines:
        shown.say(line)
    return Prepared(folder, train, validation, lines)


def encode_settings(recipe: Recipe) -> EncodeSettings:
    """What of a recipe decides the tokens of a sample."""
    data = recipe.data
    loss_on = "all" if recipe.task == "pretrain" else data.loss_on
    return EncodeSettings(data.template, data.system, loss_on, data.filter.min_characters, data.filter.max_characters)


def _examine(
    recipe: Recipe,
    sources: list[Source],
    tokens: dict[str, int],
    rows: dict[str, int],
    tokenizer: Tokenizer,
    vocab_size: int | None,
) -> list[doctor.Complaint]:
    """The doctor's complaints about prepared data."""
    chats = any(source.format not in ("text", "indexed", "prompt_completion") for source in sources)
    return doctor.examine(tokens, rows, recipe.data, tokenizer, vocab_size, chats)


def _validation_source(recipe: Recipe) -> list[SourceRecipe]:
    """The held-out data at a path of their own, read as the first source is: in its format where that is said."""
    first, path = recipe.data.all_sources[0], str(recipe.data.validation)
    if path.startswith(("shipped:", "made:")) or path.endswith((".bin", ".idx")):
        return [SourceRecipe(path=path, format="auto")]
    form: DataFormat = "auto" if first.format == "indexed" else first.format
    return [SourceRecipe(path=path, format=form, columns=first.columns, document=first.document)]


def _rows(
    recipe: Recipe, tokens: TokenSet, recipes: list[SourceRecipe], selection: Selection, tokenizer: Tokenizer
) -> RowSet:
    """Rows of a token set, with at least one from each source."""
    rows = arrange(tokens, selection, _arrangement(recipe), recipes, _pad_id(tokenizer))
    for source, packed in zip(tokens.sources, rows.sources, strict=True):
        if not len(packed):
            doctor.refuse_empty(source.name, tokens.figures, rows.figures, recipe.data, selection.side)
    return rows


def _arrangement(recipe: Recipe) -> Arrangement:
    """How documents become rows: pretraining reads one stream, fine-tuning keeps samples apart."""
    data = recipe.data
    stream = recipe.task == "pretrain" and data.packing
    mask = data.document_mask if data.document_mask is not None else data.packing and not stream
    return Arrangement(data.seq_len, data.packing, stream, mask, data.too_long, data.filter.deduplicate)


def _pad_id(tokenizer: Tokenizer) -> int:
    """What stands in places that nothing looks at."""
    return next((each for each in (tokenizer.pad_id, tokenizer.eos_id) if each is not None), 0)


def _streamed(recipe: Recipe, tokenizer: Tokenizer, vocab_size: int | None, shown: Progress) -> StreamSet:
    """The stream, after the doctor has seen the first part of each lane.

    Raises:
        UserError: the recipe asks for what a stream cannot do.
    """
    data = recipe.data
    for wrong, fix in (
        (data.filter.deduplicate, "data.filter.deduplicate must see all texts: set it to false"),
        (isinstance(data.validation, float) and data.validation > 0, "give data.validation a path"),
        (recipe.train.epochs is not None, "its length is not known: set train.steps or train.tokens"),
        (any(source.epochs % 1 for source in data.all_sources), "data.sources[].epochs must be whole numbers"),
    ):
        if wrong:
            raise UserError(f"data.streaming: {fix}")
    sources, work, key = plan_work(data, data.all_sources, encode_settings(recipe), tokenizer)
    if any(source.indexed for source in sources):
        raise UserError("data.streaming: .bin/.idx files are tokens already and read as they are: set it to false")
    folder = cache_folder(data.cache) / "stream" / key[:16]
    with only_writer(folder):
        work.save(folder)
        save_tokenizer(tokenizer, folder)
    parts = plan_parts(sources, data.max_line_bytes, whole_packed=True)
    by_source = [[part for part in parts if part.source == number] for number in range(len(sources))]
    weights = [source.weight for source in data.all_sources if source.weight is not None] or None
    repeated = [own * int(source.epochs) for own, source in zip(by_source, data.all_sources, strict=True)]
    how, selection = _arrangement(recipe), Selection(data.filter.min_tokens, data.filter.max_tokens)
    stream = StreamSet(
        data.seq_len,
        _pad_id(tokenizer),
        how.document_mask,
        folder,
        by_source if weights else [[part for own in repeated for part in own]],
        weights,
        how,
        selection,
        data.workers,
        vocab_size,
        digest(key, how, selection, weights, [source.epochs for source in data.all_sources]),
    )
    with shown.bar("tokenizing the start of the stream", 0):
        tokens, rows = stream.examine(recipe.train.seed, data.shuffle)
    doctor.refuse(_examine(recipe, sources, tokens, rows, tokenizer, vocab_size))
    return stream
