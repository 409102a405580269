"""Writing a generated page, or checking that it is current: the end of each of this folder's scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


def write_or_check(path: Path, page: Callable[[str], str]) -> None:
    """Puts page(the text there) into the file; with --check only says when that would change it, with status 1."""
    old = path.read_text(encoding="utf-8")
    new = page(old)
    if "--check" not in sys.argv:
        path.write_text(new, encoding="utf-8")
    elif new != old:
        sys.exit(f"docs/{path.name} is stale: run python docs/{path.stem}.py")
