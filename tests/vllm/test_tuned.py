"""A model with new tokens is served as it is: its own ids in, its own text out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm_engine import engine

from tascade import bundled

EXPANSION_TEXTS = ['{"category": "', '", "priority": "', '", "', "account"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The bundled model with rows for new tokens, exported; and what they stand for."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tascade.enrich.tokens.family import TokenizerFamily
    from tascade.enrich.tokens.merger import TokenMerger
    from tascade.enrich.train.embeddings import init_rows, resize_embeddings
    from tascade.enrich.train.export import reopen, write_model

    model = AutoModelForCausalLM.from_pretrained(bundled.model_path(), dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path())
    family = TokenizerFamily(tokenizer)
    spelled = [tuple(tokenizer(t, add_special_tokens=False).input_ids) for t in EXPANSION_TEXTS]
    expansions = [ids for ids in spelled if len(ids) > 1 and family.spell(ids)]
    resize_embeddings(model, family.size + len(expansions))
    init_rows(model, expansions, family.size)
    out = tmp_path_factory.mktemp("tuned") / "model"
    write_model(model, tokenizer, expansions, family.size, out)
    reopen(out, model, [[3, 4, family.size]])
    return out, TokenMerger(expansions, family.size)


def test_vllm_says_the_new_tokens_text_and_what_transformers_says(tuned: tuple[Path, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vllm import SamplingParams

    folder, merger = tuned
    served = engine(None, model=str(folder))
    base = AutoTokenizer.from_pretrained(bundled.model_path())
    prompt = base("Ticket: the printer is on fire").input_ids
    for number, expansion in enumerate(merger.expansions):
        new = merger.first + number
        forced = SamplingParams(temperature=0.0, max_tokens=2, allowed_token_ids=[new])
        said = served.generate([{"prompt_token_ids": prompt}], forced, use_tqdm=False)[0].outputs[0]
        assert list(said.token_ids) == [new, new]
        assert said.text == base.decode(list(expansion) * 2)
    greedy = SamplingParams(temperature=0.0, max_tokens=24)
    said = served.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)[0].outputs[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ids = torch.tensor([prompt])
    plain = model.generate(ids, max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
    assert list(said.token_ids) == plain
