"""Tokenizes one part of a source into one shard; as a process, part after part as it is told.

Owns what happens to a part between its rows and its shard. Which parts there are, and starting the processes, is in
pool.py. A process speaks JSON lines: parts come in on standard input, progress and results go out on standard output.
So nothing is pickled, and a caller's script needs no `if __name__ == "__main__"`.

    python -m trainwright.data.worker FOLDER [--shared]
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from trainwright.data.cache import read_json, try_claim, write_json
from trainwright.data.encode import Encoder, EncodeSettings
from trainwright.data.formats import BadRow, Sample, to_sample
from trainwright.data.indexed import token_type
from trainwright.data.readers import LINE_KINDS, RowReader, places
from trainwright.data.shards import Document, ShardWriter
from trainwright.data.sources import Source
from trainwright.data.tokenizer import Tokenizer, load_tokenizer
from trainwright.errors import UserError

BATCH_CHARACTERS = 1 << 19
BATCH_SAMPLES = 1024
LISTED = 1000  # bad rows listed for a part; all are counted


class Part(NamedTuple):
    """Units [start, stop) of one file of one source: bytes or rows. `bytes` is its share of the file on disk."""

    number: int
    source: int
    file: int
    start: int
    stop: int
    bytes: int

    def prefix(self, folder: Path) -> Path:
        return folder / f"part-{self.number:05d}"

    def done(self, folder: Path) -> bool:
        """Whether its shard is whole."""
        return self.prefix(folder).with_suffix(".json").exists()


class Work(NamedTuple):
    """What all parts have in common. Stored as work.json, so that a process finds it."""

    sources: list[Source]
    settings: EncodeSettings
    skip_bad: bool
    max_line_bytes: int

    def save(self, folder: Path) -> None:
        stored = {**self._asdict(), "sources": [source.to_json() for source in self.sources]}
        write_json(folder / "work.json", {**stored, "settings": self.settings._asdict()})

    @classmethod
    def load(cls, folder: Path) -> Work:
        stored = read_json(folder / "work.json")
        sources = [Source.from_json(source) for source in stored["sources"]]
        return cls(**{**stored, "sources": sources, "settings": EncodeSettings(**stored["settings"])})


class PartTokenizer:
    """Tokenizes parts, keeping the last file open: the next part often follows in it."""

    def __init__(self, work: Work, tokenizer: Tokenizer) -> None:
        self.work = work
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer, work.settings)
        self._reader: RowReader | None = None

    def run(self, part: Part, folder: Path, progress: Callable[[float], None]) -> None:
        """Writes the part's shard, and its figures as PREFIX.json, last: a part with that file is whole.

        Args:
            progress: called with the share of the part that is done.

        Raises:
            UserError: a bad row, unless bad rows are skipped.
        """
        prefix = part.prefix(folder)
        figures: Counter[str] = Counter()
        bad: list[tuple[int, str]] = []
        self.encoder.counts = Counter()
        writer = ShardWriter(prefix, token_type(self.tokenizer.vocab_size))
        for ats, samples in self._batches(part, bad, figures):
            documents: list[Document] = []
            for at, found in zip(ats, self.encoder.encode(samples), strict=True):
                if isinstance(found, BadRow):
                    self._refuse(part, at, str(found), bad, figures)
                elif not found.ids:
                    self.encoder.counts["dropped_empty"] += 1
                else:
                    documents.append(found)
            if documents:
                writer.add(documents)
            if ats:
                progress((ats[-1] - part.start) / max(1, part.stop - part.start))
        writer.close()
        figures += Counter(documents=writer.documents, tokens=writer.tokens, max_id=writer.max_id)
        write_json(prefix.with_suffix(".json"), {**figures, **self.encoder.counts, "bad": sorted(bad)})

    def list_bad(self, part: Part, folder: Path) -> None:
        """Writes the bad rows that a streamed part skipped as PREFIX.bad.txt, which outlives its shard.

        Places are bytes in line formats: counting lines would read all of a huge file before them.
        """
        bad = read_json(part.prefix(folder).with_suffix(".json"))["bad"]
        if bad:
            file = self.work.sources[part.source].files[part.file]
            unit, first = ("byte", 0) if file.kind in LINE_KINDS else ("row", 1)
            lines = "".join(f"{file.path} {unit} {at + first}: {reason}\n" for at, reason in bad)
            part.prefix(folder).with_suffix(".bad.txt").write_text(lines, encoding="utf-8")

    def _batches(
        self, part: Part, bad: list[tuple[int, str]], figures: Counter[str]
    ) -> Iterator[tuple[list[int], list[Sample]]]:
        """Samples of a part in batches, with the places of their rows."""
        source = self.work.sources[part.source]
        ats: list[int] = []
        samples: list[Sample] = []
        characters = 0
        for at, row, problem in self._reader_for(part).read(part.start, part.stop):
            try:
                if problem:
                    raise BadRow(problem)
                sample = to_sample(row, source.format, source.columns)
            except BadRow as reason:
                self._refuse(part, at, str(reason), bad, figures)
                continue
            figures["rows"] += 1
            if not self.encoder.keeps(sample):
                continue
            ats.append(at)
            samples.append(sample)
            characters += sample.characters
            if characters >= BATCH_CHARACTERS or len(samples) >= BATCH_SAMPLES:
                yield ats, samples
                ats, samples, characters = [], [], 0
        yield ats, samples

    def _reader_for(self, part: Part) -> RowReader:
        file = self.work.sources[part.source].files[part.file]
        if self._reader is None or self._reader.file != file:
            if self._reader is not None:
                self._reader.close()
            self._reader = RowReader(file, self.work.max_line_bytes)
        return self._reader

    def _refuse(self, part: Part, at: int, reason: str, bad: list[tuple[int, str]], figures: Counter[str]) -> None:
        if not self.work.skip_bad:
            file = self.work.sources[part.source].files[part.file]
            raise UserError(f"{places(file, [at])[0]}: {reason} (data.on_bad_row=skip goes on without such rows)")
        figures["bad_rows"] += 1
        if len(bad) < LISTED:
            bad.append((at, reason))


def main(folder: Path, shared: bool) -> None:
    """Works on the parts that standard input names, one a line, until it ends.

    Args:
        shared: other processes work in the folder too, so each part is claimed first.
    """

    def say(**words: object) -> None:
        print(json.dumps(words), flush=True)

    try:
        tokenizing = PartTokenizer(Work.load(folder), load_tokenizer(folder / "tokenizer"))
        for line in sys.stdin:
            part = Part(*json.loads(line))
            lock = part.prefix(folder).with_suffix(".lock")
            with try_claim(lock) if shared else contextlib.nullcontext(True) as mine:
                if mine and not part.done(folder):
                    tokenizing.run(part, folder, lambda share: say(share=share))
                    if shared:
                        tokenizing.list_bad(part, folder)
            say(done=True)
    except (UserError, OSError) as error:
        say(error=str(error))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main(Path(sys.argv[1]), shared="--shared" in sys.argv[2:])
