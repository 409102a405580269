"""Tokenized documents put into rows, on disk: `arrange`.

Owns the key under which rows are kept and the walk over shards; the arithmetic is in packing.py. Only lengths and
records are read here, a window at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainwright.data.cache import digest, only_writer, read_json, write_json
from trainwright.data.packing import (
    WINDOW,
    Rows,
    Selection,
    StreamCutter,
    TooLong,
    find_duplicates,
    fit_documents,
    pack_rows,
    pad_rows,
)
from trainwright.data.rows import PackedSource, RowSet, RowWriter
from trainwright.data.shards import Shard
from trainwright.data.tokenized import TokenSet
from trainwright.recipe.data import SourceRecipe

VERSION = 1  # raised when the same tokens would give other rows


class Arrangement(NamedTuple):
    """How documents become rows. `stream`: one after another without gaps, as pretraining reads them."""

    seq_len: int
    packing: bool
    stream: bool
    document_mask: bool
    too_long: TooLong
    deduplicate: bool


def arrange(
    tokens: TokenSet, selection: Selection, how: Arrangement, recipes: Sequence[SourceRecipe], pad_id: int
) -> RowSet:
    """Rows of the documents that `selection` takes, made now or found in the cache.

    Raises:
        UserError: a document is too long and `too_long` is raise.
    """
    key = digest(VERSION, selection, how)
    folder = tokens.folder / f"rows-{key[:16]}"
    done = folder / "done.json"
    if not done.exists():
        with only_writer(folder):
            if not done.exists():
                figures: Counter[str] = Counter()
                duplicates = _duplicates(tokens, how.deduplicate)
                for number, prefixes in enumerate(tokens.shards):
                    _write(folder / f"source-{number}", prefixes, duplicates, selection, how, figures)
                write_json(done, figures)
    packed = [PackedSource(folder / f"source-{number}", prefixes) for number, prefixes in enumerate(tokens.shards)]
    epochs = [source.epochs for source in recipes]
    weights = [source.weight for source in recipes if source.weight is not None] or None
    fingerprint = digest(tokens.key, key, epochs, weights)
    return RowSet(how.seq_len, pad_id, how.document_mask, packed, epochs, weights, fingerprint, read_json(done))


def _duplicates(tokens: TokenSet, deduplicate: bool) -> dict[str, np.ndarray]:
    """For each shard, which documents came before in any source."""
    if not deduplicate:
        return {}
    prefixes = [prefix for shards in tokens.shards for prefix in shards]
    return dict(zip(prefixes, find_duplicates([Shard(prefix) for prefix in prefixes]), strict=True))


def _write(
    prefix: Path,
    shards: Sequence[str],
    duplicates: dict[str, np.ndarray],
    selection: Selection,
    how: Arrangement,
    figures: Counter[str],
) -> None:
    """Writes the rows of one source and adds to `figures`."""
    make = _stream if how.stream else _documents
    with RowWriter(prefix) as writer:
        for rows in make(shards, duplicates, selection, how, figures):
            writer.add(rows)
    figures["rows"] += writer.rows
    # a row of a stream holds one token more than it counts: the next row's first
    figures["row_tokens"] += writer.tokens - (max(0, writer.rows - 1) if how.stream else 0)


def _stream(
    shards: Sequence[str],
    duplicates: dict[str, np.ndarray],
    selection: Selection,
    how: Arrangement,
    figures: Counter[str],
) -> Iterator[Rows]:
    cutter = StreamCutter(how.seq_len, how.document_mask)
    for number, prefix in enumerate(shards):
        shard = Shard(prefix)
        chosen = selection.choose(shard, duplicates.get(prefix), figures)
        figures["documents"] += len(chosen)
        figures["trained"] += int(shard.records["trained"][chosen].sum())
        yield cutter.add(number, shard.starts[chosen], shard.lengths[chosen])
    yield cutter.finish()


def _documents(
    shards: Sequence[str],
    duplicates: dict[str, np.ndarray],
    selection: Selection,
    how: Arrangement,
    figures: Counter[str],
) -> Iterator[Rows]:
    """Whole documents, packed or padded, a window of them at a time."""
    waiting: list[np.ndarray] = []
    for number, prefix in enumerate(shards):
        shard = Shard(prefix)
        chosen = selection.choose(shard, duplicates.get(prefix), figures)
        waiting.append(fit_documents(shard, number, chosen, how.seq_len, how.too_long, figures))
        if not how.packing:
            yield pad_rows(waiting.pop())
        elif sum(map(len, waiting)) >= WINDOW:
            yield pack_rows(np.concatenate(waiting), how.seq_len)
            waiting = []
    if waiting:
        yield pack_rows(np.concatenate(waiting), how.seq_len)
