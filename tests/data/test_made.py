"""Made tokens: the same settings give the same rows, full, below the vocabulary, and with something to learn."""

import numpy as np
import pytest

from trainwright.data.indexed import IndexedFile
from trainwright.data.made import MadeTokens
from trainwright.data.prepare import prepare
from trainwright.data.tokenizer import load_tokenizer
from trainwright.errors import UserError
from trainwright.recipe.load import load_recipe


def written(folder, **settings) -> IndexedFile:
    MadeTokens(**settings).write(folder / "made")
    return IndexedFile(folder / "made")


def test_lengths_and_ids(tmp_path):
    file = written(tmp_path, rows=50, length=40, shortest=10, vocab=70_000)
    assert len(file) == 50
    assert file.lengths.min() >= 10
    assert 30 < file.lengths.max() <= 40
    assert file.tokens.max() < 70_000
    assert file.dtype == np.dtype("<i4")


def test_settings_decide_the_tokens_and_the_seed_is_one(tmp_path):
    first, second, other = (
        np.array(written(tmp_path, rows=4, length=64, vocab=999, seed=seed).tokens) for seed in (1, 1, 2)
    )
    assert (first == second).all()
    assert (first != other).any()


def test_there_is_something_to_learn(tmp_path):
    """Frequent ids, and odd places that follow: far from the ln V that even noise leaves a model with."""
    tokens = np.array(written(tmp_path, rows=64, length=1024, vocab=1000).tokens, np.int64)
    share = np.bincount(tokens[::2], minlength=1000) / len(tokens[::2])
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert entropy < 0.85 * np.log(1000)
    follows = tokens[1::2] == (tokens[::2] * 31 + 7) % 1000
    assert 0.7 < follows.mean() < 0.8


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("made:words", "made:words cannot be made: use made:tokens"),
        ("made:tokens?lenght=3", "made:tokens has no setting 'lenght': use rows, length"),
        ("made:tokens?length=1e3", "made:tokens length='1e3' is no whole number"),
        ("made:tokens?rows=0", "made:tokens rows=0 is too small"),
        ("made:tokens?length=8&shortest=9", "shortest=9 is above length=8"),
    ],
)
def test_refusals(path, words, tmp_path):
    values = {"model": {"config": "any"}, "data": {"path": path, "cache": str(tmp_path)}, "train": {"steps": 1}}
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        prepare(load_recipe(values), load_tokenizer("byte"), progress=False)


@pytest.mark.parametrize(("task", "packing"), [("sft", True), ("sft", False), ("pretrain", True)])
def test_rows_are_full(task, packing, tmp_path):
    data = {"path": "made:tokens?rows=9&length=32", "seq_len": 32, "packing": packing, "cache": str(tmp_path)}
    values = {"task": task, "model": {"config": "any"}, "train": {"steps": 1}, "data": data}
    values["data"]["accept"] = ["missing_eos", "double_bos"]
    rows = prepare(load_recipe(values), load_tokenizer("byte"), vocab_size=256, progress=False).train
    labels = rows.cursor(0, False).read(np.arange(len(rows))).labels
    assert len(rows) == 9
    assert (labels[:, :-1] >= 0).all()
