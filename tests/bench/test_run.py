"""The bench: turns, resets, equality, and a result that keeps to its schema."""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tascade.bench.machine import machine_info
from tascade.bench.methods import DecoderMethod, Recorder, Request, Skipped, restorer
from tascade.bench.paper_drafter import PaperDrafter
from tascade.bench.peers import arctic_methods, hf_generate, hf_prompt_lookup
from tascade.bench.run import run_bench
from tascade.bench.schema import validate
from tascade.bench.timing import About, BenchSettings
from tascade.core import DraftTree, Generation
from tascade.decode.equality import NearTies, first_difference
from tascade.decode.loop import AllNodes, Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import Budget, NoDrafter
from tascade.draft.costs import CostTable
from tascade.draft.ngram.drafter import NgramDrafter
from tascade.draft.ngram.mixer_calibration import Calibration
from tascade.errors import ConfigError
from tascade.testing import RandomTreeDrafter, byte_tokenizer, tiny_model

ABOUT = About("tiny", "float32", "test.jsonl", "0" * 64, command="pytest")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def target():
    return Target(tiny_model("llama", vocab_size=260))


def rows(n: int, first: int = 0) -> list[Request]:
    return [Request([70, 71, 72, first + i], "wanted", str(i)) for i in range(n)]


class Lossy:
    """A method whose outputs are plain's with one token changed, in every ``every``-th row."""

    name, guarantee = "lossy", "approximate"

    def __init__(self, inner: DecoderMethod, every: int) -> None:
        self.inner, self.every, self.settings = inner, every, {"every": every}

    def reset(self) -> None:
        self.row = 0

    def run(self, request: Request) -> Generation:
        out = self.inner.run(request)
        if self.row % self.every == 0:
            out.tokens[3] ^= 1
        self.row += 1
        return out

    def trace(self, requests: Sequence[Request]) -> None:
        return None


def test_all_methods_together(target, tokenizer):
    params = SamplingParams(max_new_tokens=16, end_tokens=(256,))
    plain = DecoderMethod("plain", Decoder(target, NoDrafter(), None, tokenizer), params)
    outputs = [plain.run(r).tokens for r in rows(9, 10)]
    calibration = Calibration()
    mix = Decoder(
        target,
        NgramDrafter(None, calibration=calibration, end_tokens=(256,)),
        Budget(CostTable.flat()),
        tokenizer,
    )
    paper = PaperDrafter(outputs, p_min=1, end_tokens=(256,))
    lossy = Lossy(plain, 3)
    lossy.reset()
    phases: list[tuple[str, int, int]] = []
    before = calibration.cells.copy()
    result = run_bench(
        [
            plain,
            DecoderMethod("tasc-spec", mix, params, reset_state=restorer(mix, calibration)),
            DecoderMethod("tasc-paper", Decoder(target, paper, AllNodes(), tokenizer), params),
            DecoderMethod("trees", Decoder(target, RandomTreeDrafter(260, 1)), params),
            hf_generate(target.model, params, tokenizer),
            hf_prompt_lookup(target.model, params, tokenizer),
            *arctic_methods(target, outputs, params, tokenizer),
            lossy,
            Skipped("elsewhere", "needs another machine"),
        ],
        rows(9, 10),
        BenchSettings(params, repeats=2, chunk=2),
        about=ABOUT,
        warmup=rows(2),
        near_ties=NearTies(target, params),
        progress=lambda *told: phases.append(told),
    )
    validate(result)
    assert (calibration.cells == before).all()
    methods = result["methods"]
    assert methods["elsewhere"] == {"skipped": "needs another machine", "settings": {}}
    ran = {name: m for name, m in methods.items() if "skipped" not in m}
    total = sum(len(tokens) for tokens in outputs)
    for name, method in ran.items():
        assert method["tokens"] == total
        assert len(method["seconds"]) == len(method["prefill_seconds"]) == 2
        if name not in ("plain", "lossy"):
            assert (method["identical"], method["differing"]) == (9, 0), name
            assert method["guarantee"] == "lossless"
    assert (ran["lossy"]["identical"], ran["lossy"]["differing"]) == (6, 3)
    assert ran["lossy"]["near_ties"] == 0
    assert ran["plain"]["tokens_per_step"] == 1.0
    assert ran["plain"]["steps"] == total - 9
    assert "speedup" not in ran["plain"]
    paper_entry = ran["tasc-paper"]
    assert paper_entry["tokens_per_step"] > 2
    assert sum(paper_entry["by_source"].values()) == total
    assert 0.5 < paper_entry["acceptance_by_depth"][0] <= 1
    counts = paper_entry["accepted_in_steps"]
    assert sum(counts) == paper_entry["steps"]
    drafted = total - paper_entry["by_source"]["target"]
    assert sum(accepted * steps for accepted, steps in enumerate(counts)) >= drafted
    assert set(paper_entry["calibration"]) == {"ece", "bins"}
    assert set(ran["tasc-spec"]["versus"]) == set(ran) - {"plain", "tasc-spec"}
    assert "versus" not in paper_entry
    assert phases[-1][0] == "acceptance, not timed"


class Noting:
    """A method that notes who ran when."""

    guarantee = "lossless"

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.settings = name, log, {}

    def reset(self) -> None:
        self.log.append(f"{self.name} reset")

    def run(self, request: Request) -> Generation:
        self.log.append(f"{self.name}{request.id}")
        return Generation([1, 2], forwards=1, stepped_tokens=1)

    def trace(self, requests: Sequence[Request]) -> None:
        return None


def test_methods_take_turns_and_are_reset_before_each_repeat():
    log: list[str] = []
    methods = [Noting("plain", log), Noting("b", log), Noting("c", log)]
    run_bench(methods, rows(4), BenchSettings(repeats=2, chunk=2), about=ABOUT, warmup=rows(1, 99))
    resets = ["plain reset", "b reset", "c reset"]
    assert log[:3] == ["plain0", "b0", "c0"]  # the warm-up row
    first, second = ["plain0 plain1", "b0 b1", "c0 c1"], ["plain2 plain3", "b2 b3", "c2 c3"]
    turns = [*first, *second[1:], second[0], *first[1:], first[0], second[2], *second[:2]]
    timed = [word for turn in turns for word in turn.split()]
    assert log[3:] == [
        *resets,
        *timed[:12],
        *resets,
        *timed[12:],
        *(r for r in resets[1:] for _ in "12"),  # the baseline has no drafts to record
    ]


@pytest.mark.parametrize("broken", ["requests", "plain", "names", "repeats"])
def test_what_cannot_be_measured_is_refused(broken):
    names = {"plain": ["a"], "names": ["plain", "a", "a"]}.get(broken, ["plain"])
    with pytest.raises(ConfigError):
        run_bench(
            [Noting(name, []) for name in names],
            rows(0 if broken == "requests" else 1),
            BenchSettings(repeats=0 if broken == "repeats" else 1),
            about=ABOUT,
        )


def test_machine_info_names_the_machine():
    info = machine_info()
    assert info["cpu"]
    assert info["cores"] >= 1
    assert info["threads"] == torch.get_num_threads()
    assert info["torch"] == torch.__version__


# --- equality -----------------------------------------------------------------------------------


def test_first_difference():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


class FixedTarget:
    """A target whose logits are given."""

    def __init__(self, logits: list[float], dtype: torch.dtype) -> None:
        self.logits, self.model = torch.tensor([logits]), SimpleNamespace(dtype=dtype)

    def begin(self) -> None:
        pass

    def forward(self, tokens: Sequence[int]) -> torch.Tensor:
        self.seen = list(tokens)
        return self.logits


@pytest.mark.parametrize(
    ("logits", "dtype", "tie"),
    [
        ([0.0, 10.0, 9.9995], torch.float32, True),
        ([0.0, 10.0, 9.99], torch.float32, False),
        ([0.0, 10.0, 9.9], torch.bfloat16, True),
        ([0.0, 10.0, 9.8], torch.bfloat16, False),
        ([20.0, 10.0, 10.0], torch.bfloat16, False),  # alike, and neither of them likely
    ],
)
def test_near_tie(logits, dtype, tie):
    target = FixedTarget(logits, dtype)
    ties = NearTies(target, SamplingParams())
    assert ties.is_near_tie([7, 8], [5, 1, 4], [5, 2, 4]) is tie
    assert target.seen == [7, 8, 5]
    assert not ties.is_near_tie([7, 8], [5, 1], [5, 1])
    assert not ties.is_near_tie([7, 8], [5, 1], [5, 1, 2])


def test_near_tie_when_sampling_counts_the_noise(target):
    params = SamplingParams(max_new_tokens=8, temperature=1.0, seed=4)
    tokens = Decoder(target, NoDrafter()).generate([70, 71], params).tokens
    other = [*tokens[:5], tokens[5] ^ 1, *tokens[6:]]
    assert not NearTies(target, params).is_near_tie([70, 71], tokens, other)


# --- the recorder -------------------------------------------------------------------------------


class Fixed:
    name = "fixed"

    def __init__(self, tree: DraftTree) -> None:
        self.tree, self.committed = tree, 0

    def start(self, prompt: np.ndarray) -> None:
        pass

    def propose(self, limit: int, floor: float = 0.0) -> DraftTree:
        return self.tree

    def commit(self, tokens: np.ndarray, verified: int, path: Sequence[int]) -> None:
        self.committed += len(tokens)


def branching() -> DraftTree:
    return DraftTree(
        np.array([1, 2, 3, 4, 5], np.int32),
        np.array([-1, -1, 0, 2, 1], np.int32),
        np.array([0.9, 0.8, 0.7, 0.6, 0.5], np.float32),
        np.zeros(5, np.int8),
    )


def test_recorder_notes_the_verified_nodes():
    inner = Fixed(branching())
    recorder = Recorder(inner, trees=True)
    recorder.propose(8)
    recorder.commit(np.array([1, 3, 9], np.int32), 4, [0, 2])
    assert recorder.nodes.depths == [1, 1, 2, 3]
    assert recorder.nodes.accepted == [True, False, True, False]
    assert recorder.nodes.survival == pytest.approx([0.9, 0.8, 0.7, 0.6])
    assert inner.committed == 3


def test_recorder_leaves_out_what_stands_below_the_end():
    recorder = Recorder(Fixed(branching()), trees=True)
    recorder.propose(8)
    recorder.commit(np.array([1], np.int32), 5, [0])  # the request ended at node 0
    assert recorder.nodes.accepted == [True, False, False]
    assert recorder.nodes.depths == [1, 1, 2]


def test_recorder_shows_the_chain_that_a_chain_verifier_sees():
    recorder = Recorder(Fixed(branching()), trees=False)
    assert recorder.propose(8).tokens.tolist() == [1, 3, 4]
