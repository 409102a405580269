"""Every format, by a row as people have them; and what is said of rows that are wrong."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.data.formats import FORMATS, BadRow, check_columns, detect, to_sample
from trainwright.errors import UserError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}


def read(row: dict[str, Any], columns: dict[str, str] | None = None) -> Any:
    form, found = detect(row, columns or {})
    return to_sample(row, form, found)


@pytest.mark.parametrize(
    ("row", "form", "messages"),
    [
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "alpaca", CHAT),
        ({"instruction": "Hi", "output": "Hello"}, "alpaca", CHAT),
        (
            {"instruction": "小明有3个苹果。", "input": "一共几个?", "output": "7"},  # BELLE's school_math
            "alpaca",
            [
                {
                    "role": "user",
                    "content": "小明有3个苹果。\n一共几个?",
                    "instruction": "小明有3个苹果。",
                    "input": "一共几个?",
                },
                {"role": "assistant", "content": "7"},
            ],
        ),
        (
            {"instruction": "Hi", "input": "", "output": "Hello", "system": "Be kind", "history": [["a", "b"]]},
            "alpaca",
            [
                {"role": "system", "content": "Be kind"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                *CHAT,
            ],
        ),
        ({"instruction": "Hi", "context": "now", "response": "Hello", "category": "x"}, "alpaca",
         [{"role": "user", "content": "Hi\nnow", "instruction": "Hi", "input": "now"}, CHAT[1]]),  # Dolly
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "sharegpt", CHAT),
        (
            {"system": "Be", "conversations": [{"from": "user", "value": "Hi"}, {"from": "bot", "value": "Hello"}]},
            "sharegpt",
            [{"role": "system", "content": "Be"}, *CHAT],
        ),
        ({"conversations": CHAT}, "sharegpt", CHAT),
        ({"conversation_id": 1, "conversation": [{"human": "Hi", "assistant": "Hello"}] * 2}, "sharegpt", CHAT * 2),
        ({"messages": CHAT}, "messages", CHAT),
        ({"messages": [{**CHAT[0], "name": None, "tool_calls": None}, CHAT[1]]}, "messages", CHAT),  # as Arrow fills it
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, CHAT[1]]}, "messages", CHAT),
        ({"prompt": [CHAT[0]], "completion": [CHAT[1]]}, "prompt_completion", CHAT),
        ({"prompt": [*CHAT, CHAT[0]], "completion": [CHAT[1]]}, "prompt_completion",  # the prompt is only read
         [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT]),
        ({"messages": [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT]}, "messages",
         [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT]),
    ],
)  # fmt: skip
def test_chats(row: dict[str, Any], form: str, messages: list[dict[str, str]]) -> None:
    assert detect(row, {})[0] == form
    assert read(row).messages == messages


def test_tools_and_their_calls_become_objects() -> None:
    row = {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [CALL]},
                        {"role": "tool", "content": "sunny"}, CHAT[1]], "tools": json.dumps([WEATHER])}  # fmt: skip
    sample = read(row)
    assert sample.tools == [WEATHER]
    assert sample.messages[1]["content"] == ""
    assert sample.messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Paris"}}
    assert sample.messages[2] == {"role": "tool", "content": "sunny"}


def test_calls_in_older_spellings() -> None:
    """ShareGPT's function_call turns, and OpenAI's key of that name, are tool calls: templates write those."""
    written = {"name": "weather", "arguments": {"city": "Paris"}}
    called = [{"type": "function", "function": written}]
    for value in (written, [written], {**written, "arguments": '{"city": "Paris"}'}):
        turns = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": json.dumps(value)}]
        assert read({"conversations": turns}).messages[1] == {
            "role": "assistant", "content": "", "tool_calls": called
        }  # fmt: skip
    nothing = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "now", "arguments": ""}}]}
    assert read({"messages": [CHAT[0], nothing]}).messages[1]["tool_calls"][0]["function"]["arguments"] == {}
    turn = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    assert read({"messages": [CHAT[0], turn]}).messages[1]["tool_calls"] == called


def test_text_in_all_its_spellings() -> None:
    assert read({"text": "Once", "meta": {"red_pajama_subset": "arxiv"}}).text == "Once"  # RedPajama sample
    assert read({"content": "Once"}).text == "Once"
    assert read({"raw_content": "Once"}).text == "Once"  # RedPajama v2


def test_prompt_and_completion_stay_as_they_are() -> None:
    sample = read({"prompt": "2 + 2 =", "completion": " 4"})
    assert (sample.messages, sample.prompt, sample.text) == (None, "2 + 2 =", " 4")
    assert read({"question": "2 + 2 =", "answer": " 4"}) == sample


def test_odd_names_are_mapped() -> None:
    assert read({"frage": "Hi", "antwort": "Hello"}, {"instruction": "frage", "output": "antwort"}).messages == CHAT
    assert read({"body": "Once", "text": 3}, {"text": "body"}).text == "Once"
    assert (
        read({"prompt": "Hi", "completion": "Hello"}, {"instruction": "prompt", "output": "completion"}).messages
        == CHAT
    )


def test_characters_are_those_of_the_row() -> None:
    row = {"instruction": "abc", "input": "de", "output": "f", "system": "uncounted", "history": [["x", "y"]]}
    assert read(row).characters == 6
    assert read({"messages": CHAT}).characters == len("HiHello")
    assert read({"prompt": "abc", "completion": "de"}).characters == 5


@pytest.mark.parametrize(
    ("row", "form", "words"),
    [
        ("text", "alpaca", "a string, expected an object"),
        ({"instruction": "Hi"}, "alpaca", "output is missing"),
        ({"instruction": "Hi", "output": 7}, "alpaca", "output is a number, expected a string"),
        ({"instruction": "Hi", "output": None}, "alpaca", "output is missing"),
        ({"instruction": "Hi", "output": "x", "history": "y"}, "alpaca", "history is a string"),
        ({"instruction": "Hi", "output": "x", "history": [["y"]]}, "alpaca", "question, answer"),
        ({"messages": []}, "messages", "an empty list"),
        ({"messages": "Hi"}, "messages", "messages is string, expected a list"),
        ({"messages": ["Hi"]}, "messages", "turn 0 is a string"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "messages", "'narrator': use one of system"),
        ({"messages": [{"role": "user"}]}, "messages", "the content of turn 0 is a null"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages", "content of turn 0 is a list"),
        ({"messages": CHAT, "tools": "[{"}, "messages", "tools is broken JSON"),
        ({"messages": [{**CHAT[1], "tool_calls": 5}]}, "messages", "tool_calls of turn 0 is a number, expected a list"),
        ({"messages": [{**CHAT[1], "tool_calls": [{"function": {}}]}]}, "messages", "without a function and its name"),
        ({"messages": [{**CHAT[1], "weight": 0.5}]}, "messages", "turn 0 has weight 0.5: use 0"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "sharegpt", "turn 0 is broken JSON"),
        ({"prompt": [], "completion": []}, "prompt_completion", "completion is an empty list"),
        ({"messages": CHAT, "tools": [3]}, "messages", "expected a list of objects"),
        ({"messages": CHAT}, "alpaca", "looks like messages among alpaca"),
        ({"text": "x"}, "sharegpt", "looks like text among sharegpt"),
        ({"texts": "x"}, "text", "text is missing"),
    ],
)  # fmt: skip
def test_wrong_rows_say_what_is_wrong(row: object, form: str, words: str) -> None:
    with pytest.raises(BadRow, match=words):
        to_sample(row, form, {})


def test_unknown_keys_are_named() -> None:
    with pytest.raises(BadRow, match=r"keys antwort, frage fit no format: name it with data.format"):
        detect({"frage": "Hi", "antwort": "Hello"}, {})
    with pytest.raises(BadRow, match=r"fit not alpaca, which needs instruction, output"):
        detect({"text": "Hi"}, {}, "alpaca")


def test_a_turn_of_a_chat_is_no_document() -> None:
    """A file that is one conversation would otherwise be read as texts, answers and questions alike."""
    with pytest.raises(BadRow, match="keys content, role fit no format"):
        detect(CHAT[0], {})
    assert detect({"content": "x", "role": "y"}, {"text": "content"})[0] == "text"  # unless it is said


def test_column_maps_name_keys_that_formats_read() -> None:
    check_columns({"instruction": "q", "history": "h", "text": "body"})
    with pytest.raises(UserError, match="no format reads 'histroy': did you mean history"):
        check_columns({"histroy": "h"})


def test_equal_content_is_equal_and_other_content_is_not() -> None:
    one, other = read({"messages": CHAT}), read({"conversations": CHAT})
    assert one.content() == other.content()
    assert read({"prompt": "a", "completion": "bc"}).content() != read({"prompt": "ab", "completion": "c"}).content()


KEYS = ["messages", "conversations", "instruction", "input", "output", "history", "system", "tools", "prompt",
        "completion", "text", "role", "content", "from", "value", "tool_calls", "function", "arguments",
        "function_call", "weight", "name"]  # fmt: skip
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["user", "assistant", "function_call", "text", "{", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300)
@given(anything, st.sampled_from(sorted(FORMATS)))
def test_whatever_json_says_is_a_sample_or_a_bad_row(row: object, form: str) -> None:
    with contextlib.suppress(BadRow):
        sample = to_sample(row, form, {})
        assert sample.characters >= 0
        assert isinstance(sample.content(), str)
        for message in sample.messages or ():
            assert isinstance(message["content"], str)
