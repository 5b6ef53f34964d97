"""A recipe: everything `tascade adapt` needs, as frozen dataclasses; strict YAML in and out."""

from __future__ import annotations

import dataclasses
import typing
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tascade.data.chat import ChatConfig
from tascade.errors import ConfigError
from tascade.util.fields import at_least, build, check_types, one_of, share, typed
from tascade.util.files import write_atomic
from tascade.util.templates import Template

DEFAULT_NEW_TOKENS = 256
SCRIPTS = (
    "english", "code", "math", "spanish", "portuguese", "italian", "german", "french", "hindi",
    "thai", "chinese", "japanese", "korean", "arabic", "cyrillic", "greek", "hebrew", "emoji",
)  # fmt: skip
"""What a task may write. Which characters these are: :data:`tascade.tailor.required.SCRIPTS`."""


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Where the task's examples are: each a file, a folder or a hub id.

    train: What is indexed.
    validation: What calibrates; a share of ``train`` is held out for it when this is empty.
    logs: Served requests with the model's own answers, which are indexed too.
    on_error: ``raise`` at the first bad row, or ``skip`` it.
    max_examples: Rows read of each; 0 reads all.
    prompt_field: The field that holds the prompt; empty for its usual names.
    completion_field: The field that holds the answer; empty for its usual names.
    prompt_template: The prompt made of several fields, as ``{title}: {question}``.
    """

    train: str = ""
    validation: str = ""
    logs: str = ""
    on_error: str = "raise"
    max_examples: int = 0
    prompt_field: str = ""
    completion_field: str = ""
    prompt_template: str = ""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        one_of("data.on_error", self.on_error, ("raise", "skip"))
        at_least("data.max_examples", self.max_examples, 0)
        if self.prompt_template:
            Template.parse(self.prompt_template, "data.prompt_template")
            if self.prompt_field:
                raise ConfigError(
                    "a prompt field and a prompt template",
                    got=f"{self.prompt_field!r} and {self.prompt_template!r:.80}",
                    wanted="one of them: a template holds the names of its fields",
                    where="data.prompt_template",
                )


@dataclass(frozen=True, slots=True)
class SpecConfig:
    """TASC-spec: the corpus index, its sources and the draft budget.

    shards: Parts of the corpus index, 1 to 8.
    calibration_rows: Validation prompts decoded to learn how far each source can be trusted.
    calibration_seconds: Calibration stops after the row that passes this.
    max_nodes: Most nodes of a draft.
    similar: Whether to draft from similar examples.
    context: Whether to draft from the request's own prompt and output.
    own_answers: Whether to index the model's own greedy answers to the training prompts instead
        of the reference ones: slower to build, far better drafts.
    own_seconds: Time for own answers.
    drafter: Whether to train a drafter on the answers too, where that pays (TAPS).
    """

    shards: int = 1
    calibration_rows: int = 96
    calibration_seconds: float = 120.0
    max_nodes: int = 63
    similar: bool = True
    context: bool = True
    own_answers: bool = False
    own_seconds: float = 900.0
    drafter: bool = False

    def __post_init__(self) -> None:
        check_types(self, "spec.")
        at_least("spec.shards", self.shards, 1)
        if self.shards > 8:
            got = self.shards
            raise ConfigError("too many shards", got=got, wanted="1 to 8", where="spec.shards")
        for name in ("calibration_rows", "calibration_seconds", "max_nodes", "own_seconds"):
            at_least(f"spec.{name}", getattr(self, name), 0)


@dataclass(frozen=True, slots=True)
class VocabConfig:
    """VocabTailor: an LM head of the task's tokens and the prompt's.

    head: ``full``, the model's own; ``masked``, which cannot say other tokens (approximate);
        ``exact``, which guesses and has the full head check (lossless); or ``draft-only``, that of
        an assistant, whose drafts the model verifies with its own head (lossless).
    tolerance: Tokens of an answer that the task's list may lack, on the data it was made from,
        the prompt's own left out.
    deferred: Most guesses before a check.
    scripts: What the task writes (names: :data:`SCRIPTS`). Tokens with other characters are left
        out first, as far as ``tolerance`` allows; without any, the rarest alone.
    tables: Where a tailored model's embedding and full head are: in the checkpoint's ``file``, or
        on the ``device``, where checks need not carry them.
    """

    head: str = "full"
    tolerance: float = 0.01
    deferred: int = 32
    scripts: tuple[str, ...] = ()
    tables: str = "file"

    def __post_init__(self) -> None:
        check_types(self, "vocab.")
        for name in self.scripts:
            if name not in SCRIPTS:
                raise ConfigError(
                    "unknown script", got=name, wanted=", ".join(SCRIPTS), where="vocab.scripts"
                )
        one_of("vocab.head", self.head, ("full", "masked", "exact", "draft-only"))
        at_least("vocab.tolerance", self.tolerance, 0)
        at_least("vocab.deferred", self.deferred, 0)
        one_of("vocab.tables", self.tables, ("file", "device"))

    @property
    def loads_whole(self) -> bool:
        """Whether a model is loaded with its two tables."""
        return self.head in ("full", "draft-only") or self.tables == "device"


@dataclass(frozen=True, slots=True)
class GateConfig:
    """What a tuned model must hold to be exported, on held-out prompts.

    max_score_drop: Loss of mean task score, and of valid JSON, against the base model and the
        control.
    min_agreement: Share of answers that are the base model's own.
    min_adoption: Steps saved, over those that the same texts could save.
    max_length_ratio: How many times longer or shorter answers may be, in bytes.
    max_kl: Divergence from the base model on other text, in nats a token.
    refuse: Whether a model that fails is not exported; else it is, and says so.
    """

    max_score_drop: float = 0.01
    min_agreement: float = 0.25
    min_adoption: float = 0.95
    max_length_ratio: float = 1.1
    max_kl: float = 0.5
    refuse: bool = True

    def __post_init__(self) -> None:
        check_types(self, "tune.gate.")
        for name in ("max_score_drop", "min_agreement", "min_adoption"):
            share(f"tune.gate.{name}", getattr(self, name))
        at_least("tune.gate.max_length_ratio", self.max_length_ratio, 1)
        at_least("tune.gate.max_kl", self.max_kl, 0)


@dataclass(frozen=True, slots=True)
class TuneConfig:
    """TASC-ft: new tokens, and the training that teaches a model to say them.

    tokens: How many new tokens; 0 for as many as are worth it.
    min_token_prob: No new token reaches over a base token that the model gives less probability.
    min_ngram_prob: Nor over one that the task's other answers, without the prompt, give less.
    targets: What is learned: the model's ``own`` answers, or the ``gold`` ones of the data.
    prompts: Prompts the model writes itself to learn from, for each training prompt.
    replay: Texts of its own making that it says again, for each of all these prompts.
    init: How new rows begin (:data:`tascade.enrich.train.embeddings.INITS`); ``probe`` tries each.
    epochs: Rounds over all samples with LoRA and rows.
    learning_rate: LoRA's; 0 is 0.4 over the model's width.
    batch: Samples a step.
    max_length: Tokens of a sample; longer ones are left out.
    rank: LoRA's rank; its alpha is twice that.
    control: Whether to train LoRA alone too, for comparison.
    seed: Of everything random in it.
    gate: What the tuned model must hold.
    """

    tokens: int = 0
    min_token_prob: float = 0.8
    min_ngram_prob: float = 0.0
    targets: str = "own"
    prompts: float = 1.0
    replay: float = 0.1
    init: str = "probe"
    epochs: int = 3
    learning_rate: float = 0.0
    batch: int = 32
    max_length: int = 1024
    rank: int = 32
    control: bool = False
    seed: int = 0
    gate: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        check_types(self, "tune.")
        one_of("tune.targets", self.targets, ("own", "gold"))
        for name in ("batch", "max_length", "rank"):
            at_least(f"tune.{name}", getattr(self, name), 1)
        for name in ("tokens", "prompts", "replay", "epochs", "learning_rate", "seed"):
            at_least(f"tune.{name}", getattr(self, name), 0)
        for name in ("min_token_prob", "min_ngram_prob"):
            share(f"tune.{name}", getattr(self, name))


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model, its task data, and what to build from them.

    The command line reads ``model`` and ``data`` where its own flags are absent; in Python they
    are arguments of :func:`tascade.adapt`, and what stands here is kept with the pack.

    model: The model it is meant for.
    dtype: ``auto``, as the weights were saved, or a precision.
    device: ``auto``, CUDA where there is one, or a torch device.
    max_new_tokens: Most tokens of an answer.
    data: Where the examples are.
    chat: What prompts take along into the chat template.
    spec: TASC-spec's settings.
    vocab: VocabTailor's.
    tune: TASC-ft's.
    """

    model: str = ""
    dtype: str = "auto"
    device: str = "auto"
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    data: DataConfig = field(default_factory=DataConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    spec: SpecConfig = field(default_factory=SpecConfig)
    vocab: VocabConfig = field(default_factory=VocabConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)

    def __post_init__(self) -> None:
        check_types(self, "")
        one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        at_least("max_new_tokens", self.max_new_tokens, 1)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe file.

        Raises:
            ConfigError: not YAML, an unknown key (with the nearest known one), a wrong type, or a
                value out of range.
        """
        import yaml

        path = Path(path)
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except Exception as error:  # yaml's own kinds, and nearly anything on odd tags
            raise ConfigError("cannot read the recipe", got=error, where=str(path)) from error
        return cls.from_dict({} if raw is None else raw, f"{path}: ")

    @classmethod
    def from_dict(cls, raw: object, where: str = "", *, stored: bool = False) -> Recipe:
        """The recipe that :meth:`to_dict` gave; what it does not say has its default.

        Args:
            raw: nested mappings, from a file that nobody vouches for.
            where: what to put before a field's name in an error.
            stored: whether it is kept with what was made from it (see :func:`current_keys`).

        Raises:
            ConfigError: an unknown key, a wrong type, or a value out of range.
        """
        try:
            return typing.cast(Recipe, build(cls, current_keys(raw, stored=stored), ""))
        except ConfigError as error:
            raise ConfigError(
                error.message,
                got=error.got,
                wanted=error.wanted,
                where=where + (error.where or "recipe"),
                fix=error.fix,
            ) from None

    def to_yaml(self, path: str | Path) -> None:
        """Write the recipe, every value spelled out."""
        import yaml

        text = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
        write_atomic(Path(path), text.encode())

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionaries."""
        return dataclasses.asdict(self)


RENAMED = {
    "tune.sure": "min_token_prob",
    "tune.foretold": "min_ngram_prob",
    "tune.start": "init",
    "tune.rate": "learning_rate",
    "tune.longest": "max_length",
    "tune.gate.most_drop": "max_score_drop",
    "tune.gate.least_agreement": "min_agreement",
    "tune.gate.least_adoption": "min_adoption",
    "tune.gate.most_longer": "max_length_ratio",
    "tune.gate.most_drift": "max_kl",
}
"""Keys of 0.1.0 that are read for one release more, and what they are called now."""
REMOVED: dict[str, int | float | str] = {
    "tune.firm": 0.7,
    "tune.probe_steps": 50,
    "tune.row_steps": 100,
    "tune.row_rate": 5e-3,
    "tune.row_factor": 5.0,
    "tune.precision": "auto",
    "tune.load": "",
    "tune.alpha": 64,
    "tune.dropout": 0.0,
    "tune.length_power": 0.0,
    "tune.kl": 0.0,
}
"""Keys of 0.1.0 that are gone, and what holds now; ``alpha`` is twice the rank."""


def current_keys(raw: object, section: str = "", *, stored: bool = False) -> Any:
    """A recipe with today's keys in the place of those of 0.1.0.

    Args:
        raw: nested mappings that nobody vouches for.
        section: which part of a recipe ``raw`` is, with its dot; empty for the whole.
        stored: whether it tells how something was made. Then nobody is warned, and keys that are
            gone may have had any value.

    Raises:
        ConfigError: a key that is gone with a value that cannot be had any more, a wrong type, or
            a key under both of its names.
    """
    if not isinstance(raw, dict):
        return raw
    found = {}
    for key, value in raw.items():
        name = f"{section}{key}" if isinstance(key, str) else ""
        if name in REMOVED:
            holds = REMOVED[name] if key != "alpha" else _twice(raw.get("rank", TuneConfig().rank))
            got = typed(type(holds), value, name)
            if stored:
                continue
            if got != holds:
                raise ConfigError(
                    "this key is gone, and what it asks for cannot be had any more",
                    got=got,
                    wanted=f"{holds!r}, which holds for all now",
                    where=name,
                    fix="leave the key out, or stay with tascade 0.1.0",
                )
            _warn(f"{name} has no effect any more: leave it out of the recipe")
        elif name in RENAMED:
            new = RENAMED[name]
            if new in raw:
                raise ConfigError(
                    "a key under its old name and its new one",
                    got=f"{key} and {new}",
                    wanted=new,
                    where=name,
                )
            found[new] = value
            if not stored:
                _warn(f"{name} is called {section}{new} now: the next release reads that alone")
        else:
            nested = name in ("tune", "tune.gate")
            found[key] = current_keys(value, f"{name}.", stored=stored) if nested else value
    return found


def _twice(rank: object) -> int:
    return 2 * rank if isinstance(rank, int) else 0


def _warn(text: str) -> None:
    warnings.warn(text, FutureWarning, stacklevel=5)
