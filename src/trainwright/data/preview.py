"""Prepared samples as a person reads them: decoded, with the trained tokens in colour.

Owns the display alone. It shows rows as training reads them, so what it shows is what is trained.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
from rich.console import Console
from rich.text import Text

from trainwright.data.rows import RowSet
from trainwright.data.shards import IGNORED
from trainwright.data.tokenizer import Tokenizer

TRAINED = "bold green"
READ = "dim"


def show(rows: RowSet, tokenizer: Tokenizer, count: int, seed: int, console: Console | None = None) -> None:
    """Prints the first `count` documents in training order."""
    console = console or Console()
    cursor = rows.cursor(seed, True)
    console.print(Text.assemble("trained tokens ", ("in green", TRAINED), ", read only ", ("in grey", READ)))
    shown = position = 0
    while shown < count:
        arrays = cursor.read(np.array([position]))
        ids, targets = arrays.input_ids[0], np.append(IGNORED, arrays.labels[0][:-1])
        documents = arrays.document_ids[0] if arrays.document_ids is not None else np.zeros(len(ids), np.int32)
        used = int(np.flatnonzero((targets != IGNORED) | (ids != rows.pad_id))[-1]) + 1
        documents = np.where(np.arange(len(ids)) < used, documents, -1)
        for document in range(int(documents.max()) + 1):
            if shown == count:
                return
            mine = documents == document
            trained = targets[mine] != IGNORED
            shown += 1
            console.rule(
                f"sample {shown}: {int(mine.sum())} tokens, {int(trained.sum())} trained", align="left", style="cyan"
            )
            console.print(decoded(ids[mine].tolist(), trained.tolist(), tokenizer))
        position += 1


def decoded(ids: list[int], trained: list[bool], tokenizer: Tokenizer) -> Text:
    """The text of `ids`, coloured by whether each is trained. Special tokens are shown."""
    text = Text()
    for flag, group in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        words = tokenizer.decode([token for token, _ in group], skip_special=False)
        text.append(words, style=TRAINED if flag else READ)
    return text
