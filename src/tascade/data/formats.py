"""One raw record -> one :class:`~tascade.core.Example`.

The shapes are TRL's, Alpaca's and ShareGPT's. In order of precedence:

1. ``prompt`` + ``completion``, each a string or a list of chat messages; a ``system`` text beside
   them is the first message;
2. ``messages``: the last one, from the assistant, is the completion, the ones before it the prompt;
   ``conversations`` (``from``: system, human, gpt; ``value``) is the same;
3. ``instruction`` + ``output``: the prompt is the instruction and, behind an empty line, ``input``;
4. the output alone: ``completion``, ``output`` or ``text``, where no other text is left over, which
   may be the prompt under another name.

A logged request with its answer (``choices``) is read as well (:mod:`tascade.data.served`).

A field that is null counts as absent (Parquet and Arrow fill missing fields with null). Other
fields are ignored, except ``id``, which is kept when it is a string or an integer. Prompt and
answer may have other names (see :class:`~tascade.data.fields.Fields`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence, Sized

from tascade.core import Example
from tascade.data.fields import OUTPUT_FIELDS, USUAL, Fields, at, in_own_names
from tascade.data.served import served_row
from tascade.errors import DataError

FIELDS = (
    "id",
    "prompt",
    "completion",
    "messages",
    "output",
    "text",
    "system",
    "instruction",
    "input",
    "conversations",
)
"""Every field of a record that is read."""

_ABOUT = "id idx index split lang language url license meta metadata date timestamp dataset"
NOT_TEXT = frozenset(_ABOUT.split(" "))
"""Fields that say something of a row, and are no part of what a model reads or writes."""

SHAPES = (
    "'prompt' and 'completion', or 'messages', or 'instruction' and 'output', "
    "or 'completion' / 'output' / 'text' alone"
)
_SHAPES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("prompt", "completion"), ("system",)),
    (("messages",), ()),
    (("conversations",), ()),
    (("instruction", "output"), ("input", "system")),
)
"""What each shape needs, and what else of a row it reads, in order of precedence."""
_SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant"}

_MESSAGE_FIELDS = ("role", "content", "name", "tool_call_id")
_TOOL_FIELDS = ("tool_calls", "function_call")

Message = dict[str, str]


def to_example(record: object, where: str = "", names: Fields = USUAL) -> Example:
    """Turn one record into an example.

    Args:
        record: a mapping from field names to values, in one of the shapes of this module.
        where: names the row in error messages, for instance ``"train.jsonl:17"``.
        names: of the fields that hold prompt and answer, where they are not the usual ones.

    Raises:
        DataError: the record has none of the shapes, or a field that is read is not text
            (``where`` names the row and the field).
    """
    return read_record(record, where, names)[0]


def read_record(
    record: object, where: str = "", names: Fields = USUAL
) -> tuple[Example, tuple[str, ...]]:
    """The example of a record, and the names of the fields that its prompt and answer are from.

    Raises:
        DataError: see :func:`to_example`.
    """
    if not isinstance(record, Mapping):
        raise DataError(
            "a row must be an object with named fields",
            got=describe(record),
            wanted=SHAPES,
            where=where,
            fix="write one object a row, for instance {'prompt': '...', 'completion': '...'}",
        )
    served = served_row(record, where) if names == USUAL else None
    row, made = names.renamed(record if served is None else served, where)
    fields = {name: row[name] for name in FIELDS if row.get(name) is not None}
    shape = _shape(fields)
    try:
        row_id = _row_id(fields.get("id"), at(where, "id"))
        prompt, completion = _parts(row, fields, shape, where)
    except DataError as error:
        raise in_own_names(error, made, where) from error
    if served is not None:
        return Example(prompt=prompt, completion=completion, where=where, id=row_id), tuple(record)
    used = [name for usual in shape for name in made.get(usual, (usual,))]
    example = Example(prompt=prompt, completion=completion, where=where, id=row_id)
    return example, tuple(used)


def _shape(fields: Mapping[str, object]) -> tuple[str, ...]:
    """The fields that are read of a row, the one that its shape is known by first."""
    for needed, others in _SHAPES:
        if all(name in fields for name in needed):
            return (*needed, *(name for name in others if name in fields))
    alone = [] if "prompt" in fields else [name for name in OUTPUT_FIELDS if name in fields]
    return tuple(alone[:1])


def _parts(
    row: Mapping[str, object], fields: Mapping[str, object], shape: tuple[str, ...], where: str
) -> tuple[str | tuple[Message, ...] | None, str]:
    """Prompt and answer of a row of this shape."""
    kind = shape[0] if shape else ""
    if kind == "messages":
        return _split(_messages(fields[kind], where, kind), where, kind)
    if kind == "conversations":
        return _split(_messages(_spoken(fields[kind]), where, kind), where, kind)
    prompt: str | tuple[Message, ...] | None
    if kind == "prompt":
        prompt, completion = _pair(fields["prompt"], fields["completion"], where)
    elif kind == "instruction":
        parts = [fields["instruction"], *([fields["input"]] if fields.get("input") else [])]
        prompt = "\n\n".join(_encodable(part, at(where, "instruction")) for part in parts)
        completion = _output(fields["output"], at(where, "output"))
    else:
        return None, _output_alone(row, fields, kind, where)
    return _with_system(prompt, fields.get("system"), where), completion


def describe(value: object) -> str:
    """What ``value`` is, in a few words that are safe to print whatever it holds."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"str {value[:40]!r}" + ("..." if len(value) > 40 else "")
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with {_names(value)}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def _names(record: Iterable[object]) -> str:
    """The first field names of a record, bounded."""
    names = [repr(str(name)[:40]) for name, _ in zip(record, range(13), strict=False)]
    more = ", ..." if len(names) > 12 else ""
    return ("fields " + ", ".join(names[:12]) + more) if names else "no fields"


def _row_id(value: object, where: str) -> str:
    if isinstance(value, str):
        return _encodable(value, where)
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return str(value)
        except ValueError as error:  # Python refuses to print very long integers
            raise DataError("this integer is too long to be an id", where=where) from error
    return ""


def _pair(
    prompt: object, completion: object, where: str
) -> tuple[str | tuple[Message, ...] | None, str]:
    """Shape 1. A prompt of messages goes with a completion of either kind."""
    if isinstance(completion, str):
        text = _output(completion, at(where, "completion"))
        if isinstance(prompt, str):
            return _encodable(prompt, at(where, "prompt")), text
        return _messages(prompt, where, "prompt"), text
    answer = _messages(completion, where, "completion")
    if isinstance(prompt, str):
        raise DataError(
            "the completion is chat messages, but the prompt is a string",
            got=describe(prompt),
            wanted="a list of messages, as in the completion",
            where=at(where, "prompt"),
            fix="write the prompt as [{'role': 'user', 'content': ...}], or both as strings",
        )
    _, text = _split(answer, where, "completion")
    return (*_messages(prompt, where, "prompt"), *answer[:-1]), text


def _split(
    messages: tuple[Message, ...], where: str, field: str
) -> tuple[tuple[Message, ...] | None, str]:
    """What comes before the last message (None if nothing does), and its text."""
    last = messages[-1]
    if last["role"] != "assistant":
        raise DataError(
            "the last message must be the assistant's: it is the completion",
            got=f"role {describe(last['role'])}",
            wanted="role 'assistant'",
            where=at(where, f"{field}[{len(messages) - 1}].role"),
            fix="drop the messages after the last answer, or drop the row",
        )
    completion = _output(last["content"], at(where, f"{field}[{len(messages) - 1}].content"))
    return messages[:-1] or None, completion


def _with_system(
    prompt: str | tuple[Message, ...] | None, system: object, where: str
) -> str | tuple[Message, ...] | None:
    """A prompt behind a system text of the row's own."""
    if prompt is None or not system:
        return prompt
    first = {"role": "system", "content": _encodable(system, at(where, "system"))}
    rest = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    return (first, *rest)


def _spoken(value: object) -> object:
    """ShareGPT's conversation as chat messages; what is none is left for the next to complain."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        return value
    return [
        {"role": _SPEAKERS.get(str(item["from"]), item["from"]), "content": item.get("value")}
        if isinstance(item, Mapping) and "from" in item
        else item
        for item in value
    ]


def _check_left_over(record: Mapping[str, object], name: str, where: str) -> None:
    """Refuse an output alone beside another text, which may be what it answers."""
    others = [
        str(other)
        for other, value in record.items()
        if other not in (*NOT_TEXT, name) and isinstance(value, str) and value.strip()
    ]
    if others:
        shown = ", ".join(repr(other[:40]) for other in others[:6])
        raise DataError(
            f"is {name!r} the output alone, or is one of the other fields its prompt?",
            got=f"{name!r} and {shown}",
            wanted=SHAPES,
            where=at(where, name),
            fix="rename the input to 'prompt' and the answer to 'completion', or name them "
            f"with --prompt-field and --completion-field (data.prompt_field), or drop {shown}",
        )


def _output_alone(
    record: Mapping[str, object], fields: Mapping[str, object], name: str, where: str
) -> str:
    """The field ``name``, or the error that says why the record has no shape at all."""
    if name:
        _check_left_over(record, name, where)
        return _output(fields[name], at(where, name))
    missing = "completion"
    found = next((name for name in OUTPUT_FIELDS if name in fields), None)
    near = [str(name) for name in record if name not in FIELDS]
    found = found or next(iter(difflib.get_close_matches(missing, near[:100], 1)), None)
    null = next((name for name in ("messages", *OUTPUT_FIELDS) if name in record), None)
    got = describe(record)
    if found is None and null is not None:
        got, missing = "null", null
    raise DataError(
        "the field is missing or null",
        got=got,
        wanted=SHAPES,
        where=at(where, missing),
        fix=(
            f"rename {found!r} to 'completion'"
            if found
            else "put the text the model should write in 'completion'"
        )
        + ", or name your fields with --prompt-field and --completion-field (data.prompt_field, "
        "data.completion_field)",
    )


def _output(value: object, where: str) -> str:
    text = _encodable(value, where)
    if not text:
        raise DataError(
            "the completion is empty",
            got="''",
            wanted="at least one character",
            where=where,
            fix="write what the model should answer, or drop the row",
        )
    return text


def _messages(value: object, where: str, field: str) -> tuple[Message, ...]:
    """Check a list of chat messages and keep the fields that chat templates read."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray) or not value:
        raise DataError(
            "expected text or chat messages" if field != "messages" else "expected chat messages",
            got=describe(value),
            wanted="a list of at least one {'role': ..., 'content': ...}"
            + ("" if field == "messages" else ", or a string"),
            where=at(where, field),
            fix="write the messages as a list of objects"
            if field == "messages"
            else "write it as text, in quotes",
        )
    return tuple(_message(item, at(where, f"{field}[{n}]")) for n, item in enumerate(value))


def _message(item: object, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(
            "a chat message must be an object",
            got=describe(item),
            wanted="{'role': ..., 'content': ...}",
            where=where,
            fix="write each message with its role and content",
        )
    for name in ("role", "content"):
        if item.get(name) is None:
            raise DataError(
                "the message has no such field",
                got="null" if name in item else describe(item),
                wanted="'role' and 'content', both strings",
                where=f"{where}.{name}",
                fix=f"add {name!r} to the message",
            )
    for name in _TOOL_FIELDS:
        call = item.get(name)
        if call is not None and not (isinstance(call, Sized) and not len(call)):
            raise DataError(
                "structured tool calls are not text",
                got=describe(call),
                wanted="'role' and 'content', both strings",
                where=f"{where}.{name}",
                fix="render the call into 'content' as the model writes it",
            )
    kept = ((name, item.get(name)) for name in _MESSAGE_FIELDS)
    return {name: _encodable(v, f"{where}.{name}") for name, v in kept if v is not None}


def _encodable(value: object, where: str) -> str:
    """``value`` if it is a string that UTF-8 can hold."""
    if not isinstance(value, str):
        raise DataError(
            "the value must be text",
            got=describe(value),
            wanted="a string",
            where=where,
            fix="write the value as text (in JSON: in double quotes)",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "the text holds half of a surrogate pair, which is no character",
            got=f"U+{ord(value[error.start]):04X} at character {error.start}",
            wanted="text that UTF-8 can encode",
            where=where,
            fix="write the whole character, or remove the half",
        ) from error
    return value
