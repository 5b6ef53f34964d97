"""What this machine's CPU has instructions for."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_FLAGS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}
"""What Linux calls the instructions that multiply in these precisions (x86, and ARM's last)."""


@cache
def multiplies(dtype: str) -> bool:
    """Whether this CPU has products in this precision; yes where the system does not say.

    Without them a half precision is converted back and forth: it is slower than float32, and what
    it rounds depends on how much is computed at once.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return True
    return dtype not in _FLAGS or not _FLAGS[dtype].isdisjoint(flags)
