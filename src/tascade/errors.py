"""Every error tascade raises on purpose.

    TascadeError
    ├── DataError          a row of task data cannot be used
    ├── PackError          a pack or corpus index is missing, broken or of another format
    │   └── FingerprintError   it was made for another tokenizer or model
    ├── ConfigError        a recipe or an option has a wrong name or value
    └── UnsupportedModelError  the model cannot be decoded speculatively

Each says what was found, what was wanted, where, and how to fix it.
"""

from __future__ import annotations


class TascadeError(Exception):
    """Base of all tascade errors.

    ``got`` and ``wanted`` state the two sides of the mismatch, ``where`` the file, line and
    field (or option) it was found in, ``fix`` what the user can do about it.
    """

    def __init__(
        self, message: str, *, got: object = None, wanted: str = "", where: str = "", fix: str = ""
    ) -> None:
        self.message, self.got, self.wanted, self.where, self.fix = message, got, wanted, where, fix
        parts = [f"{where}: {message}" if where else message]
        if got is not None:
            parts.append(f"  got:    {got}")
        if wanted:
            parts.append(f"  wanted: {wanted}")
        if fix:
            parts.append(f"  fix:    {fix}")
        super().__init__("\n".join(parts))


class DataError(TascadeError):
    """A row of task data cannot be used as it stands."""


class PackError(TascadeError):
    """A pack or a corpus index is missing, damaged, or of a format this version cannot read."""


class FingerprintError(PackError):
    """A pack was made for another tokenizer or model than the one given."""


class ConfigError(TascadeError):
    """A recipe, a flag or an argument has an unknown name or a value out of range."""


class UnsupportedModelError(TascadeError):
    """The model's state cannot be rewound, or its interfaces are not the ones tascade uses."""


class GateError(TascadeError):
    """A tuned model is not good enough to replace the one it was made from."""
