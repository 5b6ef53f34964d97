"""What this machine's CPU has instructions for."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_FLAGS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}
"""What Linux calls the instructions that multiply in these precisions (x86, and ARM's last)."""


def dtype_name(dtype: object) -> str:
    """A precision's name, as users give it; ``dtype``: torch's, or the name."""
    return str(dtype).removeprefix("torch.")


@cache
def multiplies(dtype: object) -> bool:
    """Whether this CPU has products in a precision; yes where the system does not say.

    ``dtype``: torch's, or its name.

    Without them a half precision is converted back and forth: it is slower than float32, and what
    it rounds depends on how much is computed at once.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return True
    name = dtype_name(dtype)
    return name not in _FLAGS or not _FLAGS[name].isdisjoint(flags)
