"""Files in every kind and packing, in parts: each row once, whatever the cut; and one line for each thing wrong."""

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.data.readers import DataFile, RowReader, look, places, size
from trainwright.errors import UserError

LIMIT = 1 << 20
ROWS = [{"text": f"row {number} é" + "x" * (number * 7 % 50)} for number in range(60)]


def write(folder: Path, name: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / name
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    table = pa.Table.from_pylist(rows)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines[: len(lines) // 2]) + gzip.compress(lines[len(lines) // 2 :]))
    elif name.endswith(".zst"):
        pack = zstandard.ZstdCompressor().compress
        path.write_bytes(pack(lines[: len(lines) // 2]) + pack(lines[len(lines) // 2 :]))
    elif name.endswith(".parquet"):
        pq.write_table(table, path, row_group_size=13)
    elif name == "stream.arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=11)
    elif name.endswith((".arrow", ".feather")):
        pa.feather.write_feather(table, path, compression="uncompressed", chunksize=11)
    elif name == "array.json":
        path.write_text("\n " + json.dumps(rows, indent=2, ensure_ascii=False) + "\n ", encoding="utf-8")
    elif name == "bom.jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + lines)
    elif name == "open_end.jsonl":
        path.write_bytes(lines.rstrip(b"\n"))
    elif name == "blank.jsonl":
        path.write_bytes(lines.replace(b"\n", b"\r\n\n"))
    elif name.endswith(".txt"):
        path.write_text("".join(row["text"] + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_bytes(lines)
    return path


NAMES = [
    "plain.jsonl", "bom.jsonl", "open_end.jsonl", "blank.jsonl", "lines.json", "array.json", "packed.jsonl.gz",
    "packed.jsonl.zst", "table.parquet", "stream.arrow", "file.arrow", "file.feather", "lines.txt",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_parts_together_give_each_row_once(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = look(write(tmp_path_factory.mktemp("data"), name))
    assert file is not None
    total = size(file, LIMIT)

    @given(st.lists(st.integers(0, total), max_size=5).map(sorted), st.booleans())
    def any_cut(cuts: list[int], keep_reader: bool) -> None:
        reader = RowReader(file, LIMIT)
        found = []
        for start, stop in zip([0, *cuts], [*cuts, total], strict=True):
            reader = reader if keep_reader else RowReader(file, LIMIT)
            found += list(reader.read(start, stop))
        assert [row.row for row in found] == ROWS
        assert not any(row.bad for row in found)
        # reading again from the start, as a retry would
        assert [row.row for row in reader.read(0, total)] == ROWS

    any_cut()


@given(
    st.lists(st.sampled_from(["a", "bb", "", " ", "ccc"]), max_size=30),
    st.lists(st.integers(0, 80), max_size=4).map(sorted),
)
def test_paragraphs_are_the_same_whatever_the_parts(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("data") / "book.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    file = DataFile(str(path), "text", "", "paragraph")
    total = path.stat().st_size
    cuts = [min(cut, total) for cut in cuts]
    found = [
        row.row["text"]
        for start, stop in zip([0, *cuts], [*cuts, total], strict=True)
        for row in RowReader(file, LIMIT).read(start, stop)
    ]
    wanted, run = [], []
    for line in [*lines, ""]:
        if line.strip():
            run.append(line)
        elif run:
            wanted.append("\n".join(run))
            run = []
    assert found == wanted


def test_a_file_can_be_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\n\ntwo\n")
    file = look(path, "file")
    assert file is not None
    assert [row.row for row in RowReader(file, LIMIT).read(0, 8)] == [{"text": "one\n\ntwo"}]
    assert "longer than 4 bytes" in next(RowReader(file, 4).read(0, 8)).bad


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "half', "broken JSON: Unterminated string starting at column 10"),
        (b'{"text": "\xff"}', "not UTF-8: byte 0xff at column 11"),
        (b"[" * 100_000, "broken JSON: maximum recursion depth exceeded"),
        (b'{"text": ' + b"1" * 5000 + b"}", "broken JSON: Exceeds the limit"),
        (b'{"text": "' + b"x" * LIMIT + b'"}', "longer than 1048576 bytes: split it, or raise data.max_line_bytes"),
    ],
)
def test_a_bad_line_is_reported_with_its_place_and_reading_goes_on(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    file = look(path)
    assert file is not None
    found = list(RowReader(file, LIMIT).read(0, size(file, LIMIT)))
    assert [row.row for row in found] == [{"text": "a"}, None, {"text": "b"}]
    assert words in found[1].bad
    assert places(file, [found[0].at, found[1].at]) == [f"{path} line 1", f"{path} line 3"]


def test_memory_stays_small_however_long_a_line_is(tmp_path: Path) -> None:
    """A line over the limit is skipped in blocks, never held."""
    path = tmp_path / "long.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(b'{"text": "')
        for _ in range(64):
            stream.write(b"x" * (1 << 20))
        stream.write(b'"}\n{"text": "b"}\n')
    import tracemalloc

    file = look(path)
    assert file is not None
    tracemalloc.start()
    found = list(RowReader(file, LIMIT).read(0, 1 << 40))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[1].row == {"text": "b"}
    assert peak < 16 << 20


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'[{"text": "a"}, {"text": ]', "row 2: broken JSON"),
        ("a.json", b'[{"text": "a"}, ', "row 2: broken JSON"),
        ("a.json", b'[{"text": "a"}{"text": "b"}]', "row 1: broken JSON: no comma"),
        ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]\n', "goes on after the array of 1 rows"),  # nothing is lost
        ("a.json", b"[] x", "goes on after the array of 0 rows"),
        ("a.json", b'[{"text": "\xff"}]', "row 1: not UTF-8"),
        ("a.json", b"[" * 100_000, "row 1: broken JSON: maximum recursion"),
        ("a.json", b"[" + b"1" * 5000 + b"]", "row 1: broken JSON: Exceeds the limit"),
        ("a.json", b'[{"text": "' + b"x" * (3 << 20), "row 1: broken JSON, or longer than 1048576 bytes"),
        ("a.jsonl.gz", b"not gzip", "breaks off or is no gz file"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 100, mtime=0)[:-9], "breaks off or is no gz file"),
        ("a.jsonl.zst", b"not zstd", "breaks off or is no zst file"),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(b"{}\n" * 100)[:-5], "breaks off or is no zst file"),
        ("a.parquet", b"not parquet", "is no Parquet file"),
        ("a.arrow", b"not arrow!!!", "is no Arrow file"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    def read() -> None:
        file = look(path)
        assert file is not None
        list(RowReader(file, LIMIT).read(0, size(file, LIMIT)))

    with pytest.raises(UserError, match=words) as caught:
        read()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_columns_of_objects_bring_no_keys_of_other_rows(tmp_path: Path, name: str) -> None:
    """Arrow fills every object with the keys of all rows; a call must not gain the arguments of another tool."""
    rows = [{"calls": [{"arguments": {"a": 1}}], "text": None}, {"calls": [{"arguments": {"b": "x"}}], "text": "t"}]
    file = look(write(tmp_path, name, rows))
    assert file is not None
    assert [row.row for row in RowReader(file, LIMIT).read(0, 2)] == rows


def test_other_files_are_not_data(tmp_path: Path) -> None:
    for name in ("notes.md", "weights.safetensors", "archive.tar.gz", "noname"):
        (tmp_path / name).write_text("x")
        assert look(tmp_path / name) is None


@settings(max_examples=150)
@given(
    st.binary(max_size=300) | st.text(alphabet='[]{}",:0.e- \n\\uab', max_size=60).map(str.encode),
    st.sampled_from(NAMES),
)
def test_whatever_a_file_holds_is_rows_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    path = tmp_path_factory.mktemp("data") / name
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        file = look(path)
        assert file is not None
        for row in RowReader(file, 100).read(0, size(file, 100)):
            assert row.bad or row.row is not None or file.kind in ("lines", "array")
