"""A recipe: everything `tascade adapt` needs, as frozen dataclasses; strict YAML in and out."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tascade.data.chat import ChatConfig
from tascade.errors import ConfigError
from tascade.util.fields import build, check_types
from tascade.util.files import write_atomic

DEFAULT_NEW_TOKENS = 256
SCRIPTS = (
    "english",
    "code",
    "math",
    "spanish",
    "portuguese",
    "italian",
    "german",
    "french",
    "hindi",
    "thai",
    "chinese",
    "japanese",
    "korean",
    "arabic",
    "cyrillic",
    "greek",
    "hebrew",
    "emoji",
)
"""What a task may write. Which characters these are: :data:`tascade.tailor.required.SCRIPTS`."""


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Where the task's examples are.

    ``train`` is indexed; ``validation`` calibrates (a share of train is held out for it when
    absent). Both are a file, a folder or a hub id. ``max_examples`` 0 means all.
    """

    train: str = ""
    validation: str = ""
    on_error: str = "raise"
    max_examples: int = 0

    def __post_init__(self) -> None:
        check_types(self, "data.")
        _one_of("data.on_error", self.on_error, ("raise", "skip"))
        _at_least("data.max_examples", self.max_examples, 0)


@dataclass(frozen=True, slots=True)
class SpecConfig:
    """TASC-spec: the corpus index, its sources and the draft budget.

    ``calibration_rows`` validation prompts are decoded to learn how far each source can be
    trusted; ``max_nodes`` caps a draft; ``similar`` and ``context`` switch sources on or off.
    ``own_answers`` indexes the model's own greedy answers to the training prompts instead of the
    reference ones, as many as ``own_seconds`` allow: slower to build, far better drafts.
    """

    shards: int = 1
    calibration_rows: int = 96
    calibration_seconds: float = 120.0
    max_nodes: int = 63
    similar: bool = True
    context: bool = True
    own_answers: bool = False
    own_seconds: float = 900.0

    def __post_init__(self) -> None:
        check_types(self, "spec.")
        _at_least("spec.shards", self.shards, 1)
        if self.shards > 8:
            got = self.shards
            raise ConfigError("too many shards", got=got, wanted="1 to 8", where="spec.shards")
        for name in ("calibration_rows", "calibration_seconds", "max_nodes", "own_seconds"):
            _at_least(f"spec.{name}", getattr(self, name), 0)


@dataclass(frozen=True, slots=True)
class VocabConfig:
    """VocabTailor: an LM head of the task's tokens and the prompt's.

    ``head``: ``full``, the model's own; ``masked``, which cannot say other tokens (approximate);
    ``exact``, which guesses and has the full head check (lossless); or ``draft-only``, that of an
    assistant, whose drafts the model verifies with its own head (lossless). ``tolerance``: how many
    tokens of an answer the task's list may lack, on the data it was made from, the prompt's own
    left out. ``scripts``: tokens with characters that none of these writes are left out first, as
    far as ``tolerance`` allows (names: :data:`SCRIPTS`); without any, the rarest alone.
    ``deferred``: most guesses before a check. ``tables``: where a tailored model's embedding and
    full head are: in the checkpoint's ``file``, or on the ``device``, where checks need not carry
    them.
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
        _one_of("vocab.head", self.head, ("full", "masked", "exact", "draft-only"))
        _at_least("vocab.tolerance", self.tolerance, 0)
        _at_least("vocab.deferred", self.deferred, 0)
        _one_of("vocab.tables", self.tables, ("file", "device"))

    @property
    def loads_whole(self) -> bool:
        """Whether a model is loaded with its two tables."""
        return self.head in ("full", "draft-only") or self.tables == "device"


@dataclass(frozen=True, slots=True)
class GateConfig:
    """What a tuned model must hold to be exported, on held-out prompts.

    ``most_drop``: of the mean task score, and of the share of valid JSON, below the base model's
    (and the control's). ``least_agreement``: share of answers that are the base model's own.
    ``least_adoption``: steps saved over those that the same texts could save. ``most_longer``: how
    many times longer or shorter answers may be, in bytes. ``most_drift``: divergence from the base
    model on other text, in nats a token. ``refuse``: whether a model that fails is not exported;
    else it is, and says so.
    """

    most_drop: float = 0.01
    least_agreement: float = 0.25
    least_adoption: float = 0.95
    most_longer: float = 1.1
    most_drift: float = 0.5
    refuse: bool = True

    def __post_init__(self) -> None:
        check_types(self, "tune.gate.")
        for name in ("most_drop", "least_agreement", "least_adoption"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                got = getattr(self, name)
                raise ConfigError(f"tune.gate.{name} is out of range", got=got, wanted="0 to 1")
        _at_least("tune.gate.most_longer", self.most_longer, 1)
        _at_least("tune.gate.most_drift", self.most_drift, 0)


@dataclass(frozen=True, slots=True)
class TuneConfig:
    """TASC-ft: new tokens, and the training that teaches a model to say them.

    ``tokens``: how many, 0 for as many as are worth it. ``sure``: the model decides where it gives
    a base token less probability than this, and no new token reaches over such a place; 0: any may.
    ``foretold``: nor over one where the task's other answers give the base token less than this,
    which the prompt has to settle; 0: any may.
    ``firm``: tokens that would do so in more than ``1 - firm`` of their places are not chosen.
    ``targets``: what is learned, the model's ``own`` answers or the ``gold`` ones of the data.
    ``prompts``: how many prompts the model writes itself, for each training prompt, to answer and
    learn from as well. ``replay``: how many texts of its own making are said again, for each of all
    these prompts, so that what is not of the task stays. ``start``: how new rows begin (see
    :data:`tascade.enrich.train.embeddings.STARTS`), or ``probe`` to try each for ``probe_steps``.
    ``row_steps`` steps with the rows alone at ``row_rate``; then ``epochs`` rounds with LoRA
    (``rank``, ``alpha``, ``dropout``) at ``rate``, 0 for 0.4 over the model's width, and the rows
    at ``row_factor`` times that. ``batch``: samples a step; ``longest``: tokens of a sample, longer
    ones are left out. ``precision``: of training, float32, bfloat16, or auto for what the machine
    is fast at. ``load``: ``4bit`` or ``8bit`` to train over a quantised base (bitsandbytes).
    ``length_power``: a token of n base tokens weighs n to this power. ``kl``: weight of the
    divergence from the base model's next token. ``control``: also train LoRA alone, for comparison.
    """

    tokens: int = 0
    sure: float = 0.8
    foretold: float = 0.0
    firm: float = 0.7
    targets: str = "own"
    prompts: float = 1.0
    replay: float = 0.1
    start: str = "probe"
    probe_steps: int = 50
    row_steps: int = 100
    row_rate: float = 5e-3
    epochs: int = 3
    rate: float = 0.0
    row_factor: float = 5.0
    batch: int = 32
    longest: int = 1024
    precision: str = "auto"
    load: str = ""
    rank: int = 32
    alpha: int = 64
    dropout: float = 0.0
    length_power: float = 0.0
    kl: float = 0.0
    control: bool = False
    seed: int = 0
    gate: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        check_types(self, "tune.")
        _one_of("tune.targets", self.targets, ("own", "gold"))
        _one_of("tune.load", self.load, ("", "4bit", "8bit"))
        _one_of("tune.precision", self.precision, ("auto", "float32", "bfloat16"))
        for name in ("batch", "longest", "rank", "alpha"):
            _at_least(f"tune.{name}", getattr(self, name), 1)
        for name in (
            "tokens",
            "prompts",
            "replay",
            "probe_steps",
            "row_steps",
            "epochs",
            "rate",
            "length_power",
            "kl",
            "seed",
        ):
            _at_least(f"tune.{name}", getattr(self, name), 0)
        for name in ("row_rate", "row_factor"):
            if getattr(self, name) <= 0.0:
                got = getattr(self, name)
                raise ConfigError(f"tune.{name} is out of range", got=got, wanted="above 0")
        for name in ("sure", "foretold", "firm"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                got = getattr(self, name)
                raise ConfigError(f"tune.{name} is out of range", got=got, wanted="0 to 1")
        if not 0.0 <= self.dropout < 1.0:
            got = self.dropout
            raise ConfigError("tune.dropout is out of range", got=got, wanted="0 to below 1")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model, its task data, and what to build from them.

    The command line reads ``model`` and ``data`` where its own flags are absent; in Python they
    are arguments of :func:`tascade.adapt`, and what stands here is kept with the pack.
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
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _at_least("max_new_tokens", self.max_new_tokens, 1)

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
    def from_dict(cls, raw: object, where: str = "") -> Recipe:
        """The recipe that :meth:`to_dict` gave; what it does not say has its default.

        Args:
            raw: nested mappings, from a file that nobody vouches for.
            where: what to put before a field's name in an error.

        Raises:
            ConfigError: an unknown key, a wrong type, or a value out of range.
        """
        try:
            return typing.cast(Recipe, build(cls, raw, ""))
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


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"unknown {name}", got=value, wanted=" or ".join(known), where=name)


def _at_least(name: str, value: float, least: int) -> None:
    if value < least:
        raise ConfigError(
            f"{name} is out of range", got=value, wanted=f"{least} or more", where=name
        )
