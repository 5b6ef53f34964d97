"""A logged request with its answer, as OpenAI's API and vLLM have them, read as a plain row.

The answer is in ``choices``: of the record itself, of its ``response``, or of the ``body`` in that
(as in files of batches). The prompt is in ``messages`` or ``prompt``: of the record, of its
``request``, or of the ``body`` in either.
"""

from __future__ import annotations

from collections.abc import Mapping

from tascade.errors import DataError

_REQUEST, _RESPONSE = ("request", "body"), ("response", "body")


def served_row(record: Mapping[str, object], where: str = "") -> dict[str, object] | None:
    """``prompt`` and ``completion`` of a logged request; ``None`` where the record is none.

    Of several choices the first is read.

    Raises:
        DataError: it is one, and its answer is no text.
    """
    asked = _first(record, _REQUEST, ("messages", "prompt"))
    choices = _first(record, _RESPONSE, ("choices",))
    if asked is None or not isinstance(choices, list) or record.get("completion") is not None:
        return None
    first = choices[0] if choices else None
    if not isinstance(first, Mapping):
        return None  # the answers of a multiple-choice question
    message = first.get("message")
    if isinstance(message, Mapping):
        said = message.get("content")
    elif "finish_reason" in first or "index" in first:
        said = first.get("text")
    else:
        return None
    if not isinstance(said, str):
        raise DataError(
            "the answer of this request is no text",
            got="null" if said is None else type(said).__name__,
            wanted="choices[0].message.content, or choices[0].text",
            where=where,
            fix="drop the row: a failed request, or a tool call",
        )
    found = {"prompt": asked, "completion": said}
    row_id = record.get("custom_id") or record.get("id")
    return found if row_id is None else found | {"id": row_id}


def _first(record: Mapping[str, object], within: tuple[str, str], names: tuple[str, ...]) -> object:
    """The first field of these names, of the record or of the mappings in it named ``within``."""
    outer, inner = within
    parts: list[object] = [record, record.get(outer), record.get(inner)]
    if isinstance(part := record.get(outer), Mapping):
        parts.append(part.get(inner))
    for part in parts:
        if isinstance(part, Mapping):
            for name in names:
                if part.get(name) is not None:
                    return part[name]
    return None
