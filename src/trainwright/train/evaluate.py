"""The held-out split: its loss, and answers to its questions with exact match.

The loss is normalised as in training: the sum over all supervised tokens of the split, divided by their count.
Questions come from the rows themselves, so they are the very tokens that training would have seen: the prompt is what
stands before a document's last trained stretch, the expected answer is that stretch.

Owns both. When to evaluate is `trainer.py`'s decision, generating `model/generate.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from trainwright.data.loader import Batch, Loader
from trainwright.data.rows import RowSet
from trainwright.data.tokenizer import Tokenizer
from trainwright.device import uncompiled, widest_float
from trainwright.model.generate import generate
from trainwright.model.transformer import Transformer
from trainwright.parallel.mesh import World
from trainwright.recipe.train import EvaluationRecipe
from trainwright.train.step import IGNORED, finite_or_none, to_inputs

QUESTIONS_AT_ONCE = 32
Asked = Callable[[], bool]  # whether a signal asks to stop; the same answer on every rank


class Interrupted(Exception):
    """A signal came during an evaluation, which can be long."""


class HeldOut:
    """The held-out split of a run; without one, everything comes out empty."""

    def __init__(
        self, rows: RowSet | None, recipe: EvaluationRecipe, world: World, tokenizer: Tokenizer, stop_ids: Sequence[int]
    ) -> None:
        self.rows = rows
        self.recipe = recipe
        self.world = world
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids

    def loss(self, model: torch.nn.Module, micro_batch_size: int, asked: Asked) -> dict[str, float | None]:
        """Loss of the whole split, or of `evaluation.max_batches` micro batches of each data rank.

        Raises Interrupted when `asked`.
        """
        if self.rows is None:
            return {}
        ranks = self.world.layout.data_ranks
        loader = Loader(
            self.rows,
            micro_batch_size=micro_batch_size,
            rank=self.world.data_rank,
            world_size=ranks,
            shuffle=False,
            epochs=1.0,
        )
        with closing(loader):
            return held_out_loss(model, islice(loader, self.recipe.max_batches), self.world, asked)

    def answers(self, model: Transformer, asked: Asked) -> list[Answer]:
        """Answers to `evaluation.generate` questions, the same on every rank. Raises Interrupted when `asked`."""
        if self.rows is None or not self.recipe.generate:
            return []
        with closing(Loader(self.rows, micro_batch_size=1, shuffle=False, epochs=1.0)) as loader:
            questions = choose_questions(loader, self.stop_ids, self.recipe.generate)
        return answer_questions(
            model,
            questions,
            self.tokenizer,
            stop_ids=self.stop_ids,
            max_new_tokens=self.recipe.max_new_tokens,
            asked=asked,
        )


def held_out_loss(
    model: torch.nn.Module, batches: Iterable[Batch], world: World, asked: Asked = lambda: False
) -> dict[str, float | None]:
    """Mean loss over the supervised tokens of `batches`, which every data rank has as many of; one wait at the end.

    None where it is not a finite number, which JSON has no word for.
    """
    total = torch.zeros(2, dtype=widest_float(world.device), device=world.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                if asked():
                    raise Interrupted
                output = model(**to_inputs(batch, world.device))
                total[0] += output.loss_sum
                total[1] += output.num_tokens
    finally:
        model.train(training)
    loss_sum, tokens = world.sum(total, copies=world.layout.token_copies).tolist()
    loss = loss_sum / max(tokens, 1)
    perplexity = math.exp(min(loss, 700.0))
    return {
        "loss": finite_or_none(loss),
        "perplexity": finite_or_none(perplexity),
        "supervised_tokens": int(tokens),
    }


@dataclass(frozen=True)
class Question:
    """Tokens that ask and tokens that answer; the answer without its end token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """One question as text, what was expected and what the model said."""

    question: str
    expected: str
    given: str

    @property
    def exact(self) -> bool:
        return self.expected.strip() == self.given.strip()


def questions_in(batch: Batch, stop_ids: Sequence[int]) -> Iterator[Question]:
    """The questions of whole documents in a batch. A document that was cut off has no end token and asks nothing."""
    for row in range(batch.input_ids.shape[0]):
        ids, labels = batch.input_ids[row].tolist(), batch.labels[row].tolist()
        documents = batch.document_ids[row].tolist() if batch.document_ids is not None else [0] * len(ids)
        starts = [at for at in range(len(ids)) if at == 0 or documents[at] != documents[at - 1]]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            trained = [at for at in range(start, end) if labels[at] != IGNORED]
            if documents[start] < 0 or not trained:
                continue
            last = trained[-1]
            first = last
            while first - 1 >= start and labels[first - 1] != IGNORED:
                first -= 1
            if labels[last] in stop_ids and first > start:
                yield Question(tuple(ids[start : first + 1]), tuple(labels[first:last]))


def choose_questions(batches: Iterable[Batch], stop_ids: Sequence[int], count: int) -> list[Question]:
    """The first `count` questions of the split."""
    return list(islice((question for batch in batches for question in questions_in(batch, stop_ids)), count))


def answer_questions(
    model: Transformer,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    asked: Asked = lambda: False,
) -> list[Answer]:
    """The likeliest answers, `QUESTIONS_AT_ONCE` at a time, those of like length together."""
    order = sorted(range(len(questions)), key=lambda number: len(questions[number].prompt))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), QUESTIONS_AT_ONCE):
        numbers = order[start : start + QUESTIONS_AT_ONCE]
        if asked():
            raise Interrupted
        prompts = [list(questions[number].prompt) for number in numbers]
        with uncompiled():  # every length would be compiled anew, and soon none any more
            steps = list(generate(model, prompts, max_new_tokens=max_new_tokens, eos_token_ids=list(stop_ids)))
        for number, tokens in zip(numbers, torch.stack(steps, dim=1).tolist(), strict=True):
            ends = [at for at, token in enumerate(tokens) if token in stop_ids]
            answers[number] = Answer(
                question=tokenizer.decode(questions[number].prompt).strip(),
                expected=tokenizer.decode(questions[number].answer).strip(),
                given=tokenizer.decode(tokens[: ends[0]] if ends else tokens).strip(),
            )
    return [answers[number] for number in range(len(questions))]


def exact_match(answers: Sequence[Answer]) -> float | None:
    """Share of answers that are the expected text, white space around them aside; None without questions."""
    return sum(answer.exact for answer in answers) / len(answers) if answers else None


def as_rows(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """For answers.json."""
    return [{**asdict(answer), "exact": answer.exact} for answer in answers]
