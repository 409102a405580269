"""The examples of docs/data.md: each section's files are written, its recipe prepared, and the result compared."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from trainwright.data.prepare import prepare
from trainwright.data.rows import RowSet
from trainwright.data.tokenizer import Tokenizer, load_tokenizer
from trainwright.recipe.schema import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples() -> dict[str, list[tuple[str, str, str]]]:
    """For each section with a recipe and a result: its blocks as (language, file name, content)."""
    sections = re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = {section.splitlines()[0]: BLOCK.findall(section) for section in sections}
    return {title: blocks for title, blocks in found.items() if blocks}


def written(rows: RowSet, tokenizer: Tokenizer) -> str:
    """What the model reads, with « » around what it is trained to write; a document a line."""
    lines = []
    arrays = rows.cursor(0, False).read(np.arange(len(rows)))
    for row, ids in enumerate(arrays.input_ids):
        trained = np.append(False, arrays.labels[row][:-1] >= 0)
        documents = np.where(ids == rows.pad_id, -1, 0) if arrays.document_ids is None else arrays.document_ids[row]
        for document in range(documents.max() + 1):
            mine = np.flatnonzero(documents == document)
            runs = np.split(mine, np.flatnonzero(np.diff(trained[mine])) + 1)
            words = [(tokenizer.decode(ids[run].tolist(), skip_special=False), trained[run[0]]) for run in runs]
            lines.append("".join(f"«{text}»" if flag else text for text, flag in words))
    return "\n".join(sorted(lines)) + "\n"


@pytest.mark.parametrize("title", examples())
def test_the_page_is_right(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = examples()[title]
    for language, name, content in blocks:
        assert len(content.splitlines()) <= 5
        if language == "jsonl":
            (tmp_path / name).write_text(content, encoding="utf-8")
        elif language == "python":
            exec(content, {})
    asked = next(yaml.safe_load(content) for language, _, content in blocks if language == "yaml")
    asked["data"] |= {"seq_len": 256, "cache": "cache"}
    recipe = Recipe.model_validate({"model": {"config": "any"}, "train": {"steps": 1}, **asked})
    tokenizer = load_tokenizer("byte")
    prepared = prepare(recipe, tokenizer, vocab_size=tokenizer.vocab_size, progress=False)
    assert isinstance(prepared.train, RowSet)
    expected = next(content for language, _, content in blocks if language == "text")
    assert sorted(written(prepared.train, tokenizer).splitlines()) == sorted(expected.splitlines())


def test_every_format_is_shown() -> None:
    shown = " ".join(examples()).lower()
    for name in ("alpaca", "sharegpt", "messages", "prompt", "text", "parquet", "arrow", "megatron", "shipped"):
        assert name in shown
