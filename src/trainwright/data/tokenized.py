"""Sources as shards of tokens in the cache: `tokenize`.

Owns the key under which tokens are kept and the figures of a whole token set. What a part becomes is in worker.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from trainwright.data.cache import cache_folder, digest, only_writer, read_json, write_json
from trainwright.data.encode import EncodeSettings
from trainwright.data.pool import plan_parts, tokenize_parts
from trainwright.data.progress import Progress
from trainwright.data.readers import places
from trainwright.data.shards import Shard
from trainwright.data.sources import Source, resolve
from trainwright.data.template import load_template
from trainwright.data.tokenizer import Tokenizer
from trainwright.data.worker import Part, Work
from trainwright.errors import UserError
from trainwright.recipe.data import DataRecipe, SourceRecipe

VERSION = 2  # raised when the same recipe would give other tokens
COUNTED_TOGETHER = 1 << 24


@dataclass
class TokenSet:
    """Shards of several sources: `shards[i]` are the prefixes of source i, in the order of its rows."""

    folder: Path
    key: str
    sources: list[Source]
    shards: list[list[str]]
    figures: dict[str, int]

    @property
    def bad_rows(self) -> Path:
        """The list of rows that were skipped; absent when there are none."""
        return self.folder / "bad_rows.txt"


def tokenize(
    data: DataRecipe, recipes: list[SourceRecipe], settings: EncodeSettings, tokenizer: Tokenizer, shown: Progress
) -> TokenSet:
    """Tokenizes what the cache does not hold yet of the sources `recipes`.

    Raises:
        UserError: a source or a row cannot be read.
    """
    sources, work, key = plan_work(data, recipes, settings, tokenizer)
    folder = cache_folder(data.cache) / "tokens" / key[:16]
    done = folder / "done.json"
    if not done.exists():
        with only_writer(folder):
            if not done.exists():
                parts = plan_parts(sources, data.max_line_bytes)
                with shown.bar("tokenizing", sum(part.bytes for part in parts)) as advance:
                    tokenize_parts(parts, work, tokenizer, folder, data.workers, advance)
                write_json(done, _summary(folder, sources, parts, tokenizer))
    summary = read_json(done)
    return TokenSet(folder, key, sources, _shards(folder, sources, summary["parts"]), summary["figures"])


def plan_work(
    data: DataRecipe, recipes: list[SourceRecipe], settings: EncodeSettings, tokenizer: Tokenizer
) -> tuple[list[Source], Work, str]:
    """The sources behind the recipe, what is done with them, and the key of all that decides their tokens."""
    sources = [resolve(source, cache_folder(data.cache) / "shipped", data.max_line_bytes) for source in recipes]
    work = Work(sources, settings, data.on_bad_row == "skip", data.max_line_bytes)
    key = digest(
        VERSION,
        [source.fingerprint() for source in sources],
        [tokenizer.fingerprint, tokenizer.stop_ids],
        _template_fingerprint(sources, settings, tokenizer),
        settings,
        [work.skip_bad, work.max_line_bytes],
    )
    return sources, work, key


def _summary(folder: Path, sources: list[Source], parts: list[Part], tokenizer: Tokenizer) -> dict[str, object]:
    """Figures of all parts together, and which source each part belongs to."""
    figures: Counter[str] = Counter()
    bad: list[str] = []
    for part in parts:
        found = read_json(part.prefix(folder).with_suffix(".json"))
        if listed := found.pop("bad"):
            ats, reasons = zip(*listed, strict=True)
            where = places(sources[part.source].files[part.file], ats)
            bad += [f"{place}: {reason}" for place, reason in zip(where, reasons, strict=True)]
        _add(figures, found)
    for source in sources:
        for prefix in source.indexed:
            _add(figures, _count_indexed(Shard(prefix), tokenizer))
    figures["empty_files"] = sum(source.empty_files for source in sources)
    if bad:
        (folder / "bad_rows.txt").write_text("\n".join(bad) + "\n", encoding="utf-8")
    return {"figures": figures, "parts": [part.source for part in parts]}


def _add(figures: Counter[str], more: dict[str, int]) -> None:
    largest = max(figures["max_id"], more.get("max_id", 0))
    figures.update(more)
    figures["max_id"] = largest


def _count_indexed(shard: Shard, tokenizer: Tokenizer) -> dict[str, int]:
    """Figures of a Megatron data set, which no part counted."""
    blocks = range(0, len(shard.tokens), COUNTED_TOGETHER)
    filled = shard.lengths > 0
    starts, lengths = shard.starts[filled], shard.lengths[filled]
    twice = starts[lengths > 1]
    return {
        "rows": len(starts),
        "documents": len(starts),
        "tokens": int(lengths.sum()),
        "double_bos": int(
            ((shard.tokens[twice] == tokenizer.bos_id) & (shard.tokens[twice + 1] == tokenizer.bos_id)).sum()
        ),
        "missing_eos": int((shard.tokens[starts + lengths - 1] != tokenizer.eos_id).sum()),
        "max_id": max((int(shard.tokens[at : at + COUNTED_TOGETHER].max()) for at in blocks), default=0),
    }


def _shards(folder: Path, sources: list[Source], source_of_part: list[int]) -> list[list[str]]:
    shards = [list(source.indexed) for source in sources]
    for number, source in enumerate(source_of_part):
        shards[source].append(str(folder / f"part-{number:05d}"))
    return shards


def _template_fingerprint(sources: list[Source], settings: EncodeSettings, tokenizer: Tokenizer) -> str:
    """Of the chat template, where one may be used. Plain text needs none, so a tokenizer may lack it."""
    forms = {source.format for source in sources}
    if forms <= {"text", "indexed"}:
        return ""
    try:
        return load_template(settings.template, tokenizer).fingerprint
    except UserError:
        if forms <= {"text", "indexed", "prompt_completion"}:
            return ""
        raise
