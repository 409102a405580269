"""One row of a data file, in any format people have, to one `Sample`.

Owns what each format's keys mean and how a format is recognised by looking. Where rows come from is in readers.py,
tokens in encode.py. A row that is not what its format promises raises `BadRow`; the reader adds file and line.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trainwright.errors import UserError

Row = Mapping[str, Any]
Message = dict[str, Any]


class BadRow(Exception):
    """A row that cannot be used; the message says why, in a few words."""


class Sample(NamedTuple):
    """What one row says. Either a chat (`messages`), or plain text: `prompt` that is only read, `text` that is trained.

    `own_characters` is what the length filters count, where it is not everything that is said.
    """

    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    prompt: str = ""
    text: str = ""
    own_characters: int | None = None

    @property
    def characters(self) -> int:
        """Characters of the row itself, without templates, separators or a default system message."""
        if self.own_characters is not None:
            return self.own_characters
        return sum(map(len, self.texts()))

    def texts(self) -> Iterator[str]:
        """What the row says, piece by piece, without calls of tools."""
        yield self.prompt
        yield self.text
        yield from (message["content"] for message in self.messages or ())

    def content(self) -> str:
        """Everything the row wrote as one string: equal strings are duplicates."""
        if self.messages is None:
            return f"{self.prompt}\0{self.text}" if self.prompt else self.text
        return json.dumps([self.messages, self.tools], ensure_ascii=False, sort_keys=True)


# ---- the formats ----


def alpaca(row: Row) -> Sample:
    """`instruction`, `input`, `output`, and maybe `system` and `history`, a list of [question, answer] pairs."""
    messages: list[Message] = []
    if system := _text(row, "system", optional=True):
        messages.append({"role": "system", "content": system})
    history = row.get("history") or []
    if not isinstance(history, list):
        raise BadRow(f"history is a {_kind(history)}, expected a list of [question, answer] pairs")
    for turn in history:
        if not (isinstance(turn, Sequence) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
            raise BadRow("history holds something that is no [question, answer] pair of strings")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question, answer = _text(row, "instruction"), _text(row, "output")
    extra = _text(row, "input", optional=True) or _text(row, "context", optional=True)  # Dolly says context
    asked: Message = {"role": "user", "content": "\n".join(filter(None, [question, extra]))}
    if question and extra:  # apart too, for Alpaca's own template, which sets them under headings of their own
        asked |= {"instruction": question, "input": extra}
    messages += [asked, {"role": "assistant", "content": answer}]
    # length filters of published alpaca runs count these three, and neither history nor system
    return Sample(messages=messages, own_characters=len(question) + len(extra) + len(answer))


# Speakers as data sets spell them, to the roles that chat templates know.
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "bot": "assistant", "model": "assistant", "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
# Other spellings of what a message says under one name.
NOT_PASSED_ON = ("from", "value", "tool_calls", "function_call")


def messages(row: Row) -> Sample:
    """OpenAI's `messages` of role and content, with `tools` and `tool_calls`."""
    return _chat(row, "messages")


def sharegpt(row: Row) -> Sample:
    """ShareGPT's `conversations` of from and value, maybe with `system` and `tools`; or of human and assistant."""
    return _chat(row, "conversations")


def prompt_completion(row: Row) -> Sample:
    """`prompt` and `completion`: two strings, joined as they are with no template; or two lists of messages, of which
    the second is trained."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        if not completion:
            raise BadRow("completion is an empty list, expected a list of turns")
        turns = [_turn(turn, at) for at, turn in enumerate([*prompt, *completion])]
        read = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in turns[: len(prompt)]]
        return Sample(messages=[*read, *turns[len(prompt) :]], tools=_tools(row))
    return Sample(prompt=_text(row, "prompt"), text=_text(row, "completion"))


def text(row: Row) -> Sample:
    """`text`, every token of it trained; other keys, such as RedPajama's `meta`, are not read."""
    return Sample(text=_text(row, "text"))


FORMATS: dict[str, Callable[[Row], Sample]] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "prompt_completion": prompt_completion,
    "text": text,
}
# The keys that show a format, and other names that common data sets use for them. First match wins.
KEYS: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": ()},
    "sharegpt": {"conversations": ("conversation",)},
    "alpaca": {"instruction": (), "output": ("response", "answer")},
    "prompt_completion": {"prompt": ("query", "question"), "completion": ("response", "answer")},
    "text": {"text": ("content", "raw_content")},
}
OPTIONAL = ("system", "history", "input", "context", "tools")  # keys that formats read where they are


def check_columns(columns: Mapping[str, str]) -> None:
    """Raises UserError for a column map that gives a name to a key which no format reads."""
    known = dict.fromkeys([*(key for keys in KEYS.values() for key in keys), *OPTIONAL])
    for key in columns:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"data.sources[].columns: no format reads {key!r}: {hint}there are {', '.join(known)}")


def detect(row: Row, columns: Mapping[str, str], form: str = "auto") -> tuple[str, dict[str, str]]:
    """The format of `row` and the column map that reads it: our key to the row's key, `columns` first.

    With `form` named, only that format is tried.

    Raises:
        BadRow: the keys fit no format, or not the named one.
    """
    for name, keys in KEYS.items() if form == "auto" else [(form, KEYS[form])]:
        if form == "auto" and name == "text" and "role" in row and "text" not in {*row, *columns}:
            continue  # one turn of a chat, whose `content` is no document
        found = {key: columns.get(key) or _first(row, (key, *others)) for key, others in keys.items()}
        if all(theirs is not None and theirs in row for theirs in found.values()):
            renamed = {key: theirs for key, theirs in found.items() if theirs is not None and theirs != key}
            return name, {**columns, **renamed}
    wanted = f"not {form}, which needs {', '.join(KEYS.get(form, ()))}"
    wanted = "no format: name it with data.format" if form == "auto" else wanted
    raise BadRow(
        f"keys {', '.join(sorted(map(str, row))) or '(none)'} fit {wanted}; odd names go to data.sources[].columns"
    )


def to_sample(row: object, form: str, columns: Mapping[str, str]) -> Sample:
    """The sample of a row in format `form`; `columns` maps our keys to the row's.

    Raises:
        BadRow: the row is not of that format.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"a {_kind(row)}, expected an object with keys")
    renamed = {**row, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}} if columns else row
    try:
        return FORMATS[form](renamed)
    except BadRow as bad:
        missing = [key for key in KEYS[form] if renamed.get(key) is None]
        if missing:
            try:
                other, _ = detect(row, {})
            except BadRow:
                pass
            else:
                if other != form:
                    raise BadRow(f"looks like {other} among {form}: one format a source, split the data") from None
        raise bad


# ---- parts of formats ----


def _chat(row: Row, key: str) -> Sample:
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{key} is {_kind(turns) if turns != [] else 'an empty list'}, expected a list of turns")
    found = [_turn(spoken, at) for at, turn in enumerate(turns) for spoken in _speakers(turn)]
    system = _text(row, "system", optional=True)
    if system and found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": system})
    return Sample(messages=found, tools=_tools(row))


def _speakers(turn: object) -> list[object]:
    """One entry as turns: Firefly's and school_math's {"human": ..., "assistant": ...} is two of them."""
    if isinstance(turn, Mapping) and "human" in turn and "assistant" in turn and not {"role", "from"} & set(turn):
        return [{"role": speaker, "content": turn[speaker]} for speaker in ("human", "assistant")]
    return [turn]


def _turn(turn: object, at: int) -> Message:
    """One turn in role/content or from/value spelling, without the empty columns that Arrow adds."""
    if not isinstance(turn, Mapping):
        raise BadRow(f"turn {at} is a {_kind(turn)}, expected an object")
    speaker = turn.get("role") if turn.get("role") is not None else turn.get("from")
    if not isinstance(speaker, str) or speaker.lower() not in ROLES:
        raise BadRow(f"turn {at} is spoken by {speaker!r}: use one of {', '.join(ROLES)}")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    calls = _calls(turn, at)
    if speaker.lower() == "function_call":  # ShareGPT's spelling: the turn's text is one call or a list of them
        named, content = _json(_content(content, at, False), f"the function_call of turn {at}"), ""
        calls = [{"function": call} for call in (named if isinstance(named, list) else [named])]
    spoken = {key: value for key, value in turn.items() if value is not None and key not in NOT_PASSED_ON}
    spoken |= {"role": ROLES[speaker.lower()], "content": _content(content, at, bool(calls))}
    if calls:
        spoken["tool_calls"] = [_tool_call(call, at) for call in calls]
    if spoken.get("weight") not in (None, 0, 1):
        raise BadRow(f"turn {at} has weight {spoken['weight']!r}: use 0 for an answer that is only read, or 1")
    return spoken


def _calls(turn: Row, at: int) -> list[Any]:
    """The tool calls of a turn: `tool_calls`, or OpenAI's older `function_call`."""
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list):
        raise BadRow(f"tool_calls of turn {at} is a {_kind(calls)}, expected a list")
    return calls or ([{"function": turn["function_call"]}] if turn.get("function_call") else [])


def _content(content: object, at: int, may_be_empty: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_be_empty:
        return ""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(_text(part, "text") for part in content)
    raise BadRow(f"the content of turn {at} is a {_kind(content)}, expected a string")


def _tool_call(call: object, at: int) -> dict[str, Any]:
    """A tool call with its arguments as an object: OpenAI stores them as a JSON string, templates write JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"turn {at} has a tool call without a function and its name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"the tool call arguments of turn {at}") if arguments.strip() else {}
    return {"type": "function", **call, "function": {**function, "arguments": arguments or {}}}


def _tools(row: Row) -> list[dict[str, Any]] | None:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _json(tools, "tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow(f"tools is a {_kind(tools)}, expected a list of objects")
    return [dict(tool) for tool in tools]


def _json(written: str, what: str) -> Any:
    try:
        return json.loads(written)
    except json.JSONDecodeError as error:
        raise BadRow(f"{what} is broken JSON: {error}") from None


def _text(row: Row, key: str, optional: bool = False) -> str:
    value = row.get(key)
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    raise BadRow(f"{key} is missing" if value is None else f"{key} is a {_kind(value)}, expected a string")


def _first(row: Row, keys: Sequence[str]) -> str | None:
    return next((key for key in keys if key in row), None)


def _kind(value: object) -> str:
    """What JSON calls a value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
