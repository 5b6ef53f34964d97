"""Two checks inside vLLM that take more requests than a test should: leaks, and grammars.

    python benchmarks/vllm_checks.py leaks --packs FOLDER --json benchmarks/vllm_leaks.json
    python benchmarks/vllm_checks.py grammars --packs FOLDER --json benchmarks/vllm_grammars.json

Run it with the Python of an environment that holds vLLM and tascade. 2,000 requests, each with a
secret of its own (token ids that no document of the corpus holds) behind words that all share, long
and short, of many lengths, so that rows move all the time; every draft is looked at in the engine's
own process, and every draft is verified. Or 100 concurrent requests under a JSON schema.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TASK = "multilabel_nlupp"
SCHEMA = {
    "type": "object",
    "properties": {
        "intents": {"type": "array", "items": {"type": "string", "maxLength": 24}, "maxItems": 3},
        "urgent": {"type": "boolean"},
    },
    "required": ["intents", "urgent"],
    "additionalProperties": False,
}


def engine(options: argparse.Namespace) -> Any:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    watching = str(HERE.parent / "tests" / "vllm")
    sys.path.insert(0, watching)  # which the engine's process is given
    from vllm import LLM

    name = {"method": "custom_class", "model": "watch.WatchedProposer"}
    pack = str((options.packs / TASK).resolve())
    return LLM(
        model=str(options.shared / "models" / "pilot"),
        dtype="float32",
        max_num_seqs=100,
        max_model_len=2048,
        speculative_config=name | {"num_speculative_tokens": 16},
        additional_config={"tascade": {"pack": pack, "budget": False}},
        worker_extension_cls="watch.WatchingExtension",
        # A small model under a grammar that allows white space anywhere says nothing else.
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    )


def unspoken(options: argparse.Namespace) -> list[int]:
    from tascade.index.corpus import CorpusIndex
    from tascade.pack import Pack

    corpus = CorpusIndex.open(Pack.open(options.packs / TASK).corpus)
    held = {token for _, document in corpus.documents() for token in document.tolist()}
    return sorted(set(range(300, corpus.vocab_size)) - held)


def leaks(llm: Any, options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from vllm import SamplingParams

    ids, rng = unspoken(options), np.random.default_rng(0)
    common = list(range(300, 316))
    requests, params = [], []
    for i in range(options.requests):
        secret = rng.choice(ids, 6, replace=False).tolist()
        requests.append({"prompt_token_ids": (common + secret) * int(rng.integers(2, 30))})
        allowed = [*common, *secret] if i % 2 else None
        params.append(
            SamplingParams(
                temperature=1.0,
                max_tokens=int(rng.integers(3, 40)),
                ignore_eos=True,
                allowed_token_ids=allowed,
            )
        )
    begin = time.perf_counter()
    llm.generate(requests, params, use_tqdm=False)
    seen = llm.collective_rpc("tascade_watched")[0]
    return {"requests": options.requests, "seconds": time.perf_counter() - begin} | seen


def grammars(llm: Any, options: argparse.Namespace) -> dict[str, Any]:
    from vllm.sampling_params import StructuredOutputsParams

    from tascade.data.load import load_examples
    from vllm import SamplingParams

    before = llm.collective_rpc("tascade_stats")[0]
    rows = list(load_examples(options.shared / "data" / TASK / "test.jsonl"))[:100]
    prompts = [str(row.prompt) for row in rows]
    grammar = StructuredOutputsParams(json=SCHEMA)
    params = SamplingParams(temperature=0.0, max_tokens=160, structured_outputs=grammar)
    valid, cut, wrong = 0, 0, []
    for output in llm.generate(prompts, params, use_tqdm=False):
        answer = output.outputs[0]
        try:
            value = json.loads(answer.text)
            valid += set(value) == {"intents", "urgent"}
        except ValueError:
            cut += answer.finish_reason == "length"
            wrong.append(answer.text)
    after = llm.collective_rpc("tascade_stats")[0]
    return {
        "requests": len(prompts),
        "valid": valid,
        "ended_by_the_token_limit": cut,
        "invalid": wrong[:3],
        "drafted": after["drafted"] - before["drafted"],
        "accepted": after["accepted"] - before["accepted"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("check", choices=["leaks", "grammars"])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--packs", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    llm = engine(options)
    from tascade.bench.machine import machine_info
    from vllm import __version__

    report = {
        "command": f"python benchmarks/vllm_checks.py {options.check}",
        "machine": machine_info() | {"vllm": __version__},
        options.check: (leaks if options.check == "leaks" else grammars)(llm, options),
    }
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
