"""docs/recipes.md: its files are written, its commands run, and what they print is what the page shows."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainwright.cli import app
from trainwright.errors import UserError
from trainwright.recipe.load import library_names

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def printed(command: str, runner: CliRunner) -> str:
    """What a command writes, on either stream."""
    program, *words = shlex.split(command)
    assert program == "trainwright"
    done = runner.invoke(app, words)
    if isinstance(done.exception, UserError):
        return f"trainwright: {done.exception}\n"
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output


def matches(shown: str, real: str) -> bool:
    """`...` stands for anything; how many spaces there are, and how long the lines, is nobody's concern."""
    parts = [re.escape(" ".join(part.split())) for part in shown.split("...")]
    return re.fullmatch(r" ?.*? ?".join(parts), " ".join(real.split())) is not None


def commands(block: str) -> list[tuple[str, str]]:
    """(command, what is shown below it)."""
    parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def test_the_page_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner, ran = CliRunner(), 0
    for language, name, content in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if language != "console":
            assert name, "a block that is no console names its file"
            (tmp_path / name).write_text(content, encoding="utf-8")
            continue
        for command, shown in commands(content):
            real = printed(command, runner)
            assert matches(shown, real), f"$ {command}\n{real}"
            ran += 1
    assert ran >= 9


def test_a_wrong_page_is_seen() -> None:
    assert matches("a ...\nb\n", "a   1\nx\nb\n")
    assert not matches("a ...\nc\n", "a 1\nx\nb\n")
    assert not matches("a ...\nb\n", "a 1\nx\nb\nc\n")


def test_every_recipe_that_the_page_names_is_shipped() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:llama|baichuan)\w+/\w+)`", text))
    assert named
    assert named <= set(library_names())
