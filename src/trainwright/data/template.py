"""Conversations to token ids, and which of them are trained.

Owns the choice of a chat template (the tokenizer's own, one shipped by name in `templates/`, or Jinja text) and
`Template.encode`. Rendering is in `template_jinja.py`, finding the answers' characters in `template_turns.py`.

Three rules hold for every template. The ids are those of the whole rendered text, as a server tokenizes it. Every
trained answer ends with a trained end-of-turn token. An answer that cannot be found is an error, never an empty mask.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trainwright.data.template_jinja import Message, variables_of
from trainwright.data.template_turns import Rendering, Turn, TurnFinder
from trainwright.data.tokenizer import Tokenizer
from trainwright.data.tokenizer_config import read_text
from trainwright.errors import UserError

LossOn = Literal["assistant", "all", "last"]
SHIPPED = Path(__file__).parent / "templates"
# Names that people know the same format by.
ALIASES = {"qwen2": "qwen", "llama3.1": "llama3", "baichuan1": "baichuan", "chatglm1": "chatglm"}


class EncodedSample(NamedTuple):
    """One conversation as tokens.

    `trained[i]` says that token i is a target: the model learns to produce it from the tokens before. `stops` holds
    places whose target is EOS although another token follows there: formats such as Baichuan's put nothing between an
    answer and the next question, and the model still has to learn to stop.
    """

    input_ids: list[int]
    trained: list[bool]
    stops: tuple[int, ...] = ()


class Template:
    """A chat template bound to a tokenizer. Made by `load_template`.

    `jinja` is the text that the export carries; `stop` the ids that end an answer in generation.
    """

    def __init__(self, jinja: str, tokenizer: Tokenizer, tool_jinja: str | None = None, name: str = "own") -> None:
        self.jinja = jinja
        self.name = name
        self.tokenizer = tokenizer
        self._finder = TurnFinder(jinja, tokenizer.special_ids, tokenizer.special_tokens, tokenizer.stop_ids)
        self._tool_finder = self._finder
        if tool_jinja is not None:
            self._tool_finder = TurnFinder(
                tool_jinja, tokenizer.special_ids, tokenizer.special_tokens, tokenizer.stop_ids
            )
        self.stop = self._finder.stop

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides an encoded conversation."""
        state = "\0".join([self.jinja, self._tool_finder.source, self.tokenizer.fingerprint])
        return hashlib.sha256(state.encode()).hexdigest()

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The conversation as text."""
        return self._finder_for(messages, tools).render(messages, tools).text

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Ids that a model continues with its answer."""
        rendering = self._finder_for(messages, tools).render(messages, tools, add_generation_prompt=True)
        return self._tokenize(rendering)[0]

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        loss_on: LossOn = "assistant",
    ) -> EncodedSample:
        """Ids of a whole conversation and which are trained.

        Args:
            messages: OpenAI's form: dicts with `role` and `content`, and what else the template reads.
            tools: JSON schemas of the tools that the model may call.
            loss_on: the answers, every token, or the last answer.

        Raises:
            UserError: the template refuses the conversation, or no answer is there to be trained.
        """
        finder = self._finder_for(messages, tools)
        rendering = finder.render(messages, tools)
        ids, offsets = self._tokenize(rendering)
        turns = finder.answers(messages, tools, rendering, last_only=loss_on != "assistant")
        if not turns and loss_on != "all":
            raise UserError("conversation has no assistant message, or all have weight 0: nothing would be trained")
        trained = [loss_on == "all"] * len(ids)
        stops: list[int] = []
        starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
        for turn in turns:
            first, after = _tokens_of(turn, starts, ends, rendering.text)
            trained[first:after] = [True] * (after - first)
            if not turn.closed:
                self._close(ids, trained, stops, after, loss_on)
            elif first == after:
                raise UserError(f"chat template {self.name}: an answer has no token of its own to train")
        return EncodedSample(ids, trained, tuple(stops))

    def _close(self, ids: list[int], trained: list[bool], stops: list[int], at: int, loss_on: LossOn) -> None:
        """Teaches EOS after an answer that the template leaves open."""
        eos = self.tokenizer.eos_id
        if eos is None:
            raise UserError(
                f"chat template {self.name} does not end an answer and the tokenizer has no EOS: "
                "set eos_token in tokenizer_config.json"
            )
        if at == len(ids):
            ids.append(eos)
            trained.append(True)
        elif loss_on != "all":
            stops.append(at)

    def _finder_for(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> TurnFinder:
        finder = self._tool_finder if tools else self._finder
        if tools and "tools" not in variables_of(finder.source):
            raise UserError(f"chat template {self.name} has no place for tools: use another data.template")
        if "tool_calls" not in finder.source and any(message.get("tool_calls") for message in messages):
            raise UserError(
                f"chat template {self.name} has no place for tool_calls, so an answer would be trained without them: "
                "use another data.template"
            )
        return finder

    def _tokenize(self, rendering: Rendering) -> tuple[list[int], list[tuple[int, int]]]:
        specials = rendering.specials if rendering.protected else None
        ids, offsets = self.tokenizer.encode_spans(rendering.text, specials=specials)
        bos = self.tokenizer.bos_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise UserError(f"chat template {self.name} writes BOS twice: take bos_token out of the template once")
        return ids, offsets


def _tokens_of(turn: Turn, starts: list[int], ends: list[int], text: str) -> tuple[int, int]:
    """The half-open range of tokens that are an answer's.

    A token over a border (the header's newline joined with the answer's) belongs to the side that its letters are on;
    white space alone is the template's.
    """
    first = bisect_left(ends, turn.start)
    while first < len(ends) and starts[first] < turn.start and not text[turn.start : ends[first]].strip():
        first += 1
    after = bisect_left(starts, turn.end, lo=first)
    while after > first and ends[after - 1] > turn.end and not text[starts[after - 1] : turn.end].strip():
        after -= 1
    return first, after


def shipped_templates() -> list[str]:
    """Names that `load_template` knows."""
    return sorted(path.stem for path in SHIPPED.glob("*.jinja"))


def load_template(spec: str | None, tokenizer: Tokenizer) -> Template:
    """The chat template that `spec` names, for `tokenizer`.

    Args:
        spec: None for the tokenizer's own; a shipped name; a `.jinja` file; or Jinja text.

    Raises:
        UserError: there is no such template, it is no Jinja, or the tokenizer lacks tokens that it needs.
    """
    if spec is None:
        templates = tokenizer.chat_templates
        if "default" not in templates:
            raise UserError(
                f"the tokenizer has no chat template of its own: set data.template to one of "
                f"{', '.join(shipped_templates())}, or to a .jinja file"
            )
        return Template(templates["default"], tokenizer, templates.get("tool_use"))
    name = ALIASES.get(spec.lower(), spec.lower())
    if name in shipped_templates():
        source = (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")
        _check_needs(name, source, tokenizer)
        return Template(source, tokenizer, name=name)
    if "{%" in spec or "{{" in spec:
        return Template(spec, tokenizer)
    path = Path(os.path.expanduser(spec))
    if path.suffix == ".jinja" and path.is_file():
        return Template(read_text(path), tokenizer, name=path.name)
    near = difflib.get_close_matches(name, [*shipped_templates(), *ALIASES], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"unknown chat template {spec!r}: {hint}there are {', '.join(shipped_templates())}")


def _check_needs(name: str, source: str, tokenizer: Tokenizer) -> None:
    """A shipped template's first comment names the special tokens without which it is another format."""
    needs = re.match(r"\{#-? needs:(.*?)-?#\}", source)
    known = {*tokenizer.special_ids, *tokenizer.special_tokens}
    missing = [token for token in (needs[1].split() if needs else []) if token not in known]
    if missing:
        raise UserError(
            f"chat template {name} needs the special tokens {' '.join(missing)}, which this tokenizer lacks: "
            "choose another data.template"
        )
