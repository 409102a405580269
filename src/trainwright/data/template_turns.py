"""Finds, in a rendered conversation, the characters that the model writes.

Owns `TurnFinder`. Stock templates do not say where an answer starts and ends, so it is found from what they do say:
the rendering of the conversation up to the answer, with the generation prompt, is what the model sees; the answer is
what follows, through the first end-of-turn token. Token ids are `template.py`'s business.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trainwright.data.template_jinja import Message, render
from trainwright.errors import UserError

# Characters that texts do not hold: private use, planes 15 and 16. The first two free ones serve as marks.
_MARKS = range(0xF0000, 0x10FFFE)

# What a template is probed with: words that no template changes.
_USER = {"role": "user", "content": "Zqa"}
_ANSWER = {"role": "assistant", "content": "Zqb"}
_TOOL = {
    "type": "function",
    "function": {"name": "zq", "description": "Zq", "parameters": {"type": "object", "properties": {}, "required": []}},
}

Special = tuple[int, int, int]  # first character, one past the last, token id


class Rendering(NamedTuple):
    """A conversation as text, and where the template itself wrote special tokens.

    `protected` says that a message spells a special token: there `specials` leaves it out, and it is to stay text.
    """

    text: str
    specials: list[Special]
    protected: bool


class Turn(NamedTuple):
    """The characters of one answer. `closed` says that they end with an end-of-turn token."""

    start: int
    end: int
    closed: bool


class TurnFinder:
    """Renders conversations by one template and finds the answers in them.

    `stop` are the ids that end an answer: the tokenizer's, and the one that the template writes after an answer.
    """

    def __init__(
        self, source: str, special_ids: Mapping[str, int], variables: Mapping[str, str], stop: Sequence[int]
    ) -> None:
        self.source = source
        self._special_ids = special_ids
        self._variables = variables
        longest_first = sorted(special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._header, closing, self._closes_inner = self._probe(stop)
        self.stop = tuple(dict.fromkeys([*stop, *([] if closing is None else [closing])]))

    # ---- rendering ----

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> Rendering:
        """The conversation as text. Special tokens that messages spell are found and left out of `specials`."""
        text = self._text(messages, tools, add_generation_prompt)
        if not any(self._special.search(value) for value in _strings([*messages, *(tools or [])])):
            return Rendering(text, find_specials(self._special, self._special_ids, text), False)
        mark = _free_characters(text, 1)[0]
        broken = self._text(self._break(messages, mark), self._break(tools, mark), add_generation_prompt)
        if broken.replace(mark, "") != text:
            raise UserError("a message spells a special token and the chat template cuts it: take it out of the data")
        # Every mark that stands before a place moved it one to the right.
        specials = []
        for start, end, token_id in find_specials(self._special, self._special_ids, broken):
            shift = broken.count(mark, 0, start)
            specials.append((start - shift, end - shift, token_id))
        return Rendering(text, specials, True)

    def _text(self, messages: Any, tools: Any, add_generation_prompt: bool = False) -> str:
        return render(self.source, messages, tools, self._variables, add_generation_prompt=add_generation_prompt)

    def _break(self, value: Any, mark: str) -> Any:
        """`value` with a mark inside every special token that its strings spell."""
        if isinstance(value, str):
            while found := self._special.search(value):
                value = value[: found.start() + 1] + mark + value[found.start() + 1 :]
            return value
        if isinstance(value, Mapping):
            return {key: item if key == "role" else self._break(item, mark) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._break(item, mark) for item in value]
        return value

    # ---- answers ----

    def answers(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        rendering: Rendering,
        last_only: bool,
    ) -> list[Turn]:
        """The answers in order, or the last of them; without those of `weight` 0, which are only read.

        Raises:
            UserError: an answer cannot be told from what is around it.
        """
        if not self._writes_answers:
            raise UserError("chat template does not write what the assistant says: use another data.template")
        spoken = [at for at, message in enumerate(messages) if message.get("role") == "assistant"]
        places = [at for at in spoken if messages[at].get("weight") != 0]
        if last_only:
            places = places[-1:]
        if marked := self._marked(messages, tools, rendering):
            if len(marked) == len(spoken):
                return [turn for at, turn in zip(spoken, marked, strict=True) if at in places]
            if len(places) < len(spoken) and not last_only:
                raise UserError("chat template marks an answer in pieces, so none of weight 0 can be left out")
            return marked[-1:] if last_only else marked
        turns: list[Turn] = []
        for at in places:
            start = self._start(messages, tools, rendering, at)
            turns.append(self._turn(messages, tools, rendering, at, start))
        for earlier, later in itertools.pairwise(turns):
            if earlier.end > later.start:
                raise UserError("chat template: two answers overlap, so neither can be trained: set data.loss_on=last")
        return turns

    def _marked(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, rendering: Rendering
    ) -> list[Turn]:
        """What the template marks by `{% generation %}`, each through the end-of-turn token that follows."""
        if "generation" not in self.source or not re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source):
            return []
        before, after = _free_characters(rendering.text, 2)
        text = render(self.source, messages, tools, self._variables, marks=(before, after))
        if re.sub(f"[{before}{after}]", "", text) != rendering.text:
            return []
        turns = []
        for number, piece in enumerate(re.finditer(f"{before}([^{before}{after}]*){after}", text)):
            start = piece.start() - 2 * number
            turns.append(self._close(rendering, start, start + len(piece[1])))
        return turns

    def _close(self, rendering: Rendering, start: int, end: int) -> Turn:
        """The turn through an end-of-turn token that its text ends with, or that follows after white space only."""
        for first, last, token_id in rendering.specials:
            if token_id in self.stop and last > start and (last == end or first >= end):
                if last == end or not rendering.text[end:first].strip():
                    return Turn(start, last, True)
                break
        return Turn(start, end, False)

    def _start(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, rendering: Rendering, at: int
    ) -> int:
        """Where the answer `messages[at]` starts: where the prompt that asks for it ends."""
        if at > 0:
            prompt = self._text(messages[:at], tools, add_generation_prompt=True)
            if rendering.text.startswith(prompt):
                return len(prompt)
        else:
            prompt = self._header
        # The template writes the past differently once there is more of it (reasoning is dropped, tools move). The
        # answer's header is still there: special tokens in it are the template's own, so it cannot be mistaken.
        number = sum(message.get("role") == "assistant" for message in messages[:at])
        total = sum(message.get("role") == "assistant" for message in messages)
        for header in self._headers(prompt):
            starts = [
                found.end()
                for found in re.finditer(re.escape(header), rendering.text)
                if any(found.start() <= first and last <= found.end() for first, last, _ in rendering.specials)
            ]
            if len(starts) == total:
                return starts[number]
        if at == 0:
            raise UserError(
                "the conversation begins with the assistant, which the chat template writes without a mark before it: "
                "begin with a user turn, set data.loss_on=last, or use another data.template"
            )
        raise UserError(
            f"chat template: answer {number + 1} of {total} is written differently in the whole conversation than when "
            "it is asked for, so it cannot be trained in place: set data.loss_on=last and end with the answer, or use "
            "another data.template"
        )

    def _headers(self, prompt: str) -> Iterator[str]:
        """Texts that may stand right before an answer, the longest first; each holds a special token."""
        candidates = [self._header, prompt]
        for text in candidates:
            specials = find_specials(self._special, self._special_ids, text)
            if not specials:
                continue
            if text is self._header:
                yield text
                yield text[: specials[-1][1]]
            yield text[specials[-1][0] :]

    def _turn(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        rendering: Rendering,
        at: int,
        start: int,
    ) -> Turn:
        """The turn that starts at `start`, through its end-of-turn token."""
        if at == len(messages) - 1 or self._closes_inner:
            inside = False  # whether other special tokens come before the one that ends the turn
            for _, last, token_id in rendering.specials:
                if last > start and token_id in self.stop:
                    own = self._own_end(messages, tools, rendering, at, last) if inside else last
                    return Turn(start, own, True)
                inside |= last > start
        return Turn(start, self._open_end(messages, tools, rendering, at, start), False)

    def _own_end(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        rendering: Rendering,
        at: int,
        last: int,
    ) -> int:
        """`last`, or where the answer is over before it: a call of a tool may end with a token of its own."""
        if at == len(messages) - 1:
            return last
        alone = self._text(messages[: at + 1], tools).rstrip()
        over = max((end for _, end, _ in rendering.specials if end <= len(alone)), default=0)
        return over if over == len(alone) < last and rendering.text.startswith(alone) else last

    def _open_end(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        rendering: Rendering,
        at: int,
        start: int,
    ) -> int:
        """Where an answer that nothing ends is over: its content, else what is there when it is the last message."""
        content, text = messages[at].get("content"), rendering.text
        end = None
        if isinstance(content, str) and content.strip() and not messages[at].get("tool_calls"):
            for written in (content, content.strip()):
                found = text.find(written, start)
                if found >= 0 and not text[start:found].strip():
                    end = found + len(written)
                    if text.find(written, found + 1) < 0:
                        return end
                    break  # it may also be spelled by what the template writes before answers
        until = self._text(messages[: at + 1], tools)
        if end is None or not until.endswith(str(content)):
            until = until.rstrip()
        whole = end is None or until.rstrip().endswith(str(content).strip())
        if whole and text.startswith(until) and len(until) >= start:
            return len(until)
        if end is not None:
            return end
        raise UserError("chat template changes an answer's text and does not end it: it cannot be trained")

    def _probe(self, stop: Sequence[int]) -> tuple[str, int | None, bool]:
        """What stands before an answer, the token that ends one (None: none), and whether inner answers are ended.

        Templates for tools alone fail without any: those are shown one.
        """
        try:
            self._text([_USER], None)
            tools = None
        except UserError:
            tools = [_TOOL]
        asked, prompt = self._text([_USER], tools), self._text([_USER], tools, add_generation_prompt=True)
        header = prompt[len(asked) :] if prompt.startswith(asked) else ""
        answered = self._text([_USER, _ANSWER], tools)
        self._writes_answers = _ANSWER["content"] in answered
        last = self._specials_after_answer(answered)
        inner = self._specials_after_answer(self._text([_USER, _ANSWER, _USER], tools))
        shared = [one for one, other in zip(last, inner, strict=False) if one == other]
        # Several may follow (a mark for the answer's end, then the turn's): the one that servers stop at counts.
        ends = shared or last
        closing = next((token for token in ends if token in stop), ends[0] if ends else None)
        # Some end an answer by the next speaker's mark, which is then among the tokens that servers stop at.
        return header, closing, bool(shared) or (bool(inner) and inner[0] in stop)

    def _specials_after_answer(self, text: str) -> list[int]:
        """Ids of the special tokens that follow the probe's answer with nothing but white space before."""
        after = text.rpartition(_ANSWER["content"])[2].lstrip()
        ids: list[int] = []
        while found := self._special.match(after):
            ids.append(self._special_ids[found[0]])
            after = after[found.end() :]
        return ids


def find_specials(pattern: re.Pattern[str], ids: Mapping[str, int], text: str) -> list[Special]:
    """Every special token that a text spells, in order."""
    return [(found.start(), found.end(), ids[found[0]]) for found in pattern.finditer(text)]


def _strings(value: Any) -> Iterator[str]:
    """Every string in a message tree, keys and roles aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _free_characters(text: str, count: int) -> list[str]:
    """The first private-use characters that `text` does not hold."""
    free: list[str] = []
    for code in _MARKS:
        if chr(code) not in text:
            free.append(chr(code))
        if len(free) == count:
            return free
    raise UserError("a message holds every private-use character: take them out of the data")
