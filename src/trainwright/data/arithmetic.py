"""The shipped data set: one-step arithmetic word problems in Chinese and English, made on the spot, alpaca format.

Owns the problem family and its difficulty knobs. Nothing is stored or downloaded: the same settings always give the
same rows. The held-out split is held out by construction: a combination of numbers belongs to it by its own hash,
whatever the seed, the row count or the range, so no training row ever shows a tested combination (in either order,
where order does not matter). Reading `shipped:arithmetic?max_number=30` as a source is in sources.py.

    python -m trainwright.data.arithmetic rows=1000 split=test > held_out.jsonl
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

from trainwright.errors import UserError

Row = dict[str, str]

NAMES = {
    "zh": ("小明", "小红", "小刚", "小丽", "李雷", "王芳"),
    "en": ("Tom", "Anna", "Ben", "Lucy", "Sam", "Mia"),
}
THINGS = {
    "zh": ("苹果", "橘子", "糖果", "气球", "贝壳", "玩具"),
    "en": ("apples", "pens", "books", "cards", "shells", "coins"),
}
# {n} a name, {t} a thing, {a} and {b} the numbers, in the order that the operation reads them.
QUESTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "add": {
        "zh": (
            "{n}有{a}个{t},又买了{b}个,现在有几个?",
            "{n}有{a}个{t},妈妈又给了{b}个,一共有几个?",
            "盒子里有{a}个{t},{n}放进{b}个,共有几个?",
        ),
        "en": (
            "{n} has {a} {t} and buys {b} more. How many now?",
            "{n} has {a} {t} and finds {b} more. How many in all?",
            "A box has {a} {t}. {n} adds {b}. How many are there?",
        ),
    },
    "subtract": {
        "zh": (
            "{n}有{a}个{t},送出{b}个,还剩几个?",
            "{n}有{a}个{t},丢了{b}个,还剩几个?",
            "盒子里有{a}个{t},{n}拿走{b}个,还剩几个?",
        ),
        "en": (
            "{n} has {a} {t} and gives away {b}. How many are left?",
            "{n} has {a} {t} and loses {b}. How many are left?",
            "A box has {a} {t}. {n} takes {b}. How many are left?",
        ),
    },
    "multiply": {
        "zh": (
            "每盒有{a}个{t},{n}有{b}盒,一共几个?",
            "{n}买了{b}袋{t},每袋{a}个,一共几个?",
        ),
        "en": (
            "A bag holds {a} {t}. {n} has {b} bags. How many in all?",
            "{n} fills {b} boxes with {a} {t} each. How many in all?",
        ),
    },
    "divide": {
        "zh": ("{n}把{a}个{t}平均分给{b}人,每人几个?",),
        "en": ("{n} shares {a} {t} among {b} friends. How many each?",),
    },
}
SENTENCES = {"zh": "答案是{c}。", "en": "The answer is {c}."}


@dataclass(frozen=True)
class Arithmetic:
    """Settings of the data set, and its rows by iteration. Raises UserError for settings that give no problem."""

    rows: int = 20_000
    split: Literal["train", "test"] = "train"
    seed: int = 0
    max_number: int = 20
    max_factor: int = 9
    operations: tuple[str, ...] = ("add", "subtract")
    languages: tuple[str, ...] = ("zh", "en")
    held_out: float = 0.1
    answer: Literal["number", "sentence"] = "number"

    def __post_init__(self) -> None:
        for name, known in (("operations", QUESTIONS), ("languages", NAMES)):
            chosen = getattr(self, name)
            if not chosen or set(chosen) - set(known):
                raise UserError(f"arithmetic {name}={','.join(chosen)}: use some of {', '.join(known)}")
        if self.split not in ("train", "test") or self.answer not in ("number", "sentence"):
            raise UserError(f"arithmetic split={self.split} answer={self.answer}: train or test, number or sentence")
        if min(self.rows, self.max_number, self.max_factor) < 1 or not 0 <= self.held_out <= 1:
            raise UserError("arithmetic: rows, max_number and max_factor are 1 or more, held_out is between 0 and 1")

    @classmethod
    def parse(cls, settings: dict[str, str]) -> Arithmetic:
        """Settings from words, as a recipe or the command line gives them; lists are separated by commas."""
        known: dict[str, Any] = {field.name: field.default for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, word in settings.items():
            if name not in known:
                raise UserError(f"arithmetic has no setting {name!r}: use {', '.join(known)}")
            kind = type(known[name])
            try:
                values[name] = tuple(word.split(",")) if kind is tuple else kind(word)
            except ValueError:
                raise UserError(f"arithmetic {name}={word!r} is no {kind.__name__}") from None
        return cls(**values)

    def __iter__(self) -> Iterator[Row]:
        """`rows` alpaca rows, drawn evenly over operations, languages and wordings."""
        combinations = {name: self.combinations(name) for name in self.operations}
        empty = [name for name, found in combinations.items() if not found]
        if empty:
            raise UserError(
                f"arithmetic split={self.split} has no number combination for {empty[0]}: "
                f"raise max_number={self.max_number}, max_factor={self.max_factor} or change held_out={self.held_out}"
            )
        draw = random.Random(f"{self.split} {self.seed}")
        for _ in range(self.rows):
            operation, language = draw.choice(self.operations), draw.choice(self.languages)
            a, b = draw.choice(combinations[operation])
            question = draw.choice(QUESTIONS[operation][language])
            answer = str(result(operation, a, b))
            yield {
                "instruction": question.format(
                    n=draw.choice(NAMES[language]), t=draw.choice(THINGS[language]), a=a, b=b
                ),
                "input": "",
                "output": answer if self.answer == "number" else SENTENCES[language].format(c=answer),
            }

    def combinations(self, operation: str) -> list[tuple[int, int]]:
        """The number pairs of this split: all of the range whose hash falls on this side of `held_out`."""
        if operation == "divide":
            factors = range(1, self.max_factor + 1)
            pairs = [(quotient * divisor, divisor) for quotient in factors for divisor in factors]
        else:
            numbers = range(1, (self.max_factor if operation == "multiply" else self.max_number) + 1)
            pairs = [(a, b) for a in numbers for b in numbers if operation != "subtract" or a >= b]
        return [(a, b) for a, b in pairs if is_held_out(operation, a, b, self.held_out) == (self.split == "test")]


def result(operation: str, a: int, b: int) -> int:
    """What the question asks for."""
    return {"add": a + b, "subtract": a - b, "multiply": a * b, "divide": a // b}[operation]


def is_held_out(operation: str, a: int, b: int, share: float) -> bool:
    """Whether a combination belongs to the held-out split. Where a and b may swap, both orders fall together."""
    if operation in ("add", "multiply"):
        a, b = sorted((a, b))
    digest = hashlib.blake2b(f"{operation} {a} {b}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def main(words: list[str]) -> None:
    """Writes rows as JSONL to standard output; each word is a setting, such as rows=1000."""
    for row in Arithmetic.parse({name: value for name, _, value in (word.partition("=") for word in words)}):
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main(sys.argv[1:])
