"""`tascade bench` and `tascade report`: a pack against plain decoding and the peers installed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

from tascade.bench.memory import MemoryJob, can_measure, measure_memory
from tascade.bench.methods import DecoderMethod, InBaseTokens, Method, Request, Skipped, restorer
from tascade.bench.metrics import OURS
from tascade.bench.paper_drafter import PaperDrafter
from tascade.bench.peers import arctic_methods, hf_generate, hf_prompt_lookup
from tascade.bench.run import run_bench
from tascade.bench.tailored import HEADS, tailored_methods
from tascade.bench.timing import About, BenchSettings
from tascade.config import Recipe
from tascade.core import Example, IntArray, Progress
from tascade.data.fields import Fields
from tascade.data.load import load_examples, source_hash
from tascade.data.prepare import spread
from tascade.data.report import LoadReport, tell_not_used
from tascade.decode.equality import NearTies
from tascade.decode.loop import AllNodes, Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import NoDrafter
from tascade.draft.neural.merged import MergedDrafter
from tascade.draft.neural.trained import TrainedDrafter
from tascade.enrich.tokens.stored import read_tokens
from tascade.errors import ConfigError, DataError, PackError
from tascade.load import ModelRef, load_model, stored_dtype
from tascade.model import TaskModel
from tascade.options import FieldOptions, laid_over
from tascade.pack import Pack
from tascade.util.cpu import dtype_name
from tascade.util.files import read_json, write_atomic
from tascade.util.places import UNFINISHED
from tascade.util.progress import shows_progress, teller

TUNED = ("plain", "tasc-ft", "tasc-ft+spec")
"""What is measured of a pack that holds a tuned model; ``plain`` is the model before tuning."""
TRAINED = ("taps", "tasc-spec+taps")
"""Methods of a pack with a trained drafter: alone, and beside the task's outputs."""
ALL = ("plain", "tasc-paper", "tasc-spec", "hf-generate", "hf-prompt-lookup", "arctic-suffix")
OPTIONAL = ("hf-generate", "hf-prompt-lookup")
"""The slowest: with them five minutes on a model of 135M weights gave one row, on a slow CPU."""
_log = logging.getLogger("tascade.data")
_FEW_ROWS = 3
_MOST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure: which methods (``all`` for every one; where none is named, all but those of
    :data:`OPTIONAL` that there is no time for), on how many rows, how often.

    ``memory``: whether to measure what methods need of it, in processes of their own. ``minutes``:
    how long the timed part may take, with fewer repeats and rows then, and each measurement of
    memory; 0 for any time. By default memory is measured where a tailored vocabulary is to save it.
    """

    methods: tuple[str, ...] = ()
    rows: int = 64
    repeats: int = 5
    max_new_tokens: int = 0
    temperature: float = 0.0
    seed: int = 0
    memory: bool | None = None
    minutes: float = 0.0

    def decoding(self) -> dict[str, Any]:
        """The options of :meth:`tascade.model.TaskModel.params`."""
        chosen = {"temperature": self.temperature, "seed": self.seed}
        return chosen | ({"max_new_tokens": self.max_new_tokens} if self.max_new_tokens else {})

    def names(self, known: tuple[str, ...] = ALL) -> tuple[str, ...]:
        """The methods asked for; ``plain`` always comes first.

        Args:
            known: those there are for this kind of pack.

        Raises:
            ConfigError: an unknown method.
        """
        if not self.methods or "all" in self.methods:
            return known
        for name in self.methods:
            if name not in known:
                raise ConfigError(
                    "unknown method", got=name, wanted=", ".join(known), where="methods"
                )
        return ("plain", *(name for name in self.methods if name != "plain"))


@shows_progress
def bench_pack(
    pack: str | Path,
    data: Any,
    *,
    warmup: Any = None,
    model: ModelRef | None = None,
    dtype: str = "auto",
    options: BenchOptions | None = None,
    out: Path | None = None,
    resume: bool = False,
    on_repeat: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | bool | None = None,
    **fields: Unpack[FieldOptions],
) -> dict[str, Any]:
    """Measure a pack on held-out rows; the result is kept in the pack too.

    Args:
        pack: the pack's folder.
        data: rows that neither index nor calibration has seen, prompts and completions.
        warmup: rows for the untimed first pass; the first test rows' prompts are used if absent,
            decoded once more than the others and otherwise like them.
        model: another copy of the model the pack was made for.
        dtype: float32, bfloat16, float16, or auto: the pack's.
        options: methods, rows, repeats.
        out: where to write the JSON as well.
        resume: go on with the benchmark that was stopped; its whole repeats lie in the pack.
        on_repeat: given dtype and methods of the result so far after each repeat.
        progress: called with (stage, done, total); bars by default (see
            :func:`tascade.util.progress.shown`).
        fields: see :class:`tascade.options.FieldOptions`; the pack's own by default.

    Raises:
        DataError: the rows cannot be used, or have no prompts.
        ConfigError: nothing to resume, an unknown method, or an option that is none.
        KeyboardInterrupt: before there was anything to write.
    """
    options, opened = options or BenchOptions(), Pack.open(pack)
    names, dtype = options.names(_known(opened)), opened.precision(dtype)
    report, named = LoadReport(), Fields.of(laid_over(Recipe(data=opened.reading), fields).data)
    rows = _rows(data, named, report)
    tell_not_used([report])
    examples = spread(rows, options.rows)
    # While no model is in this process: there may be no room for two.
    tell = teller(progress)
    memory = _memory(opened, names, examples, model, dtype, options, tell)
    task_model = _task_model(pack, model, dtype, tell)
    params = task_model.params(**options.decoding())
    requests = [_request(task_model, example) for example in examples]
    warm = spread(list(islice(_examples(warmup, named) if warmup else rows, 64)), _FEW_ROWS)
    target, optional = task_model.target, () if options.methods else OPTIONAL
    ways: Iterable[Method | Skipped]
    if opened.tuned.is_dir():
        ways, target = tuned_methods(task_model, params, names, dtype)
    else:
        ways = methods(task_model, params, names)
    result = run_bench(
        list(ways),
        requests,
        BenchSettings(params, options.repeats, minutes=options.minutes, optional=optional),
        about=_about(task_model, source_hash(data, split="test", report=report)),
        warmup=[_request(task_model, example) for example in warm],
        near_ties=NearTies(target, params),
        memory=memory,
        progress=teller(progress),
        kept=opened.path / UNFINISHED,
        resume=resume,
        on_repeat=on_repeat,
    )
    text = json.dumps(result, indent=1).encode()
    _keep(result, text, opened)
    if out is not None:
        write_atomic(out, text)
    return result


def _task_model(pack: str | Path, model: ModelRef | None, dtype: str, tell: Progress) -> TaskModel:
    tell("loading the model", 0, None)
    made = TaskModel.from_pretrained(pack, model, dtype=dtype, head="full")
    if not made.knows_cost:
        tell("measuring the model's steps", 0, None)
        made.new_budget()  # over costs that are measured here
    return made


def _keep(result: dict[str, Any], text: bytes, pack: Pack) -> None:
    """Write a result into the pack, unless that has one that says more of it."""
    place, usual = pack.bench, pack.precision()
    says = _says(result, usual)
    try:
        there = _says(read_json(place, _MOST_BYTES), usual)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        there = says
    if there <= says:
        write_atomic(place, text)
        return
    names = "rows unseen", "the pack's methods", "in the pack's precision", "measurements a method"
    first = next(found for found in zip(names, there, says, strict=True) if found[1] > found[2])
    _log.info(
        "the pack keeps its last benchmark, which says more of it (%s: %d there, %d here): --out "
        "writes this one elsewhere (remove %s to have it kept)",
        *first,
        place,
    )


def _says(result: Mapping[str, Any], usual: str) -> tuple[bool, bool, bool, int]:
    """What makes a result say more than another: rows that the pack has not seen, its own methods,
    its own precision, and then how often each method was measured, rows times repeats.
    """
    data, methods = result["data"], result["methods"].items()
    ours = any(name.startswith(OURS) and "skipped" not in method for name, method in methods)
    count = int(data["examples"]) * int(result["settings"]["repeats"])
    return not data.get("seen_as"), ours, usual in ("auto", result["dtype"]), count


def _rows(data: Any, named: Fields, report: LoadReport) -> list[Example]:
    rows = list(_examples(data, named, report))
    if not rows:
        raise DataError(
            "no rows to measure on", got="0 rows", wanted="one or more", where=str(data)
        )
    return rows


def _about(task_model: TaskModel, source: Mapping[str, Any]) -> About:
    info, model = task_model.pack.info, task_model.model
    roles = (str(of["role"]) for of in info.data if of.get("sha256") == source["sha256"])
    return About(
        seen_as=next(roles, ""),
        model=Path(info.model).name,
        dtype=dtype_name(model.dtype),
        data_path=source["path"],
        data_sha256=source["sha256"],
        pack=task_model.pack.name,
        stored=dtype_name(stored_dtype(model, model.name_or_path)),
        command="tascade bench",  # with its options under settings: results travel, paths do not
    )


def _examples(data: Any, fields: Fields, report: LoadReport | None = None) -> Iterator[Example]:
    for example in load_examples(data, split="test", fields=fields, report=report):
        if example.prompt is None:
            raise DataError(
                "a row without a prompt cannot be measured",
                got="an output alone",
                wanted="prompt and completion",
                where=example.where,
            )
        yield example


def _request(task_model: TaskModel, example: Example) -> Request:
    assert example.prompt is not None
    ids = task_model.encode(example.prompt)
    return Request(ids, example.completion, example.id or example.where)


def _known(pack: Pack) -> tuple[str, ...]:
    """The methods there are for a pack."""
    if pack.tuned.is_dir():
        return TUNED
    heads = tuple(HEADS) if pack.vocabulary.is_file() else ()
    return ALL + heads + (TRAINED if pack.drafter.is_file() else ())


def _memory(
    pack: Pack,
    names: Sequence[str],
    examples: Sequence[Example],
    model: ModelRef | None,
    dtype: str,
    options: BenchOptions,
    tell: Progress,
) -> dict[str, dict[str, Any]]:
    """What each method needs: ``plain``, and those a tailored vocabulary is to be held against."""
    tuned = pack.tuned.is_dir()  # its plain is the model before tuning, whatever is given
    heads = pack.vocabulary.is_file() and not tuned
    wanted = heads if options.memory is None else options.memory
    if not wanted or not can_measure() or isinstance(model, tuple):
        return {}
    ours = [n for n in names if n == "plain" or (heads and (n == "tasc-spec" or n in HEADS))]
    prompts = [example.prompt for example in spread(examples, _FEW_ROWS) if example.prompt]
    found = {}
    for done, name in enumerate(ours):
        tell(f"measuring the memory of {name}, in a process of its own", done, len(ours))
        job = MemoryJob(
            str(pack.path),
            head=HEADS.get(name, "full"),
            drafts=name.startswith("tasc-spec"),
            model="" if tuned else str(model or ""),
            dtype=dtype,
            max_new_tokens=options.max_new_tokens or pack.info.max_new_tokens,
        )
        found[name] = measure_memory(job, prompts, 60 * options.minutes)
    return found


def methods(
    task_model: TaskModel, params: SamplingParams, names: Sequence[str]
) -> Iterator[Method | Skipped]:
    """The methods of these names, all over the same target, all warm with the same outputs."""
    target, tokenizer = task_model.target, task_model.tokenizer
    for name in names:
        if name == "plain":
            yield DecoderMethod(name, task_model.plain, params)
        elif name == "tasc-spec":
            yield _spec(task_model, params)
        elif name == "tasc-paper":
            yield _paper(task_model, params)
        elif name == "hf-generate":
            yield hf_generate(task_model.model, params, tokenizer)
        elif name == "hf-prompt-lookup":
            yield hf_prompt_lookup(task_model.model, params, tokenizer)
        elif name == "arctic-suffix":
            yield from arctic_methods(target, _outputs(task_model), params, tokenizer)
        elif name in TRAINED:
            yield _trained(task_model, params, name)
        elif name in HEADS:
            yield from tailored_methods(task_model, params, [name])


def tuned_methods(
    task_model: TaskModel, params: SamplingParams, names: Sequence[str], dtype: str
) -> tuple[list[Method], Target]:
    """The methods of these names for a pack with a tuned model; and the base model as a target.

    What the tuned model says is counted in the base model's tokens.
    """
    base, tokenizer, _ = load_model(task_model.pack.base, dtype=dtype)
    target, merger = Target(base), read_tokens(task_model.pack.tuned)
    if merger is None:
        raise PackError(
            "the pack's tuned model does not say what its new tokens stand for",
            wanted="tokens.json beside its weights",
            where=str(task_model.pack.tuned),
            fix="tune again",
        )
    spec = _spec(task_model, params)
    ways: dict[str, Method] = {
        "plain": DecoderMethod("plain", Decoder(target, NoDrafter(), None, tokenizer), params),
        "tasc-ft": InBaseTokens(
            DecoderMethod("tasc-ft", task_model.plain, params), merger, "tasc-ft"
        ),
        "tasc-ft+spec": InBaseTokens(spec, merger, "tasc-ft+spec"),
    }
    return [ways[name] for name in names], target


def _outputs(task_model: TaskModel) -> list[IntArray]:
    return [tokens for _, tokens in task_model.corpus.documents()]


def _spec(task_model: TaskModel, params: SamplingParams) -> DecoderMethod:
    calibration = task_model.calibration.copy()
    drafter = task_model.new_drafter(calibration)
    decoder = Decoder(task_model.target, drafter, task_model.new_budget(), task_model.tokenizer)
    return DecoderMethod(
        "tasc-spec",
        decoder,
        params,
        settings={
            "similar": drafter.similar is not None,
            "corpus_tokens": task_model.corpus.n_tokens,
            "step_cost": task_model.cost.to_json(),
        },
        reset_state=restorer(decoder, calibration),
    )


def _trained(task_model: TaskModel, params: SamplingParams, name: str) -> DecoderMethod:
    trained, budget = task_model.new_trained(), task_model.new_budget()
    calibration = task_model.calibration.copy()
    drafter: TrainedDrafter | MergedDrafter = trained
    if name != "taps":
        drafter = MergedDrafter(task_model.new_drafter(calibration), trained, budget)
    decoder = Decoder(task_model.target, drafter, budget, task_model.tokenizer)
    shape = trained.network.shape
    settings = {"vocabulary": shape.vocabulary, "taps": list(shape.taps)}
    restore = restorer(decoder, calibration)

    def reset() -> None:
        restore()
        drafter.forget()

    return DecoderMethod(name, decoder, params, settings=settings, reset_state=reset)


def _paper(task_model: TaskModel, params: SamplingParams) -> DecoderMethod:
    drafter = PaperDrafter(_outputs(task_model), end_tokens=task_model.ends)
    decoder = Decoder(task_model.target, drafter, AllNodes(drafter.length), task_model.tokenizer)
    settings = {
        "n_max": drafter.n_max,
        "length": drafter.length,
        "p_min": drafter.p_min,
        "weight": drafter.weight,
    }
    return DecoderMethod("tasc-paper", decoder, params, settings=settings)
