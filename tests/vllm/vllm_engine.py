"""Engines of the bundled model for the tests, plain and with tascade."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PROPOSER = "watch.WatchedProposer"
EXTENSION = "watch.WatchingExtension"
SECOND = "tascade.integrations.vllm.WorkerExtension"


def engine(
    pack: Path | None,
    *,
    budget: bool = True,
    packs: dict[str, str] | None = None,
    learn: Path | None = None,
    second: bool = False,
    drafted: int = 12,
    **options: Any,
) -> Any:
    """An engine of the bundled model; with a pack, tascade drafts in it, and is watched.

    ``packs``: several by name, in place of one; ``learn``: where finished answers go; ``second``:
    in vLLM's second model runner, where nobody watches; ``drafted``: most tokens of a draft.
    """
    from tascade import bundled
    from vllm import LLM

    if pack is not None or packs:
        named: dict[str, Any] = {"packs": packs} if packs else {"pack": str(pack)}
        if learn is not None:
            named["learn"] = str(learn)
        config: dict[str, Any] = {"num_speculative_tokens": drafted}
        config |= {"method": "ngram_gpu"} if second else {"method": "custom_class"}
        config |= {} if second else {"model": PROPOSER}
        options |= {
            "speculative_config": config,
            "additional_config": {"tascade": named | {"budget": budget}},
            "worker_extension_cls": SECOND if second else EXTENSION,
        }
    sizes = {"max_model_len": 1024, "max_num_seqs": 8, "seed": 0}
    given: dict[str, Any] = {"model": str(bundled.model_path()), "dtype": "float32"}
    return LLM(**given | sizes | options)


def stats(llm: Any) -> dict[str, Any]:
    found: dict[str, Any] = llm.collective_rpc("tascade_stats")[0]
    return found


def limits(count: int) -> list[Any]:
    """Sampling parameters under which requests end at different steps."""
    from vllm import SamplingParams

    return [SamplingParams(temperature=0.0, max_tokens=8 + (29 * i) % 60) for i in range(count)]


def said(llm: Any, prompts: list[dict[str, list[int]]], params: Any = None) -> list[list[int]]:
    outputs = llm.generate(prompts, params or limits(len(prompts)), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def watched(llm: Any) -> dict[str, int]:
    found: dict[str, int] = llm.collective_rpc("tascade_watched")[0]
    return found
