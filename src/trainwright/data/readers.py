"""Rows out of one data file: JSONL, JSON, text, Parquet and Arrow, plain or compressed, a part at a time.

Owns the measure of a file (`size`) and reading any part of it (`RowReader.read`), so that many processes share one
file and none holds it whole. Parts are counted in bytes of the unpacked file for line formats and in rows for the
others; a line belongs to the part in which it starts. Which files there are is in sources.py, what a row means in
formats.py.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trainwright.data.streams import BLOCK_BYTES, COMPRESSIONS, Stream
from trainwright.errors import UserError

Kind = Literal["lines", "array", "text", "parquet", "arrow"]
Unit = Literal["line", "paragraph", "file"]
LINE_KINDS = ("lines", "text")
BATCH_ROWS = 512
SPACE = re.compile(r"[ \t\r\n]*")


class DataFile(NamedTuple):
    """One file to read. `compression` is "", "gz" or "zst"; `document` says what one document is in plain text."""

    path: str
    kind: Kind
    compression: str = ""
    document: Unit = "line"


class Located(NamedTuple):
    """A row and where it stands: its byte in line formats, its number in the others. `bad` says why there is no row."""

    at: int
    row: Any
    bad: str = ""


def look(path: Path, document: Unit = "line") -> DataFile | None:
    """What kind of data file `path` is, by its name and for JSON by its first byte; None for no data file."""
    name = Path(path.name.lower())
    compression = COMPRESSIONS.get(name.suffix, "")
    suffix = Path(name.stem).suffix if compression else name.suffix
    if suffix in (".jsonl", ".ndjson", ".json"):
        with Stream(path, compression) as stream:
            start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        return DataFile(str(path), "array" if start.startswith(b"[") else "lines", compression)
    if suffix in (".txt", ".text"):
        return DataFile(str(path), "text", compression, document)
    if suffix in (".parquet", ".arrow", ".feather") and not compression:
        return DataFile(str(path), "parquet" if suffix == ".parquet" else "arrow")
    return None


def size(file: DataFile, max_line_bytes: int) -> int:
    """Bytes of the unpacked file for line formats, rows for the others.

    Raises:
        UserError: the file cannot be read as its kind.
    """
    if file.kind == "parquet":
        return int(_parquet(file.path).metadata.num_rows)
    if file.kind == "arrow":
        return sum(batch.num_rows for batch in _arrow_batches(file.path))
    if file.kind == "array":
        return sum(1 for _ in _array_items(file, max_line_bytes))
    with Stream(file.path, file.compression) as stream:
        return stream.size()


def places(file: DataFile, ats: Sequence[int]) -> list[str]:
    """Where rising bytes or rows `ats` of `file` are, as a person finds them: `data.jsonl line 12`."""
    if file.kind not in LINE_KINDS:
        return [f"{file.path} row {at + 1}" for at in ats]
    found, line = [], 1
    with Stream(file.path, file.compression) as stream:
        for at in ats:
            while stream.position < at and (block := stream.read(min(at - stream.position, BLOCK_BYTES))):
                line += block.count(b"\n")
            found.append(f"{file.path} line {line}")
    return found


class RowReader:
    """Reads parts of one file. What can only be read forwards goes on from the last part where the next one follows.

    `columns` are the keys that parquet and arrow files are read for; None reads all.
    """

    def __init__(self, file: DataFile, max_line_bytes: int, columns: list[str] | None = None) -> None:
        self.file = file
        self.max_line_bytes = max_line_bytes
        self.columns = columns
        self._stream: Stream | None = None
        self._items: Iterator[Located] | None = None
        self._next = 0

    def read(self, start: int, stop: int) -> Iterator[Located]:
        """Rows of the part [start, stop), each with its place; what cannot be read comes as `bad`."""
        if start >= stop:
            return iter(())
        if self.file.kind == "parquet":
            return self._parquet_rows(start, stop)
        if self.file.kind not in LINE_KINDS:
            return self._counted(start, stop)
        if self.file.document == "file":
            return self._whole(start)
        return self._paragraphs(start, stop) if self.file.document == "paragraph" else self._lines(start, stop)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream, self._items = None, None

    # ---- lines ----

    def _raw_lines(self, start: int) -> Iterator[tuple[int, bytes]]:
        """Byte and bytes of each line from the first that starts at or after `start`. What is longer than allowed
        comes cut, one byte over the limit."""
        stream = self._stream = self._stream or Stream(self.file.path, self.file.compression)
        stream.move(max(0, start - 1))
        if start > 0:  # ends the line that reaches into this part: one newline, where a line starts right at `start`
            stream.skip_line()
        at = stream.position
        while line := stream.readline(self.max_line_bytes + 1):
            if len(line) > self.max_line_bytes and not line.endswith(b"\n"):
                stream.skip_line()
            yield at, line
            at = stream.position

    def _lines(self, start: int, stop: int) -> Iterator[Located]:
        for at, line in self._raw_lines(start):
            if at >= stop:
                return
            if line.strip():
                yield self._decoded(at, line)

    def _decoded(self, at: int, line: bytes) -> Located:
        if len(line) > self.max_line_bytes:
            return Located(at, None, f"longer than {self.max_line_bytes} bytes: split it, or raise data.max_line_bytes")
        try:
            written = line.decode("utf-8-sig" if at == 0 else "utf-8")
            written = written.rstrip("\r\n")
            return Located(at, {"text": written} if self.file.kind == "text" else json.loads(written))
        except UnicodeDecodeError as error:
            return Located(at, None, f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}")
        except json.JSONDecodeError as error:
            return Located(at, None, f"broken JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
        except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
            return Located(at, None, f"broken JSON: {str(error).partition(' while')[0].partition(';')[0]}")

    def _paragraphs(self, start: int, stop: int) -> Iterator[Located]:
        """Runs of lines between blank lines; a run belongs to the part that holds the blank line before it."""
        lines: list[bytes] = []
        begun, length, inside = 0, 0, start == 0
        for at, line in self._raw_lines(start):
            if line.strip():
                if inside:
                    begun = at if not lines else begun
                    length += len(line)
                    if length <= self.max_line_bytes or len(lines) < 2:  # one piece too many shows that it is too long
                        lines.append(line)
                continue
            if lines:
                yield self._decoded(begun, b"".join(lines).replace(b"\r\n", b"\n"))
            if at >= stop:
                return
            lines, length, inside = [], 0, True
        if lines:
            yield self._decoded(begun, b"".join(lines).replace(b"\r\n", b"\n"))

    def _whole(self, start: int) -> Iterator[Located]:
        if start == 0:
            with Stream(self.file.path, self.file.compression) as stream:
                content = stream.read(self.max_line_bytes + 1)
            if content.strip():
                yield self._decoded(0, content)

    # ---- rows ----

    def _counted(self, start: int, stop: int) -> Iterator[Located]:
        """Rows of a kind that is only read forwards."""
        if self._items is None or self._next > start:
            array = self.file.kind == "array"
            self._items = _array_items(self.file, self.max_line_bytes) if array else self._arrow_rows()
            self._next = 0
        while self._next < stop and (item := next(self._items, None)) is not None:
            self._next += 1
            if self._next > start:
                yield item

    def _arrow_rows(self) -> Iterator[Located]:
        at = 0
        for batch in _arrow_batches(self.file.path):
            if self.columns is not None:
                batch = batch.select([name for name in batch.schema.names if name in self.columns])
            for begin in range(0, batch.num_rows, BATCH_ROWS):
                for row in _rows_of(batch.slice(begin, BATCH_ROWS)):
                    yield Located(at, row)
                    at += 1

    def _parquet_rows(self, start: int, stop: int) -> Iterator[Located]:
        reader = _parquet(self.file.path)
        wanted = self.columns and [name for name in reader.schema_arrow.names if name in self.columns]
        first = 0
        for group in range(reader.num_row_groups):
            at, first = first, first + reader.metadata.row_group(group).num_rows
            if at >= stop or first <= start:
                continue
            for batch in reader.iter_batches(BATCH_ROWS, row_groups=[group], columns=wanted):
                if at < stop and at + batch.num_rows > start:
                    begin = max(0, start - at)
                    rows = _rows_of(batch.slice(begin, stop - at - begin))
                    yield from (Located(at + begin + more, row) for more, row in enumerate(rows))
                at += batch.num_rows


# ---- JSON arrays, Arrow, Parquet ----


def _array_items(file: DataFile, longest: int) -> Iterator[Located]:
    """Items of a file that is one JSON array, never holding more than a block and one item of at most `longest`."""
    decoder, text = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    pending, begin, row = "", 0, 0
    with Stream(file.path, file.compression) as stream:

        def more() -> bool:
            nonlocal pending, begin
            block = stream.read(BLOCK_BYTES)
            try:
                pending, begin = pending[begin:] + text.decode(block, final=not block), 0
            except UnicodeDecodeError as error:
                raise UserError(f"{file.path} row {row + 1}: not UTF-8: {error.reason}") from None
            if len(pending) > longest + BLOCK_BYTES:
                raise UserError(f"{file.path} row {row + 1}: broken JSON, or longer than {longest} bytes")
            return bool(block)

        def mark() -> str:
            """The next character that is no space; "" at the end of the file."""
            nonlocal begin
            while True:
                begin = SPACE.match(pending, begin).end()  # type: ignore[union-attr]
                if begin < len(pending) or not more():
                    return pending[begin : begin + 1]

        mark()
        begin += 1  # the bracket that `look` saw
        following = "]" if mark() == "]" else ","
        while following == ",":
            mark()
            try:
                item, end = decoder.raw_decode(pending, begin)
                if end == len(pending) and more():  # a number may go on in the next block
                    continue
            except json.JSONDecodeError as error:
                if more():
                    continue
                raise UserError(f"{file.path} row {row + 1}: broken JSON: {error.msg}") from None
            except (RecursionError, ValueError) as error:
                raise UserError(f"{file.path} row {row + 1}: broken JSON: {error}") from None
            yield Located(row, item)
            begin, row = end, row + 1
            following = mark()
            begin += 1
            if following not in (",", "]"):
                raise UserError(f"{file.path} row {row}: broken JSON: no comma and no ] after it")
        begin += not row  # an empty array's bracket
        if mark():
            raise UserError(
                f"{file.path} goes on after the array of {row} rows that it starts with: "
                'a file is one array, or one object a line, such as {"messages": [...]}'
            )


def _arrow_batches(path: str) -> Iterator[Any]:
    """Record batches of an Arrow file, in the stream format (`datasets` writes it) or the file format (Feather)."""
    import pyarrow as pa

    try:
        with pa.memory_map(path) as source:
            try:
                reader = pa.ipc.open_file(source)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = iter(pa.ipc.open_stream(source))
            yield from batches
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is no Arrow file: {error}") from None


def _rows_of(batch: Any) -> list[dict[str, Any]]:
    """A batch as rows, without nulls inside its columns: Arrow gives every object of a column the keys of all others,
    so arguments of one tool would come with those of the next."""
    return [{key: _without_nulls(value) for key, value in row.items()} for row in batch.to_pylist()]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parquet(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is no Parquet file: {error}") from None
