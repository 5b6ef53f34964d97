"""Public fakes: tiny models, a byte tokenizer, drafters with planted mistakes, a toy task.

Everything is built in memory from a seed; nothing is downloaded. tascade tests itself with these,
and so can code that builds on it.

    target = Target(tiny_model("llama"))
    plain = Decoder(target, NoDrafter()).generate([1, 2, 3], params).tokens
    fast = Decoder(target, OracleDrafter(plain, wrong_every=5)).generate([1, 2, 3], params).tokens
    assert fast == plain
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from tascade.core import EMPTY_TREE, ROOT, DraftTree, Example, IntArray, Source
from tascade.data.encode import BYTE_LETTERS
from tascade.errors import ConfigError

WINDOW = 24
"""Sliding window of the tiny models that have one: shorter than most test sequences."""

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gpt_neox": {"rotary_pct": 0.5},
    "gemma": {},
    "gemma2": {**_MIXED, "query_pre_attn_scalar": 8},
    "gemma3": {**_MIXED, "query_pre_attn_scalar": 8},
    "phi": {"partial_rotary_factor": 0.5},
}
FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""Names :func:`tiny_model` knows."""


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A random two-layer fp32 model of a Transformers family, in eval mode.

    Weights are large enough that what it says depends on all it has read. The global random state
    is left as it was.

    Args:
        family: one of :data:`FAMILIES`.
        seed: of the weights.
        overrides: config fields, e.g. ``vocab_size=260`` for :func:`byte_tokenizer`.

    Raises:
        ConfigError: an unknown family.
    """
    if family not in _FAMILIES:
        raise ConfigError("unknown family", got=family, wanted=", ".join(FAMILIES))
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = "gemma3_text" if family == "gemma3" else family
    config = AutoConfig.for_model(kind, **{**_COMMON, **_FAMILIES[family], **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # and no accelerator's
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIALS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def byte_tokenizer() -> Any:
    """A fast tokenizer whose ids 0..255 are bytes and 256..259 the marks of its chat template.

    Ids 0..255 are the UTF-8 bytes in order; 256 ends a message and a text (``<|end|>``).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {letter: byte for byte, letter in BYTE_LETTERS.items()}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


class _RecordingDrafter:
    """Keeps what was committed, and holds the loop to the protocol of :class:`Drafter`."""

    name = "fake"

    def __init__(self) -> None:
        self.commits: list[tuple[list[int], int, list[int]]] = []
        self.start(np.empty(0, np.int32))

    def start(self, prompt: IntArray) -> None:
        """Begin a request; forgets the commits of the one before."""
        self.prompt: list[int] = [int(t) for t in prompt]
        self.seen: list[int] = []
        self.commits.clear()
        self._last = EMPTY_TREE

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        """At most ``limit`` nodes of this step's tree."""
        self._last = self._draft(limit).first(limit) if limit > 0 else EMPTY_TREE
        return self._last

    def commit(self, tokens: IntArray, verified: int, path: Sequence[int]) -> None:
        """Check the outcome against the last proposal and record it."""
        tree, at = self._last, -1
        assert 0 <= verified <= len(tree), "more nodes verified than proposed"
        assert len(path) <= len(tokens) <= len(path) + 1, "one token a node, and at most one more"
        for token, node in zip(tokens, path, strict=False):
            assert node < verified, "an accepted node was not verified"
            assert tree.parents[node] == at, "the accepted nodes are not a path"
            assert tree.tokens[node] == token, "an accepted node does not hold what was committed"
            at = node
        self.commits.append(([int(t) for t in tokens], verified, list(path)))
        self.seen += [int(t) for t in tokens]

    def _draft(self, limit: int) -> DraftTree:
        raise NotImplementedError


class ScriptedDrafter(_RecordingDrafter):
    """Proposes given trees, one a step, and then nothing. ``commits`` records the outcomes."""

    name = "scripted"

    def __init__(self, script: Sequence[DraftTree]) -> None:
        self.script = list(script)
        super().__init__()

    def _draft(self, limit: int) -> DraftTree:
        step = len(self.commits)
        return self.script[step] if step < len(self.script) else EMPTY_TREE


class RandomTreeDrafter(_RecordingDrafter):
    """Proposes trees of random shape over random tokens, a function of seed and place alone.

    Args:
        vocab: number of token ids; a range with few ids makes acceptance likely.
        seed: of all draws.
        nodes: most nodes of a tree.
    """

    name = "random-tree"

    def __init__(self, vocab: int, seed: int = 0, nodes: int = 12) -> None:
        self.vocab, self.seed, self.nodes = vocab, seed, nodes
        super().__init__()

    def _draft(self, limit: int) -> DraftTree:
        rng = np.random.default_rng((self.seed, len(self.prompt), len(self.seen)))
        n = int(rng.integers(0, min(self.nodes, limit) + 1))
        return _tree(
            rng.integers(0, self.vocab, n).tolist(), [int(rng.integers(-1, i)) for i in range(n)]
        )


class OracleDrafter(_RecordingDrafter):
    """Knows the continuation and drafts from it, with planted mistakes among random decoys.

    The nodes of the true path lie scattered through the tree, so that accepting them moves cache
    rows. Where the target says something else than the reference, the drafts are merely wrong.

    Args:
        reference: the output tokens to come.
        wrong_every: each so many-th token of the reference is drafted wrong; 0 for none.
        branching: decoys drafted for each true node, on average; 0 gives chains.
        depth: longest drafted path.
        seed: of the shapes.
    """

    name = "oracle"

    def __init__(
        self,
        reference: Sequence[int],
        wrong_every: int = 0,
        branching: float = 1.0,
        *,
        depth: int = 8,
        seed: int = 0,
    ) -> None:
        self.reference = [int(t) for t in reference]
        self.wrong_every, self.branching = wrong_every, branching
        self.depth, self.seed = depth, seed
        super().__init__()

    def _draft(self, limit: int) -> DraftTree:
        place = len(self.seen)
        rng = np.random.default_rng((self.seed, len(self.prompt), place))
        end = min(place + self.depth, len(self.reference))
        tokens: list[int] = []
        parents: list[int] = []
        tip = ROOT
        while place < end and len(tokens) < limit:
            if rng.random() * (1.0 + self.branching) < 1.0:
                place += 1
                wrong = self.wrong_every > 0 and place % self.wrong_every == 0
                true = self.reference[place - 1]
                parents.append(tip)
                tip = len(tokens)
                tokens.append(self._other(rng, true) if wrong else true)
            else:
                parents.append(int(rng.integers(ROOT, len(tokens))))
                tokens.append(self._other(rng, self.reference[place]))
        return _tree(tokens, parents)

    def _other(self, rng: np.random.Generator, token: int) -> int:
        drawn = int(rng.choice(self.reference))
        return drawn if drawn != token else token ^ 1


def _tree(tokens: Sequence[int], parents: Sequence[int]) -> DraftTree:
    n = len(tokens)
    return DraftTree(
        np.asarray(tokens, np.int32),
        np.asarray(parents, np.int32),
        np.linspace(1.0, 0.1, n, dtype=np.float32),
        np.full(n, Source.OTHER, np.int8),
    )


_THINGS = {
    "printer": "hardware",
    "laptop": "hardware",
    "badge": "access",
    "password": "access",
    "invoice": "billing",
    "payroll": "billing",
}
_TROUBLES = {"is broken": 1, "is slow": 3, "was lost": 2, "shows an error": 2}


def toy_examples(n: int, seed: int = 0) -> list[Example]:
    """``n`` examples of a toy task: a sentence about a help-desk ticket, sorted into JSON.

    The same seed gives the same examples, and a longer list begins with the shorter one.
    """
    rng = np.random.default_rng(seed)
    out: list[Example] = []
    for i in range(n):
        thing, kind = list(_THINGS.items())[int(rng.integers(len(_THINGS)))]
        trouble, priority = list(_TROUBLES.items())[int(rng.integers(len(_TROUBLES)))]
        floor = int(rng.integers(1, 10))
        prompt = f"Ticket {100 + i}: the {thing} on floor {floor} {trouble}."
        answer = {"category": kind, "item": thing, "priority": priority, "floor": floor}
        out.append(Example(prompt, json.dumps(answer), where=f"toy:{i + 1}", id=f"toy-{i}"))
    return out
