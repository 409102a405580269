"""What a person sees while data are prepared, and the lines that sum it up.

Owns words and the bar; figures come from tokenized.py and arrange.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

DROPPED = {
    "dropped_short": "of too few characters",
    "dropped_long": "of too many characters",
    "dropped_empty": "without a token",
    "dropped_few_tokens": "of too few tokens",
    "dropped_many_tokens": "of too many tokens",
    "dropped_duplicate": "whose text came before",
    "untrained": "without a trained token in seq_len",
}


class Progress:
    """A progress bar on standard error when `visible`, silence otherwise."""

    def __init__(self, visible: bool) -> None:
        self.console = Console(stderr=True, quiet=not visible)

    @contextlib.contextmanager
    def bar(self, what: str, total_bytes: int) -> Iterator[Callable[[float], None]]:
        """Yields a function that is told the bytes done since its last call."""
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        hidden = not self.console.is_terminal  # in a log, a bar that vanishes would be an empty line
        with Bar(*columns, TimeRemainingColumn(), console=self.console, transient=True, disable=hidden) as bar:
            task = bar.add_task(what, total=max(1, total_bytes))
            yield lambda done: bar.advance(task, done)

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def summary(name: str, tokens: Mapping[str, int], rows: Mapping[str, int], seq_len: int, policy: str) -> list[str]:
    """What became of the data: one line for the rows, one for each thing that was left out or changed."""
    full = rows["row_tokens"] / max(1, rows["rows"] * seq_len)
    trained = rows["trained"] / max(1, rows["row_tokens"])
    lines = [
        f"{name}: {rows['documents']:,} documents, {rows['row_tokens']:,} tokens ({min(1.0, trained):.1%} trained), "
        f"{rows['rows']:,} rows of {seq_len}, {full:.1%} full"
    ]
    both = {**tokens, **rows}
    dropped = [f"{both[key]:,} {words}" for key, words in DROPPED.items() if both.get(key)]
    if dropped:
        lines.append(f"  dropped: {', '.join(dropped)}")
    if rows.get("too_long"):
        done = {"truncate": "truncated", "drop": "dropped", "split": "split"}.get(policy, policy)
        lines.append(f"  longer than seq_len and {done}: {rows['too_long']:,}")
    if tokens.get("bad_rows"):
        lines.append(f"  skipped: {tokens['bad_rows']:,} bad rows")
    if tokens.get("empty_files"):
        lines.append(f"  empty files: {tokens['empty_files']:,}")
    if tokens.get("replaced_characters"):
        lines.append(f"  samples with replaced characters (U+FFFD): {tokens['replaced_characters']:,}")
    return lines
