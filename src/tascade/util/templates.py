"""Text with named fields in braces, such as ``"{title}: {question}"``. No code is in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter

from tascade.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template.

    ``parts``: (text, name of the field behind it) in their order; the last name may be empty.
    """

    parts: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str, where: str) -> Template:
        """Read a template: fields by their whole name alone, literal braces doubled.

        A name is looked up as it stands: ``{a.b}`` is a field called ``a.b``, and reaches into
        nothing.

        Raises:
            ConfigError: braces that do not close, a field without a name, one with a format or a
                conversion, or no field at all.
        """
        try:
            found = list(Formatter().parse(text))
        except ValueError as error:
            raise _refused(str(error), where) from error
        parts = []
        for literal, name, form, conversion in found:
            if name is not None and (not name or form or conversion):
                said = "{" + name + (f"!{conversion}" if conversion else "")
                raise _refused(said + (f":{form}" if form else "") + "}", where)
            parts.append((literal, name or ""))
        if not any(name for _, name in parts):
            raise _refused("no field", where)
        return cls(tuple(parts))

    @property
    def names(self) -> tuple[str, ...]:
        """The fields' names in their order, each once."""
        return tuple(dict.fromkeys(name for _, name in self.parts if name))

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with the fields' values; ``values`` has each of :attr:`names`."""
        return "".join(text + (values[name] if name else "") for text, name in self.parts)


def _refused(got: str, where: str) -> ConfigError:
    return ConfigError(
        "this is no template",
        got=got[:80],
        wanted="fields by name alone, such as {question}",
        where=where,
        fix="write literal braces twice, {{ and }}; formats and conversions are not taken",
    )
