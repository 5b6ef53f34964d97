"""Rows whose prompt and answer lie in fields of other names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tascade.config import DataConfig
from tascade.errors import DataError
from tascade.util.templates import Template

OUTPUT_FIELDS = ("completion", "output", "text")
"""Fields that can hold an output, in order of precedence."""
_CHATS = ("messages", "conversations")


@dataclass(frozen=True, slots=True)
class Fields:
    """Which fields of a row are its prompt and its answer; what is empty has its usual name.

    ``prompt``, ``completion``: names; ``template``: makes the prompt of several fields instead.
    """

    prompt: str = ""
    completion: str = ""
    template: Template | None = None

    @classmethod
    def of(cls, config: DataConfig) -> Fields:
        """The fields that a recipe's data section names."""
        text = config.prompt_template
        template = Template.parse(text, "data.prompt_template") if text else None
        return cls(config.prompt_field, config.completion_field, template)

    @property
    def of_prompt(self) -> tuple[str, ...]:
        """The names that the prompt is made from; none where it has its usual one."""
        if self.template is not None:
            return self.template.names
        return (self.prompt,) if self.prompt else ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is given, each once."""
        own = (self.completion,) if self.completion else ()
        return tuple(dict.fromkeys((*self.of_prompt, *own)))

    def check(self, there: Collection[object], where: str) -> None:
        """Refuse a name that a row or a header does not have.

        Raises:
            DataError: naming the fields there are.
        """
        lacking = [name for name in self.names if name not in there]
        if lacking:
            near = difflib.get_close_matches(lacking[0], list(map(str, there))[:100], 1)
            raise DataError(
                f"there is no field {lacking[0][:40]!r}",
                got=_listed(there),
                wanted="the name of one of these fields",
                where=where,
                fix=f"did you mean {near[0]!r}?" if near else "name one of the fields there are",
            )

    def renamed(
        self, record: Mapping[str, Any], where: str
    ) -> tuple[Mapping[str, Any], dict[str, tuple[str, ...]]]:
        """A row with its prompt and answer under their usual names; and what these are made of.

        Raises:
            DataError: a named field is not there or null, or no text where a template needs one.
        """
        if not self.names:
            return record, {}
        self.check(record, where)
        for name in self.names:
            if record[name] is None:
                raise DataError("the field is null", wanted="text", where=at(where, name))
        # What is named is not taken for anything else as well, nor is a chat beside it for the row.
        row = {n: v for n, v in record.items() if n not in (*self.names, *_CHATS)}
        made: dict[str, tuple[str, ...]] = {}
        if self.of_prompt:
            row["prompt"], made["prompt"] = self._prompt(record, where), self.of_prompt
        if self.completion:
            # Beside an instruction (Alpaca's) an answer is an output, beside a prompt a completion.
            alpaca = row.get("prompt") is None and row.get("instruction") is not None
            usual = "output" if alpaca else "completion"
            row[usual], made[usual] = record[self.completion], (self.completion,)
            return row, made
        usual = next((name for name in OUTPUT_FIELDS if row.get(name) is not None), "")
        if not usual:
            raise DataError(
                "no field holds the answer",
                got=_listed(record),
                wanted=" or ".join(OUTPUT_FIELDS),
                where=where,
                fix="name the answer's field with --completion-field (data.completion_field)",
            )
        row["completion"], made["completion"] = row[usual], (usual,)
        return row, made

    def _prompt(self, record: Mapping[str, Any], where: str) -> Any:
        if self.template is None:
            return record[self.prompt]
        names = self.template.names
        return self.template.fill({name: _text(record[name], at(where, name)) for name in names})


def in_own_names(error: DataError, made: Mapping[str, tuple[str, ...]], where: str) -> DataError:
    """The same refusal at the field that the row has, where that stands for one of another name."""
    inside = error.where.removeprefix(f"{where}: ")
    for usual, names in made.items():
        if len(names) == 1 and (inside == usual or inside.startswith(f"{usual}[")):
            place = at(where, names[0] + inside.removeprefix(usual))
            message, got = error.message.replace(repr(usual), repr(names[0])), error.got
            if isinstance(got, str):
                got = got.replace(repr(usual), repr(names[0]))
            return DataError(message, got=got, wanted=error.wanted, where=place, fix=error.fix)
    return error


USUAL = Fields()
"""Every field has its usual name."""


def at(where: str, field: str) -> str:
    """Names a field of a row, in an error."""
    return f"{where}: {field}" if where else field


def _listed(names: Collection[object]) -> str:
    """The first fields of a row or a header, bounded."""
    shown = [repr(str(name)[:40]) for name in names][:12]
    more = ", ..." if len(names) > len(shown) else ""
    return "fields " + ", ".join(shown) + more if shown else "no fields"


def _text(value: object, where: str) -> str:
    """A value as a template shows it: text, or a number as it is written."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return str(value)
        except ValueError as error:  # Python refuses to print very long integers
            raise DataError("this integer is too long to be printed", where=where) from error
    raise DataError(
        "a template takes text and numbers",
        got=type(value).__name__,
        wanted="text or a number",
        where=where,
        fix="write the value as text, or leave the field out of the template",
    )
