"""The shipped data set: deterministic, right, and held out by construction."""

import re

import pytest

from trainwright.data.arithmetic import QUESTIONS, Arithmetic, is_held_out, result
from trainwright.errors import UserError

NUMBERS = re.compile(r"\d+")


def test_the_same_settings_give_the_same_rows() -> None:
    assert list(Arithmetic(rows=50)) == list(Arithmetic(rows=50))
    assert list(Arithmetic(rows=50)) != list(Arithmetic(rows=50, seed=1))


def test_answers_are_right_in_every_wording() -> None:
    for operation in QUESTIONS:
        for row in Arithmetic(rows=300, operations=(operation,)):
            a, b = (int(number) for number in NUMBERS.findall(row["instruction"]))
            if operation == "multiply":  # the wording may name the factors in either order
                assert int(row["output"]) == a * b
            else:
                assert int(row["output"]) == result(operation, a, b)


def test_sentences_end_in_the_same_answers() -> None:
    for short, long in zip(Arithmetic(rows=50), Arithmetic(rows=50, answer="sentence"), strict=True):
        assert short["instruction"] == long["instruction"]
        assert NUMBERS.findall(long["output"]) == [short["output"]]


@pytest.mark.parametrize("operation", ["add", "subtract", "multiply", "divide"])
def test_no_training_row_shows_a_tested_combination(operation: str) -> None:
    def pairs(split: str, seed: int, max_number: int) -> set[tuple[int, ...]]:
        settings = {"split": split, "seed": str(seed), "max_number": str(max_number), "rows": "3000"}
        rows = Arithmetic.parse({**settings, "operations": operation})
        order = sorted if operation in ("add", "multiply") else list
        return {tuple(order(int(number) for number in NUMBERS.findall(row["instruction"]))) for row in rows}

    tested = pairs("test", 0, 20)
    assert tested
    for seed, max_number in ((0, 20), (7, 20), (0, 50)):
        assert not tested & pairs("train", seed, max_number)


def test_the_held_out_share_is_what_was_asked() -> None:
    pairs = [(a, b) for a in range(1, 101) for b in range(1, 101)]
    share = sum(is_held_out("subtract", a, b, 0.1) for a, b in pairs) / len(pairs)
    assert share == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"colour": "red"}, "colour"),
        ({"rows": "many"}, "many"),
        ({"rows": "0"}, "rows"),
        ({"operations": "add,guess"}, "guess"),
        ({"split": "dev"}, "dev"),
        ({"held_out": "0", "split": "test"}, "held_out"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, str], word: str) -> None:
    with pytest.raises(UserError, match=word):
        list(Arithmetic.parse(settings))
