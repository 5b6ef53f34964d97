"""What a `kill -9` leaves, at every step that a command takes on the file system: old or new.

What a killed process leaves is what was on disk at that moment. So a command is watched: whenever
it is about to touch the folder it works in, all of the old or all of the new must be there under
the final name. The processes of one command are really killed, a hundred times.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tascade
from brief import BRIEF
from tascade import bundled
from tascade.bench.pack import BenchOptions, bench_pack
from tascade.bench.page import report_pack
from tascade.cli import demo
from tascade.config import SpecConfig, VocabConfig
from tascade.draft.costs import CostTable
from tascade.enrich.choose import enrich
from tascade.enrich.train.checkpoint import load_state, save_state
from tascade.index.corpus import CorpusIndex
from tascade.index.learned import LearnedCorpus
from tascade.index.similar import SimilarIndex
from tascade.index.store import LOCK
from tascade.model import TaskModel
from tascade.pack import Pack
from tascade.pipeline import adapt, adapt_tuned, tailor, tune
from tascade.testing import byte_tokenizer, tiny_model, toy_examples

ROWS = [{"prompt": e.prompt, "completion": e.completion} for e in toy_examples(48)]
FEW = ROWS[:4]
RECIPE = tascade.Recipe(max_new_tokens=4, spec=SpecConfig(calibration_rows=1), tune=BRIEF)
KILLS = 100
STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "ctypes.dlsym"}

Look = Callable[[], Any]
_watched: tuple[str, Callable[[], None]] | None = None


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    """New rows learn alone for no steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tascade.enrich.train.trainer.EMBEDDING_WARMUP_STEPS", 0)
        yield


def _hook(event: str, args: tuple[Any, ...]) -> None:
    global _watched
    if _watched is None or event not in STEPS:
        return
    folder, step = _watched
    paths = [os.fsdecode(a) for a in args if isinstance(a, str | bytes | os.PathLike)]
    if event == "ctypes.dlsym" or any(path.startswith(folder) for path in paths):
        kept, _watched = _watched, None  # to look is no step of the command
        try:
            step()
        finally:
            _watched = kept


def watch(folder: Path, step: Callable[[], None], command: Callable[[], object]) -> None:
    """Run ``command``, and ``step`` before each of its steps in ``folder``."""
    global _watched
    if not getattr(sys, "_tascade_hooked", False):
        sys.addaudithook(_hook)
        sys._tascade_hooked = True  # type: ignore[attr-defined]
    _watched = str(folder), step
    try:
        command()
    finally:
        _watched = None


def at_every_step(folder: Path, command: Callable[[], object], look: Look) -> list[Any]:
    """What ``look`` finds at each step of ``command`` in ``folder``, and at the end."""
    found: list[Any] = []
    watch(folder, lambda: found.append(look()), command)
    return [*found, look()]


def kill_at(number: int, folder: Path, command: Callable[[], object]) -> None:
    """Run ``command`` in a process that kills itself at its step ``number`` in ``folder``."""
    steps = itertools.count()

    def step() -> None:
        if next(steps) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks beside threads
        child = os.fork()
    if child == 0:
        try:
            watch(folder, step, command)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def files_of(folder: Path) -> dict[str, tuple[int, int, int]] | None:
    """Each file of a folder, as no other write would leave it; ``None`` where there is none."""
    if not folder.exists():
        return None
    stats = {str(path.relative_to(folder)): path.stat() for path in sorted(folder.rglob("*"))}
    return {
        name: (found.st_ino, found.st_size, found.st_mtime_ns)
        for name, found in stats.items()
        if not (folder / name).is_dir() and not name.endswith(LOCK)
    }


def old_or_new(states: list[Any], least: int) -> None:
    """At first the old, then the new, nothing else; and that was looked at often enough."""
    old, new = states[0], states[-1]
    assert old != new
    assert len(states) >= least
    turn = states.index(new)
    assert all(state == old for state in states[:turn])
    assert all(state == new for state in states[turn:])


def nothing_left(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("killed") / "model"
    made = tiny_model("llama", vocab_size=260)
    made.generation_config.eos_token_id = 256
    made.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = CostTable([1, 8, 64], [1.0, 1.1, 2.0])
    monkeypatch.setattr("tascade.model.measure_cost", lambda *_, **__: cost)


@pytest.fixture
def pack(model: str, tmp_path: Path) -> Path:
    out = tmp_path / "pack"
    adapt(model, ROWS[:44], validation=FEW, out=out, recipe=RECIPE)
    return out


@pytest.mark.parametrize("tuned", [False, True], ids=["adapt", "adapt --tune"])
def test_a_pack_that_is_replaced(model: str, pack: Path, tuned: bool) -> None:
    given: dict[str, Any] = {"validation": FEW, "out": pack, "recipe": RECIPE, "overwrite": True}

    def command() -> None:
        (adapt_tuned if tuned else adapt)(model, ROWS, **given)

    states = at_every_step(pack.parent, command, lambda: files_of(pack))
    old_or_new(states, 100)
    nothing_left(pack.parent, "pack")
    assert TaskModel.from_pretrained(pack).corpus.n_documents == len(ROWS)


@pytest.mark.slow
def test_processes_that_are_killed_and_those_that_follow(model: str, pack: Path) -> None:
    work, old = pack.parent, {path: path.read_bytes() for path in pack.rglob("*.*")}
    backup = shutil.copytree(pack, work.parent / f"{work.name}-backup")
    given: dict[str, Any] = {"validation": FEW, "recipe": RECIPE, "overwrite": True}

    def command() -> None:
        adapt(model, ROWS, out=pack, **given)

    steps = len(at_every_step(work, command, lambda: None)) - 1
    replaced = 0
    for number in range(KILLS):
        shutil.rmtree(pack)
        shutil.copytree(backup, pack)
        kill_at(number * steps // KILLS, work, command)
        if CorpusIndex.open(pack / "corpus", verify=True).n_documents == 44:
            assert {path: path.read_bytes() for path in pack.rglob("*.*")} == old
        else:
            replaced += 1
            assert CorpusIndex.open(pack / "corpus", verify=True).n_documents == len(ROWS)
            SimilarIndex.open(pack / "similar", fetch=None, verify=True)
            TaskModel.from_pretrained(pack).generate("Ticket 1", max_new_tokens=2)
    assert 0 < replaced < KILLS
    left = {path.name: files_of(path) for path in work.iterdir() if path != pack}
    assert len(left) > KILLS // 2
    command()  # is not disturbed by what they left, and takes none of it for its own
    assert TaskModel.from_pretrained(pack).corpus.n_documents == len(ROWS)
    assert {path.name: files_of(path) for path in work.iterdir() if path != pack} == left


def test_a_new_folder(model: str, tmp_path: Path, pack: Path) -> None:
    saved, tokens, tuned = (tmp_path / name / "new" for name in ("saved", "tokens", "tuned"))
    task_model = TaskModel.from_pretrained(pack)
    for out, least, command in (
        (saved, 40, lambda: task_model.save_pretrained(saved)),
        (tokens, 8, lambda: enrich(ROWS, model, held_out=FEW, out=tokens)),
        (tuned, 20, lambda: tune(model, ROWS, held_out=FEW, out=tuned, recipe=RECIPE)),
    ):
        out.parent.mkdir()
        states = at_every_step(out.parent, command, lambda: files_of(out))  # noqa: B023
        assert states[0] is None
        old_or_new(states, least)
        nothing_left(out.parent, "new")
    assert Pack.open(saved).info.vocab_size == 260


def test_a_tailored_list_and_the_head_that_is_made_of_it(pack: Path) -> None:
    def look() -> tuple[bytes, bytes]:
        opened = Pack.open(pack)
        list_of = opened.vocabulary.read_bytes() if opened.vocabulary.is_file() else b""
        recipe = opened.info.recipe["vocab"]
        return json.dumps(recipe).encode(), list_of if recipe["head"] != "full" else b""

    for head, tolerance in (("exact", 0.01), ("masked", 2.0), ("exact", 0.5)):
        config = VocabConfig(head=head, tolerance=tolerance)
        states = at_every_step(
            pack,
            lambda: tailor(pack, ROWS, held_out=FEW, config=config),  # noqa: B023
            look,
        )
        old_or_new(states, 6)
        assert TaskModel.from_pretrained(pack).tailored is not None
    names = {path.name for path in pack.iterdir()}
    assert "vocabulary.json" in names
    assert not any(name.startswith(("vocabulary.next", ".")) for name in names)


def test_results_and_their_page(pack: Path, tmp_path: Path) -> None:
    options = BenchOptions(methods=("plain",), rows=1, repeats=1, memory=False)
    bench_pack(pack, FEW, options=options)
    report_pack(pack)
    for file, command in (
        (pack / "bench.json", lambda: bench_pack(pack, ROWS[4:8], options=options)),
        (pack / "report.html", lambda: report_pack(pack)),
        (pack / "recipe.yaml", lambda: RECIPE.to_yaml(pack / "recipe.yaml")),
    ):
        look = lambda: file.read_bytes() if file.exists() else None  # noqa: B023, E731
        old_or_new(at_every_step(pack, command, look), 4)


@pytest.fixture
def small_demo(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in FEW))
    whole = tmp_path / "train.jsonl"
    whole.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.setattr(bundled, "model_path", lambda: Path(model))
    monkeypatch.setattr(bundled, "data_path", lambda _, s: whole if s == "train" else data)
    monkeypatch.setattr(bundled, "tasks", lambda: (demo.TUNED_TASK,))
    monkeypatch.setattr(demo, "METHODS", ("plain",))
    monkeypatch.setattr(demo, "TUNING", BRIEF)
    monkeypatch.setattr(demo, "Recipe", lambda **given: dataclasses.replace(RECIPE, **given))


def test_the_demo(small_demo: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    demo.run(out, rows=1, repeats=1, tune=True)
    names = sorted(path.name for path in out.iterdir())
    packs = [out / demo.TUNED_TASK, out / f"{demo.TUNED_TASK}-tuned"]

    def look() -> list[Any]:
        # What a bench adds to a pack is another command's.
        parts = [(pack, files_of(pack) or {}) for pack in packs]
        return [{n: s for n, s in found.items() if "bench" not in n} for _, found in parts]

    states = at_every_step(out, lambda: demo.run(out, rows=1, repeats=1, tune=True), look)
    for number in range(len(packs)):
        old_or_new([state[number] for state in states], 200)
    nothing_left(out, *names)


def test_what_was_learned(tmp_path: Path) -> None:
    folder = tmp_path / "learned"
    store = LearnedCorpus(folder, "f", 260, 10_000)
    rng = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 256, (20,), generator=rng).int().numpy() for _ in range(40)]
    store.append(documents)
    store._compact()
    store.append(documents[:2])

    def look() -> list[tuple[int, ...]]:
        index = CorpusIndex.open(folder, fingerprint="f", verify=True)
        return [tuple(tokens.tolist()) for _, tokens in index.documents()]

    states = at_every_step(folder, lambda: store.forget(range(10)), look)
    old_or_new(states, 20)
    store.close()
    assert len(states[0]) == 42
    assert len(states[-1]) == 32


def test_indexes(tmp_path: Path) -> None:
    documents = [[ord(letter) for letter in row["completion"]] for row in ROWS]
    prompts = list(enumerate(documents))
    corpus, similar = tmp_path / "a" / "corpus", tmp_path / "b" / "similar"
    given: dict[str, Any] = {"fingerprint": "f", "overwrite": True}

    def build(count: int) -> Iterator[tuple[Path, Callable[[], object]]]:
        many = documents[:count]
        yield corpus, lambda: CorpusIndex.build(corpus, many, vocab_size=260, shards=4, **given)
        yield similar, lambda: SimilarIndex.build(similar, prompts[:count], **given)

    for _, command in build(20):
        command()
    for place, command in build(48):
        states = at_every_step(place.parent, command, lambda: files_of(place))  # noqa: B023
        old_or_new(states, 30)
        nothing_left(place.parent, place.name)


def test_the_state_of_training(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    parameters = {"a": torch.nn.Parameter(torch.ones(4))}
    optimizer = torch.optim.AdamW(parameters.values())
    save_state(folder, parameters, optimizer, {"settings": {}, "done": 1})
    states = at_every_step(
        tmp_path,
        lambda: save_state(folder, parameters, optimizer, {"settings": {}, "done": 2}),
        lambda: load_state(folder, parameters, optimizer, {"settings": {}})["done"],
    )
    old_or_new(states, 5)
    assert states[-1] == 2
    nothing_left(tmp_path, "state")
