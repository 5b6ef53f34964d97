"""One record to one Example: the shapes, their precedence, and every refusal with its place."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tascade.core import Example
from tascade.data.formats import to_example
from tascade.errors import DataError

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("record", "prompt", "completion"),
    [
        ({"prompt": "2+2?", "completion": "4"}, "2+2?", "4"),
        ({"prompt": "", "completion": "4"}, "", "4"),
        ({"prompt": [USER], "completion": [ANSWER]}, (USER,), "4"),
        ({"prompt": [USER], "completion": "4"}, (USER,), "4"),
        ({"prompt": (SYSTEM, USER), "completion": (ANSWER,)}, (SYSTEM, USER), "4"),
        ({"prompt": [USER], "completion": [ANSWER, USER, ANSWER]}, (USER, ANSWER, USER), "4"),
        ({"messages": [SYSTEM, USER, ANSWER]}, (SYSTEM, USER), "4"),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, (USER, ANSWER, USER), "4"),
        ({"messages": [ANSWER]}, None, "4"),
        ({"completion": "4"}, None, "4"),
        ({"output": "4"}, None, "4"),
        ({"text": "4"}, None, "4"),
        ({"prompt": None, "completion": "4", "messages": None}, None, "4"),
        ({"prompt": "2+2?", "messages": [USER, ANSWER]}, (USER,), "4"),
        ({"prompt": "p", "completion": "c", "messages": [USER, ANSWER]}, "p", "c"),
        ({"text": "rendered", "messages": [USER, ANSWER]}, (USER,), "4"),
        ({"prompt": "2+2?", "completion": "4", "label": 3, "meta": {"a": [None]}}, "2+2?", "4"),
    ],
)
def test_shapes(record: dict[str, Any], prompt: object, completion: str) -> None:
    assert to_example(record, "f:1") == Example(prompt, completion, where="f:1")  # type: ignore[arg-type]


def test_messages_keep_what_templates_read_and_drop_the_rest() -> None:
    tool = {"role": "tool", "content": "4", "name": "sum", "tool_call_id": "c1", "weight": 0}
    asked = {**USER, "name": None, "tool_calls": [], "function_call": None}
    example = to_example({"messages": [asked, tool, ANSWER]})
    kept = {"role": "tool", "content": "4", "name": "sum", "tool_call_id": "c1"}
    assert example.prompt == (USER, kept)


@pytest.mark.parametrize(
    ("row_id", "kept"),
    [("a-1", "a-1"), (7, "7"), (True, ""), (1.5, ""), (None, ""), ([1], ""), ("", "")],
)
def test_id_is_kept_when_it_is_text_or_an_integer(row_id: object, kept: str) -> None:
    assert to_example({"id": row_id, "completion": "x"}).id == kept


REFUSED = [
    # record, field of the error, words of its message, what it got
    ("just text", "", "object with named fields", "str 'just text'"),
    (["a"], "", "object with named fields", "list of 1"),
    (None, "", "object with named fields", "null"),
    ({}, "completion", "missing or null", "no fields"),
    ({"prompt": "x"}, "completion", "missing or null", "'prompt'"),
    ({"prompt": "x", "completion": None}, "completion", "missing or null", "null"),
    ({"messages": None}, "messages", "missing or null", "null"),
    ({"prompt": "x", "output": "y"}, "completion", "missing or null", "'output'"),
    ({"question": "x", "answer": "y"}, "completion", "missing or null", "'question', 'answer'"),
    ({"completion": 3}, "completion", "must be text", "int"),
    ({"prompt": "x", "completion": 3}, "completion", "chat messages", "int"),
    ({"output": 3}, "output", "must be text", "int"),
    ({"text": b"x"}, "text", "must be text", "bytes"),
    ({"prompt": 1.5, "completion": "x"}, "prompt", "chat messages", "float"),
    ({"prompt": {"a": 1}, "completion": "x"}, "prompt", "chat messages", "dict with fields 'a'"),
    ({"prompt": b"x", "completion": "x"}, "prompt", "chat messages", "bytes"),
    ({"prompt": "x", "completion": ""}, "completion", "empty", "''"),
    ({"text": ""}, "text", "empty", "''"),
    ({"prompt": "x", "completion": [ANSWER]}, "prompt", "the prompt is a string", "str 'x'"),
    ({"prompt": [USER], "completion": []}, "completion", "chat messages", "list of 0"),
    ({"prompt": [], "completion": "x"}, "prompt", "chat messages", "list of 0"),
    ({"messages": []}, "messages", "chat messages", "list of 0"),
    ({"messages": "hi"}, "messages", "chat messages", "str 'hi'"),
    ({"messages": [USER, "hi"]}, "messages[1]", "must be an object", "str 'hi'"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "no such field", "'content'"),
    ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content", "no such", "'role'"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "no such", "null"),
    ({"messages": [{"role": 1, "content": "x"}]}, "messages[0].role", "must be text", "int"),
    ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content", "text", "list"),
    ({"messages": [ANSWER, USER]}, "messages[1].role", "must be the assistant's", "'user'"),
    ({"prompt": [USER], "completion": [USER]}, "completion[0].role", "assistant's", "'user'"),
    (
        {"messages": [USER, {**ANSWER, "content": ""}]},
        "messages[1].content",
        "completion is empty",
        "''",
    ),
    (
        {"messages": [USER, {**ANSWER, "tool_calls": [{"id": 1}]}, ANSWER]},
        "messages[1].tool_calls",
        "not text",
        "list of 1",
    ),
    ({"completion": "a\ud83d"}, "completion", "surrogate", "U+D83D at character 1"),
    ({"prompt": "\udc80", "completion": "a"}, "prompt", "surrogate", "U+DC80 at character 0"),
    ({"id": "\udfff", "text": "a"}, "id", "surrogate", "U+DFFF"),
    ({"id": 10**5000, "text": "a"}, "id", "too long", ""),
    ({"messages": [USER, {**ANSWER, "name": "\ud800"}]}, "messages[1].name", "surrogate", "U+D8"),
]


@pytest.mark.parametrize(("record", "field", "message", "got"), REFUSED)
def test_refusals_name_the_row_the_field_and_what_was_got(
    record: object, field: str, message: str, got: str
) -> None:
    with pytest.raises(DataError) as caught:
        to_example(record, "tasks.jsonl:12")
    error = caught.value
    assert error.where == ("tasks.jsonl:12: " + field if field else "tasks.jsonl:12")
    assert message in error.message
    assert got in str(error.got or "")
    assert str(error).encode()


@pytest.mark.parametrize(
    ("record", "fix"),
    [
        ({"prompt": "x", "output": "y"}, "rename 'output' to 'completion', or"),
        ({"prompt": "x", "completions": "y"}, "rename 'completions' to 'completion', or"),
        ({"instruction": "x"}, "put the text the model should write in 'completion'"),
    ],
)
def test_a_missing_completion_is_answered_with_the_likely_fix(
    record: dict[str, str], fix: str
) -> None:
    with pytest.raises(DataError) as caught:
        to_example(record)
    assert caught.value.fix.startswith(fix)
    assert caught.value.wanted


def test_an_error_shows_a_bounded_piece_of_the_row() -> None:
    with pytest.raises(DataError) as caught:
        to_example({f"field {n}" * 1000: "x" for n in range(1000)}, "f:1")
    assert len(str(caught.value)) < 2000


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
message_like = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", 1]), "content": json_like}
)
field_like = json_like | st.lists(message_like, max_size=3)
names = ["id", "prompt", "completion", "messages", "output", "text", "other"]
record_like = st.dictionaries(st.sampled_from(names), field_like, max_size=5)


@given(record_like | json_like)
def test_any_value_becomes_a_sound_example_or_a_data_error(record: object) -> None:
    refused = None
    try:
        example = to_example(record, "f:1")
    except DataError as error:
        refused = error
    if refused is not None:
        assert refused.where.startswith("f:1")
        assert str(refused).encode()
        return
    assert example.completion.encode()
    assert isinstance(example.id, str)
    if isinstance(example.prompt, tuple):
        assert example.prompt
        assert all(message["role"] and message["content"] is not None for message in example.prompt)
    # an Example is itself a shape: reading it again changes nothing
    again = {"id": example.id, "prompt": example.prompt, "completion": example.completion}
    assert to_example(again, "f:1") == example


# --- shapes of others -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "prompt", "completion"),
    [
        ({"instruction": "add", "input": "2 2", "output": "4"}, "add\n\n2 2", "4"),
        ({"instruction": "add", "input": "", "output": "4", "text": "rendered"}, "add", "4"),
        (
            {"system": "be brief", "prompt": "2+2", "completion": "4"},
            ({"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2"}),
            "4",
        ),
        (
            {"conversations": [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": "4"}]},
            ({"role": "user", "content": "2+2"},),
            "4",
        ),
        ({"completion": "4", "id": "a", "split": "train", "lang": "en"}, None, "4"),
        ({"output": "4", "score": 1.5, "note": None, "empty": " "}, None, "4"),
    ],
)
def test_the_shapes_of_others_are_read(record: Any, prompt: Any, completion: str) -> None:
    found = to_example(record)
    assert (found.prompt, found.completion) == (prompt, completion)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"text": "the review", "label": "positive"}, "label"),
        ({"text": "the question", "sql": "SELECT 1"}, "sql"),
        ({"text": "the source", "target": "das Ziel"}, "target"),
        ({"text": "the article", "summary": "short"}, "summary"),
        ({"input": "the question", "output": "the answer"}, "input"),
        ({"question": "q", "completion": "a"}, "question"),
        ({"output": "4", "text": "a document"}, "text"),
    ],
)
def test_an_input_is_never_learned_as_the_answer(record: Any, named: str) -> None:
    with pytest.raises(DataError, match=named) as said:
        to_example(record, "rows.jsonl:1")
    assert "rename the input to 'prompt'" in str(said.value)
