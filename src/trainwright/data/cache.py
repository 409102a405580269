"""The cache of prepared data: where it is, its keys, and one writer at a time.

Owns no content. Files appear whole or not at all, so a reader never needs the lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def cache_folder(named: str | None) -> Path:
    """Where prepared data go: `data.cache`, $TRAINWRIGHT_CACHE, or trainwright in the user's cache folder."""
    if named or os.environ.get("TRAINWRIGHT_CACHE"):
        return Path(os.path.expanduser(named or os.environ["TRAINWRIGHT_CACHE"]))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "trainwright"


def digest(*values: Any) -> str:
    """SHA-256 of values that JSON can write."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes beside and renames: the file is whole or absent."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    partial.replace(path)


@contextlib.contextmanager
def try_claim(path: Path) -> Iterator[bool]:
    """Whether no other process has claimed `path`; if so, it is ours inside the block."""
    with open(path, "w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except ImportError:  # Windows: see only_writer
            pass
        yield True


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Waits until no other process writes in `folder`. The system takes the lock back from a process that dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            import fcntl
        except ImportError:  # Windows: two preparations at once do the work twice, with the same result
            yield
            return
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
