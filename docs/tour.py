"""Writes the file lists of docs/tour.md from the files' own first lines. CI runs it with --check.

python docs/tour.py [--check]
"""

import ast
import re
import sys
from pathlib import Path

from pages import write_or_check

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tour.md"
SOURCE = ROOT / "src" / "trainwright"


def first_sentence(file: Path) -> str:
    """The first paragraph of a file's docstring, on one line."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def listing(room: str) -> str:
    """A table of the files of one room (a folder below the package, or `.` for its top)."""
    files = sorted((SOURCE / room).glob("*.py"))
    rows = [f"| `{file.name}` | {first_sentence(file)} |" for file in files if first_sentence(file)]
    return "\n".join(["| file | owns |", "| --- | --- |", *rows])


def page(text: str) -> str:
    """The page with every list between `<!-- files: ROOM -->` and `<!-- end -->` made anew."""
    made = re.sub(
        r"(<!-- files: (\S+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{listing(match[2])}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )
    rooms = {str(folder.relative_to(SOURCE)) for folder in SOURCE.rglob("*") if list(folder.glob("*.py"))}
    missing = rooms - set(re.findall(r"<!-- files: (\S+) -->", text))
    if missing:
        sys.exit(f"docs/tour.md has no section for {', '.join(sorted(missing))}")
    return made


if __name__ == "__main__":
    write_or_check(PAGE, page)
