"""Damages the files of a pack, one mutation after the other, and uses what is left.

Run by test_pack_fuzz.py in a process of its own, since what is looked for may end the process. What
is about to be tried is printed first.

    python pack_fuzz.py ROOT read|mapped FIRST COUNT
    python pack_fuzz.py ROOT overwritten

ROOT holds pack/ and learned/, as :func:`build` makes them.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tascade.config import Recipe, SpecConfig, VocabConfig
from tascade.draft.budget import Budget
from tascade.draft.costs import CostTable
from tascade.draft.ngram.batch import BatchDrafter
from tascade.draft.ngram.sources import open_task
from tascade.errors import TascadeError
from tascade.index import similar, state
from tascade.index.corpus import CorpusIndex
from tascade.index.store import checksum
from tascade.index.traffic import TrafficLearner
from tascade.model import TaskModel
from tascade.pack import Pack
from tascade.pipeline import adapt
from tascade.testing import byte_tokenizer, tiny_model, toy_examples

SEED, ROWS, TOKENS, VOCAB = 20, 12, 6, 260
NUMBERS = [0, 1, -1, -2, 5, VOCAB - 1, VOCAB, VOCAB + 1, 4096, 2**31 - 1, -(2**31), 2**32 - 1]
NUMBERS += [2**40, 2**62, 2**63 - 1, -(2**63)]
VALUES: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    0.5,
    -0.0,
    2**31,
    2**63,
    10**400,
    1e308,
    "",
    "many",
]
VALUES += [float("nan"), float("inf"), "x" * 5000, "../../../etc/passwd", "/etc/passwd", [], {}]
VALUES += [[0], [[]], {"a": 1}, [1e300] * 4, [[[[[[[[1]]]]]]]], "0", "9" * 9]


def loaded() -> tuple[Any, Any]:
    model = tiny_model("llama", vocab_size=VOCAB)
    model.generation_config.eos_token_id = 256
    return model, byte_tokenizer()


def build(root: Path) -> None:
    """A pack with everything that one can hold, and a learned folder beside it."""
    model, tokenizer = loaded()
    # Few, and what the model itself says, so that every value is soon met and drafts are taken.
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in toy_examples(ROWS)]
    spec = SpecConfig(calibration_rows=2, shards=2, own_answers=True)
    recipe = Recipe(max_new_tokens=8, spec=spec, vocab=VocabConfig(head="exact", deferred=4))
    adapt((model, tokenizer), rows, out=root / "pack", recipe=recipe)
    pack = Pack.open(root / "pack")
    made = TaskModel(model, tokenizer, pack, head="full")
    said = [made.plain.generate(made.encode(p), made.params()).tokens for p in prompts()]
    with CorpusIndex.open(pack.corpus, writable=True) as corpus:
        corpus.append([said[0], [5, 6, 7]])
    answers = [[*said[0], 10 + i % 9] for i in range(40)]
    mark = pack.info.fingerprint
    with TrafficLearner.open(root / "learned", fingerprint=mark, vocab_size=VOCAB) as learner:
        for answer in answers:
            learner.offer([1], answer)
        learner.flush()
        learner.forget([0])  # makes shards
        learner.offer([1], [*said[1], 7])


def prompts() -> list[str]:
    return [e.prompt for e in toy_examples(ROWS) if isinstance(e.prompt, str)]


# --- mutations ----------------------------------------------------------------------------------


def json_places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children: Any = value.items() if isinstance(value, dict) else []
    if isinstance(value, list):
        children = list(enumerate(value))[:20]
    for key, child in children:
        yield from json_places(child, (*path, key))


def mutate_json(raw: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    body = json.loads(raw)
    sealed = body.pop("checksum", None)
    places = list(json_places(body))
    place = places[rng.integers(len(places))]
    how = rng.integers(6)
    if how == 0:
        depth = int(rng.choice([40, 900, 100_000]))
        return f"nested {depth} deep", b'{"format": ' + b"[" * depth + b"]" * depth + b"}"
    holder: Any = {"": body}
    for key in ("", *place)[:-1]:
        holder = holder[key]
    last = ("", *place)[-1]
    value = VALUES[rng.integers(len(VALUES))]
    if how == 1 and isinstance(holder, dict):
        del holder[last]
        value = "nothing"
    elif how == 2 and isinstance(holder[last], dict):
        holder[last]["surprise"] = value
    elif how == 3 and isinstance(holder[last], list):
        holder[last] = holder[last] * 3
    else:
        holder[last] = value
    body = body if place else holder.get("", value)
    if sealed is not None and isinstance(body, dict):
        body["checksum"] = checksum(body) if rng.random() < 0.8 else sealed
    text = json.dumps(body).encode()
    return f"{list(place)} := {value!r:.40}", text


def mutate_array(raw: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    begin = 10 + int.from_bytes(raw[8:10], "little")
    if rng.random() < 0.1:
        size = int(rng.choice(np.array([2**60, 2**40, 0, 7])))
        head = f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({size},), }}".encode()
        return f"a header of {size}", raw[:10] + head.ljust(begin - 11) + b"\n" + raw[begin:]
    width = 8 if b"i8" in raw[:begin] else 4
    kind = "<f4" if b"f4" in raw[:begin] else f"<i{width}"
    values = np.frombuffer(raw[begin:], kind).copy()
    told = []
    for _ in range(rng.integers(1, 9) if len(values) else 0):
        at = int(rng.choice([0, len(values) - 1, rng.integers(len(values))]))
        number: Any = NUMBERS[rng.integers(len(NUMBERS))]
        if rng.random() < 0.4:  # a value that may well pass
            values[at] = number = values[rng.integers(len(values))]
        elif kind == "<f4":
            number = rng.choice([0.0, -1.0, np.nan, np.inf, 1e38, 1e-45])
            values[at] = number
        else:
            pattern = np.array([number % 2**64], np.uint64).astype(f"<u{width}")
            values[values == values[at] if rng.random() < 0.3 else at] = pattern.view(kind)[0]
        told.append(f"[{at}] := {number}")
    return ", ".join(told[:4]), raw[:begin] + values.tobytes()


def mutate_log(raw: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """A record as someone writes it who knows the sums."""
    length = int(rng.choice([0, 1, 3, 2**31, 2**32 - 1]))
    tokens = rng.choice(np.array(NUMBERS), min(length, 3)).astype(np.int64).astype("<i4").tobytes()
    number = int(rng.choice(np.array(NUMBERS)))
    durable = int(rng.choice(np.array([0, 10, 2**40], np.uint64)))
    head = struct.pack("<4sIqQ", b"TDOC", length, number, durable)
    record = head + struct.pack("<I", zlib.crc32(head)) + tokens
    record += struct.pack("<I", zlib.crc32(tokens))
    return f"a record of {length}, id {number}", raw + record


def mutate_bytes(raw: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    n, data = len(raw), bytearray(raw)
    how = int(rng.integers(6))
    a, b = sorted(rng.integers(0, n + 1, 2).tolist())
    if how == 0:
        return f"cut to {a}", raw[:a]
    if how == 1:
        return f"longer by {b - a}", raw + raw[a:b]
    if how == 2 and n:
        data[a:b] = bytes(b - a)
        return f"zeros in {a}:{b}", bytes(data)
    if how == 3 and n > 8:
        size = int(rng.integers(1, n // 2))
        c, d = int(rng.integers(0, n - size)), int(rng.integers(0, n - size))
        data[c : c + size], data[d : d + size] = raw[d : d + size], raw[c : c + size]
        return f"{size} bytes swapped, {c} and {d}", bytes(data)
    for _ in range(rng.integers(1, 4)):
        if n:
            data[int(rng.integers(n))] ^= 1 << int(rng.integers(8))
    return "bits flipped", bytes(data)


def mutate(root: Path, files: dict[Path, bytes], number: int) -> str:
    """Damage one file of the folder; says how."""
    rng = np.random.default_rng((SEED, number))
    name = sorted(files)[rng.integers(len(files))]
    file, raw = root / name, files[name]
    other = sorted(files)[rng.integers(len(files))]
    how = rng.random()
    if how < 0.03:
        file.unlink()
        return f"{name}: deleted"
    if how < 0.06:
        file.write_bytes(files[other])
        (root / other).write_bytes(raw)
        return f"{name}: swapped with {other}"
    if how < 0.08:
        file.unlink()
        file.symlink_to(rng.choice(["/etc/passwd", "/dev/zero", str(file), "../pack.json"]))
        return f"{name}: a link"
    special = {".json": mutate_json, ".npy": mutate_array, ".log": mutate_log}.get(name.suffix)
    if special is not None and how < 0.75:
        told, changed = special(raw, rng)
    else:
        told, changed = mutate_bytes(raw, rng)
    file.write_bytes(changed)
    return f"{name}: {told}"


# --- use ----------------------------------------------------------------------------------------


class Host:
    """Uses a pack in every way there is; only tascade's own errors may come out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model, self.tokenizer = loaded()
        made = TaskModel(self.model, self.tokenizer, Pack.open(root / "pack"), head="full")
        self.mark, self.ends = made.pack.info.fingerprint, made.ends
        self.ids = [made.encode(prompt) for prompt in prompts()]
        self.plain = [made.plain.generate(p, made.params(max_new_tokens=TOKENS)) for p in self.ids]
        self.drafted = 0

    def use(self, learning: bool) -> str:
        told = []
        for step in (self.generate, self.batch, *([self.learn] if learning else [])):
            try:
                step()
                told.append("used")
            except TascadeError as error:
                told.append(type(error).__name__)
        return ", ".join(told)

    def generate(self) -> None:
        made = self.open_model()
        self.decode(made)
        list(made.corpus.documents())
        made.corpus.refresh()

    def open_model(self) -> TaskModel:
        made = TaskModel.from_pretrained(self.root / "pack", (self.model, self.tokenizer))
        made._cost = made._cost or CostTable.flat(64)  # measuring takes two seconds
        return made

    def decode(self, made: TaskModel) -> None:
        own = made.new_budget()
        flat = Budget(CostTable.flat(64), max_nodes=own.max_nodes)
        for at, budget in enumerate((own, flat, flat)):
            found = made.new_decoder(made.new_drafter(), budget).generate(
                self.ids[at], made.params(max_new_tokens=TOKENS)
            )
            assert found.tokens == self.plain[at].tokens, (found.tokens, self.plain[at].tokens)

    def batch(self) -> None:
        self.draft(self.open_batch())

    def open_batch(self, learner: TrafficLearner | None = None) -> BatchDrafter:
        """As vLLM's proposer does."""
        task: Any = open_task(Pack.open(self.root / "pack"), self.mark, VOCAB)
        if learner is not None:
            task = replace(task, corpus=learner.view(task.corpus))
        return BatchDrafter(
            [task], end_tokens=self.ends, requests=ROWS, length=256, most=8, threads=1
        )

    def draft(self, drafter: BatchDrafter) -> None:
        for n in (1, 2, 4):
            ids, lengths = np.zeros((ROWS, 256), np.int32), np.zeros(ROWS, np.int32)
            for at, (prompt, plain) in enumerate(zip(self.ids, self.plain, strict=True)):
                lengths[at] = len(prompt) + n
                ids[at, : lengths[at]] = [*prompt, *plain.tokens[:n]]
            sampled = [plain.tokens[n // 2 : n] for plain in self.plain]
            for draft in drafter.propose(sampled, lengths, ids):
                assert len(draft) <= 8
                assert all(0 <= token < VOCAB for token in draft), draft
                self.drafted += len(draft)

    def open_learner(self) -> TrafficLearner:
        folder = self.root / "learned"
        return TrafficLearner.open(folder, fingerprint=self.mark, vocab_size=VOCAB)

    def learn(self) -> None:
        with self.open_learner() as learner:
            self.draft(self.open_batch(learner))
            learner.offer([1], [9, 9, 9])
            learner.flush()


def say(line: str) -> None:
    """At once: the next moment the process may be gone."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def contents(root: Path) -> dict[Path, bytes]:
    return {f.relative_to(root): f.read_bytes() for f in root.rglob("*") if f.is_file()}


def restore(root: Path, files: dict[Path, bytes]) -> None:
    for found in list(root.rglob("*")):
        known = files.get(found.relative_to(root))
        if found.is_symlink() or (found.is_file() and found.read_bytes() != known):
            found.unlink()  # rather than written over: it may still be mapped
    for name, raw in files.items():
        if not (root / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(raw)


def try_mutations(root: Path, first: int, count: int) -> None:
    """Try ``count`` mutations from the ``first`` on; prints each, and what came of it."""
    files = contents(root)
    host = Host(root)
    assert host.use(True) == "used, used, used"
    assert host.drafted > 0
    restore(root, files)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (3 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for number in range(first, first + count):
        told = mutate(root, files, number)
        say(f"{number} {told}")
        say(f"    {host.use('learned' in told or number % 8 == 0)}")
        restore(root, files)


def try_overwriting(root: Path) -> None:
    """Open everything, write over every file, and go on."""
    host = Host(root)
    learner = host.open_learner()
    made, drafters = host.open_model(), [host.open_batch(), host.open_batch(learner)]
    for raw in (b"", b"\xff" * 100_000):
        for name in contents(root):
            (root / name).write_bytes(raw)
        host.decode(made)
        for drafter in drafters:
            host.drafted = 0
            host.draft(drafter)
            assert host.drafted > 0
            drafter.refresh()
    os._exit(0)  # the learner has nothing to close any more


if __name__ == "__main__":
    os.fsync = lambda handle: None  # type: ignore[assignment]
    faulthandler.enable()
    torch.set_num_threads(1)
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    warnings.simplefilter("error", RuntimeWarning)
    if kind == "overwritten":
        try_overwriting(folder)
    elif kind == "mapped":  # as large indexes are
        state.IN_MEMORY_BYTES = similar.IN_MEMORY_BYTES = 0
    try_mutations(folder, int(sys.argv[3]), int(sys.argv[4]))
