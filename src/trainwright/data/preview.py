"""Prepared samples as a person reads them: decoded, with the trained tokens in colour.

Owns the display alone. It shows rows as training reads them, so what it shows is what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count as count_from
from itertools import groupby, islice

import numpy as np
from rich.console import Console
from rich.text import Text

from trainwright.data.rows import RowCursor, RowSet
from trainwright.data.shards import IGNORED
from trainwright.data.stream import StreamCursor, StreamSet
from trainwright.data.tokenizer import Tokenizer

TRAINED = "bold green"
READ = "dim"


def show(
    rows: RowSet | StreamSet, tokenizer: Tokenizer, count: int, seed: int, shuffle: bool, console: Console | None = None
) -> None:
    """Prints the first `count` documents in training order."""
    console = console or Console()
    console.print(Text.assemble("trained tokens ", ("in green", TRAINED), ", read only ", ("in grey", READ)))
    cursor = rows.cursor(seed, shuffle)
    try:
        for number, (ids, trained) in enumerate(islice(_documents(rows, cursor), count), start=1):
            title = f"sample {number}: {len(ids)} tokens, {sum(trained)} trained"
            console.rule(title, align="left", style="cyan")
            console.print(decoded(ids, trained, tokenizer))
    finally:
        cursor.close()


def _documents(rows: RowSet | StreamSet, cursor: RowCursor | StreamCursor) -> Iterator[tuple[list[int], list[bool]]]:
    """Documents in training order, with which of their tokens are trained. A row without borders is one document."""
    for position in range(len(rows)) if isinstance(rows, RowSet) else count_from(0):
        arrays = cursor.read(np.array([position]))
        ids, trained = arrays.input_ids[0], np.append(False, arrays.labels[0][:-1] != IGNORED)
        documents = np.zeros(len(ids), np.int32) if arrays.document_ids is None else arrays.document_ids[0]
        used = int(np.flatnonzero(trained | (ids != rows.pad_id))[-1]) + 1
        for document in range(int(documents.max()) + 1):
            mine = np.flatnonzero(documents[:used] == document)
            yield ids[mine].tolist(), trained[mine].tolist()


def decoded(ids: list[int], trained: list[bool], tokenizer: Tokenizer) -> Text:
    """The text of `ids`, coloured by whether each is trained. Special tokens are shown."""
    text = Text()
    for flag, group in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        words = tokenizer.decode([token for token, _ in group], skip_special=False)
        text.append(words, style=TRAINED if flag else READ)
    return text
