"""Small files are whole or as before."""

import errno
import os

import pytest

from trainwright.store import read_json, write_json


def test_a_write_that_fails_names_the_file_and_leaves_what_was(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_json(path, {"step": 2})
    assert caught.value.filename == str(path)
    assert (list(tmp_path.iterdir()), read_json(path)) == ([path], {"step": 1})


def test_what_is_not_there_or_torn_is_none(tmp_path):
    assert read_json(tmp_path / "none.json") is None
    (tmp_path / "torn.json").write_text('{"step": ')
    assert read_json(tmp_path / "torn.json") is None
