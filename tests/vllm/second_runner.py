"""vLLM's second model runner on a CPU, by Triton's interpreter: JOB.json, answers to OUT.json.

A process of its own, since Triton decides as it is imported. Its kernels are interpreted, which
tells whether outputs are equal and nothing about time.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

os.environ |= {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def _pretend_a_triton_backend() -> None:
    """vLLM's CPU build has a worker for this runner, and asks for a backend that no wheel has."""
    from triton.backends import backends

    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)


def _mend_the_interpreter() -> None:
    """Triton's (3.9) spreads a truth value as what was compared, and refuses it as a mask."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    theirs = interpreter.InterpreterBuilder.create_splat

    def create_splat(self: Any, kind: Any, value: Any) -> Any:
        if value.data.dtype != np.bool_:
            return theirs(self, kind, value)
        return interpreter.TensorHandle(np.full(kind.shape, value.data, np.bool_), tl.int1)

    interpreter.InterpreterBuilder.create_splat = create_splat


def _schedule_ahead() -> None:
    """vLLM's CPU platform takes async scheduling back, though the second runner bears it there."""
    from vllm.platforms import current_platform

    theirs = type(current_platform).check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: Any, config: Any) -> None:
        theirs(cls, config)
        config.scheduler_config.async_scheduling = True

    type(current_platform).check_and_update_config = classmethod(check_and_update_config)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Answer the job's requests in one engine, all at once; some are aborted on the way."""
    from vllm.sampling_params import StructuredOutputsParams
    from vllm_engine import engine

    from vllm import SamplingParams

    if job["options"].get("async_scheduling"):
        _schedule_ahead()
    pack = Path(job["pack"]) if job["pack"] else None
    llm = engine(pack, **job["options"], second=True, enforce_eager=True, disable_log_stats=False)
    core = llm.llm_engine
    assert core.vllm_config.use_v2_model_runner
    ahead = core.vllm_config.scheduler_config.async_scheduling
    for i, request in enumerate(job["requests"]):
        given = dict(request["params"])
        if "json" in given:
            given["structured_outputs"] = StructuredOutputsParams(json=given.pop("json"))
        prompt = {"prompt_token_ids": request["prompt"]}
        core.add_request(str(i), prompt, SamplingParams(**given))
    said: dict[str, list[int]] = {}
    steps = 0
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished and output.outputs[0].finish_reason != "abort":
                said[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == job["abort_at"]:
            core.abort_request([str(i) for i in job["abort"]])
    counted = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    stats = llm.collective_rpc("tascade_stats")[0] if pack else {}
    return {"said": said, "steps": steps, "ahead": ahead, "counted": counted, "stats": stats}


if __name__ == "__main__":
    _pretend_a_triton_backend()
    _mend_the_interpreter()
    found = run(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
