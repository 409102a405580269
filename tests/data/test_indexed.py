"""Megatron-LM's .bin/.idx, byte for byte. The bytes below were checked against its own writer (docs/decisions.md)."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.data.indexed import IndexedFile, IndexedWriter, join_indexed, token_type
from trainwright.errors import UserError


def megatron_index(code: int, itemsize: int, lengths: list[int], documents: list[int]) -> bytes:
    """The .idx that Megatron-LM writes, put together field by field."""
    offsets = [sum(lengths[:at]) * itemsize for at in range(len(lengths))]
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(offsets)}q", *offsets)
        + struct.pack(f"<{len(documents)}q", *documents)
    )


def write(prefix: Path, documents: list[list[int]], vocab_size: int) -> None:
    with IndexedWriter(prefix, token_type(vocab_size)) as writer:
        for document in documents:
            writer.add(np.array(document), np.array([len(document)]))


@pytest.mark.parametrize(
    ("vocab_size", "code", "form"), [(32000, 8, "H"), (65499, 8, "H"), (65500, 4, "i"), (151936, 4, "i")]
)
def test_what_is_written_is_megatrons(tmp_path: Path, vocab_size: int, code: int, form: str) -> None:
    documents = [[1, 2, 3], [vocab_size - 1], [4, 5]]
    write(tmp_path / "ours", documents, vocab_size)
    tokens = [token for document in documents for token in document]
    assert (tmp_path / "ours.bin").read_bytes() == struct.pack(f"<{len(tokens)}{form}", *tokens)
    itemsize = struct.calcsize(form)
    assert (tmp_path / "ours.idx").read_bytes() == megatron_index(code, itemsize, [3, 1, 2], [0, 1, 2, 3])


@given(st.lists(st.lists(st.integers(0, 60000), min_size=1, max_size=20), min_size=1, max_size=20), st.integers(1, 7))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], together: int
) -> None:
    prefix = tmp_path_factory.mktemp("indexed") / "pair"
    with IndexedWriter(prefix, token_type(60001)) as writer:
        for at in range(0, len(documents), together):
            some = documents[at : at + together]
            writer.add(np.concatenate(some), np.array([len(each) for each in some]))
    file = IndexedFile(prefix)
    assert [file[at].tolist() for at in range(len(file))] == documents
    join_indexed([prefix, prefix], f"{prefix}-twice")
    twice = IndexedFile(f"{prefix}-twice")
    assert [twice[at].tolist() for at in range(len(twice))] == documents * 2


def test_documents_of_several_sequences_and_files_without_marks_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(struct.pack("<7H", *range(10, 17)))
    (tmp_path / "a.idx").write_bytes(megatron_index(8, 2, [2, 1, 4], [0, 2, 3]))
    file = IndexedFile(tmp_path / "a")
    assert [file[at].tolist() for at in range(len(file))] == [[10, 11, 12], [13, 14, 15, 16]]
    (tmp_path / "a.idx").write_bytes(megatron_index(8, 2, [2, 1, 4], [0]))
    assert IndexedFile(tmp_path / "a").lengths.tolist() == [2, 1, 4]
    (tmp_path / "a.idx").write_bytes(megatron_index(8, 2, [2, 1, 4], [0, 2, 3]) + b"\x01\x01\x01")  # multimodal modes
    assert len(IndexedFile(tmp_path / "a")) == 2
    (tmp_path / "a.idx").write_bytes(megatron_index(8, 2, [2, 5], [0, 1, 1, 2]))  # an empty document between
    assert IndexedFile(tmp_path / "a").lengths.tolist() == [2, 0, 5]


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"", "does not start with MMIDIDX"),
        (b"MMIDIDX\x00\x00", "does not start with MMIDIDX"),
        (b"something else entirely, and long enough", "does not start with MMIDIDX"),
        (b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 2, 8, 0, 0), "has version 2"),
        (megatron_index(7, 4, [1], [0, 1]), "token type 7"),
        (megatron_index(99, 4, [1], [0, 1]), "token type 99"),
        (megatron_index(8, 2, [2, 1], [0, 1, 2])[:-1], "is cut short"),
        (b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2**60, 2**60), "is cut short"),
        (megatron_index(8, 2, [2, 9], [0, 1, 2]), "it is cut short"),
        (megatron_index(8, 2, [-2, 1], [0, 1, 2]), "damaged"),
        (megatron_index(8, 2, [2, 1], [0, 7]), "damaged"),
        (megatron_index(8, 2, [2, 1], [0, 2, 1]), "damaged"),
    ],
)
def test_what_is_no_pair_is_refused(tmp_path: Path, index: bytes, words: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x00" * 6)
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(UserError, match=words):
        IndexedFile(tmp_path / "a")


def test_types_are_not_joined_silently(tmp_path: Path) -> None:
    write(tmp_path / "small", [[1]], 300)
    write(tmp_path / "large", [[1]], 70000)
    with pytest.raises(UserError, match="only one type can be joined"):
        join_indexed([tmp_path / "small", tmp_path / "large"], tmp_path / "both")
