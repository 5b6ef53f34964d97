"""The device's kernel, compiled for NVIDIA GPUs where there is none: prints the bytes of each.

Triton's interpreter takes more than its compiler does.
"""

from __future__ import annotations

import json
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compiled

from tascade.draft.ngram.device_draft import draft_kernel

TYPES = {
    **dict.fromkeys(("ids_stride", "ns", "examples_stride", "longest", "vocabulary"), "i32"),
    **dict.fromkeys(("states", "shards", "drafts", "tallies"), "*i64"),
    **dict.fromkeys(("lengths", "prompts", "fresh", "example_lengths", "given"), "*i32"),
    **dict.fromkeys(("ids", "examples", "ends"), "*i32"),
    **{"calibration": "*fp64", "odds": "*fp32", "K": "constexpr", "ENDS": "constexpr"},
}


def main() -> None:
    source = ASTSource(
        draft_kernel, {n: TYPES[n] for n in draft_kernel.arg_names}, {"K": 16, "ENDS": 2}
    )
    options, found = {"num_warps": 1, "enable_fp_fusion": False}, {}
    for capability in (80, 90):
        made = compiled(source, target=GPUTarget("cuda", capability, 32), options=options)
        found[capability] = len(made.asm["cubin"])
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
