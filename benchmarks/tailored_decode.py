"""Whole decoding at the size of real models: load peak, memory and speed of tailored heads.

    python benchmarks/tailored_decode.py --json benchmarks/tailored_decode.json

Models of the shapes of Qwen3-1.7B and Llama-3.2-1B with random weights, written to a temporary
folder. Random weights say nothing about any task, so what they say is scripted: the body
computes in full, and then each position's final state is replaced by the head's row of the token
that the task's test row has there. The full head then says that row; a small head says it as far as
it has the token, and something else where it has not: hits and misses are those of the real task,
its real list (reference answers of training rows, tolerance 0.01) and a real tokenizer of 100,278
tokens. A wrong guess changes nothing further on, as in real use, where it is thrown away.

Plain states would tell the small head too well where it misses: its sum of exponentials is low
there and high everywhere else. So every token that the task's list and the prompt lack, and some of
the others, have states so short that the small head can hardly tell them from chance; the full
head's choice stays the same. They are as many as hold nine tenths of the misses among the most
doubtful guesses of the pilot: 2, 10 and 20 % of the tokens of the three tasks
(benchmarks/doubt.json).

``exact`` answers must be plain's. Of a prompt the model reads the last tokens (its head takes all
of them): what is compared is decoding, prefills are left out. Methods take turns row by row; a
ratio is of seconds a token, of each repeat. ``load``: growth of the process's resident memory at
its highest, in a process of its own, from before loading to after the first token.

``--drafts`` adds TASC-spec over the training rows' reference answers. Some CPUs multiply many
states in bfloat16 no faster than one by one, so that no draft pays: take ``--dtype float32``.

On a GPU (``--device cuda``) plain decoding has the tables on the device, ``exact`` streams the
head's through it for each check, and ``exact, table on the device`` has it there. ``load`` is
memory of the device then.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tascade.bench.machine import machine_info
from tascade.bench.methods import restorer
from tascade.bench.metrics import spread as spread_of
from tascade.config import VocabConfig
from tascade.core import IntArray
from tascade.data.encode import encode_example
from tascade.data.load import load_examples
from tascade.data.prepare import spread
from tascade.decode.loop import Decoder
from tascade.decode.sampling import SamplingParams
from tascade.decode.target import Target
from tascade.draft.budget import Budget, NoDrafter
from tascade.draft.measure import measure_cost
from tascade.draft.ngram.drafter import NgramDrafter
from tascade.index.corpus import CorpusIndex
from tascade.load import load_model
from tascade.tailor.counts import count_documents
from tascade.tailor.offload.load import load_offloaded
from tascade.tailor.profile import Profile, build_profile
from tascade.tailor.tailored import tailor_model

SHARED = Path(__file__).resolve().parents[2] / "shared"
TASKS = ("text_to_sql_advising", "multilabel_nlupp", "dst_sgd")
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-1.7b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "head_dim": 128,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
    },
}
COMMON = {"hidden_size": 2048, "num_key_value_heads": 8, "tie_word_embeddings": True}
READ = 4
LONG, SHORT = 50.0, (0.2, 2.0)
"""Lengths of sure and of unsure states, in rows."""
UNSURE = {"text_to_sql_advising": 0.02, "multilabel_nlupp": 0.1, "dst_sgd": 0.2}
"""How many states are unsure."""


def write_model(shape: str, folder: Path, dtype: torch.dtype, layers: int = 0) -> None:
    """A checkpoint of random weights, its tensors made one after the other."""
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    fields = {**COMMON, **SHAPES[shape]}
    if layers:
        fields["num_hidden_layers"] = layers
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, dtype=str(dtype)[6:])
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    tensors = {}
    for name, value in skeleton.named_parameters():
        made = torch.ones(value.shape, dtype=dtype)
        tensors[name] = made if value.dim() == 1 else made.normal_(0, 0.02)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    source = SHARED / "tokenizers" / "dolma2-100k" / "tokenizer.json"
    PreTrainedTokenizerFast(tokenizer_file=str(source), eos_token="<|endoftext|>").save_pretrained(
        folder
    )


class Script:
    """Replaces models' final states by those of the tokens that are to come.

    Args:
        rows: [V, d] the LM head's, where the models are.
        unsure: share of the tokens that a small head has and hardly can tell from chance.
    """

    def __init__(self, rows: torch.Tensor, unsure: float) -> None:
        self.unsure = unsure
        self.rows, self.tokens = rows, torch.zeros(1, dtype=torch.long, device=rows.device)
        self.lengths = torch.ones(1, device=rows.device)
        self.places: torch.Tensor | None = None

    def write_for(self, model: Any) -> None:
        model.base_model.register_forward_pre_hook(self._note, with_kwargs=True)
        model.base_model.norm.register_forward_hook(self._replace)

    def begin(self, prompt: IntArray, answer: IntArray, known: IntArray) -> None:
        """What follows each position, the last token for ever after; ``known``: what the small head
        has, beside some of which all else looks as unsure.
        """
        tokens = np.concatenate((prompt[1:], answer)).astype(np.int64)
        rng = np.random.default_rng(len(tokens))
        unsure = (rng.random(len(tokens)) < self.unsure) | ~np.isin(tokens, known)
        short = np.exp(rng.uniform(*np.log(SHORT), len(tokens)))
        lengths = np.where(unsure, short, LONG).astype(np.float32)
        self.tokens = torch.from_numpy(tokens).to(self.rows.device)
        self.lengths = torch.from_numpy(lengths).to(self.rows.device)

    def _note(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.places = kwargs.get("position_ids")

    def _replace(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if self.places is None:
            return output
        at = self.places.reshape(-1).clamp(max=len(self.tokens) - 1)
        # Far above all others: a row's product with itself is 45 times that with another.
        states = self.rows[self.tokens[at]] * self.lengths[at, None]
        return states.view(output.shape).to(output.dtype)


def rows_of(task: str, split: str, tokenizer: Any, ends: Sequence[int], count: int) -> list[Any]:
    examples = list(load_examples(str(SHARED / "data" / task / f"{split}.jsonl")))
    return [encode_example(tokenizer, e, ends) for e in spread(examples, count)]


def profile_of(task: str, tokenizer: Any, ends: Sequence[int], size: int) -> tuple[Profile, Any]:
    """The list, and the training rows it was counted on."""
    train = rows_of(task, "train", tokenizer, ends, 100_000)
    held_out = rows_of(task, "validation", tokenizer, ends, 300)
    counts = count_documents(train)
    return build_profile(counts, tokenizer, ends, vocab_size=size, held_out=held_out), train


def drafts(
    train: Sequence[Any], size: int, ends: Sequence[int], folder: Path, target: Target
) -> tuple[NgramDrafter, Budget]:
    """TASC-spec over the training rows' reference answers, without calibration."""
    answers = [answer for _, answer in train]
    corpus = CorpusIndex.build(folder, answers, vocab_size=size, fingerprint="bench")
    return NgramDrafter(corpus, end_tokens=ends), Budget(measure_cost(target))


def small_heads(drafts: bool, on_host: bool) -> list[str]:
    """The ways to decode beside plain."""
    ways = ["exact", "masked"]
    if not on_host:
        ways.append("exact, table on the device")
    return [*ways, "tasc-spec+exact"] if drafts else ways


def forgetting(decoder: Decoder) -> Callable[[], None]:
    """What puts a decoder back to what it is now: a repeat must not profit by the one before."""
    schedule = copy.deepcopy(getattr(decoder, "schedule", None))
    restore = restorer(decoder, getattr(decoder.drafter, "calibration", None))

    def forget() -> None:
        restore()
        if schedule is not None:
            decoder.schedule = copy.deepcopy(schedule)  # type: ignore[attr-defined]

    return forget


@torch.inference_mode()
def decode(folder: Path, task: str, options: argparse.Namespace) -> dict[str, Any]:
    slim = load_offloaded(folder, device=options.device)
    model, tokenizer, on_host = slim.model, slim.tokenizer, options.device == "cpu"
    ends = (tokenizer.eos_token_id,)
    size = model.config.vocab_size
    profile, train = profile_of(task, tokenizer, ends, size)
    rows = rows_of(task, "test", tokenizer, ends, options.rows)
    stock = model if on_host else load_model(str(folder), device=options.device)[0]
    table = slim.head.rows if on_host else stock.get_output_embeddings().weight
    script = Script(table, UNSURE[task])
    for each in {id(m): m for m in (model, stock)}.values():
        script.write_for(each)
    whole: dict[str, Any] = {"prompt": rows[0][0]}
    decoders: dict[str, Decoder] = {"plain": Decoder(Target(stock), NoDrafter())}
    tables = {"table": slim.head, "bias": slim.head_bias}
    for kind in small_heads(options.drafts, on_host):
        config = VocabConfig(head="masked" if kind == "masked" else "exact")
        given = (stock, {}) if "on the device" in kind else (model, tables)
        rate = 1 - profile.held_out.share
        made = tailor_model(given[0], profile.ids, config, rate=rate, **given[1])
        begin = made.head.begin
        made.head.begin = lambda _, begin=begin: begin(whole["prompt"])  # type: ignore[method-assign]
        drafting: tuple[Any, ...] = (NoDrafter(),)
        if kind.startswith("tasc-spec"):
            drafting = drafts(train, size, ends, folder / task, made.target)
        decoders[kind] = made.decoder(*drafting)
        head = made.head
        if config.head == "exact":
            made.check  # noqa: B018  # measured before the clock starts
    params = SamplingParams(max_new_tokens=options.tokens, end_tokens=ends)

    def begin(prompt: IntArray, answer: IntArray) -> None:
        script.begin(prompt[-READ:], answer, np.union1d(profile.ids, prompt))

    for row in rows_of(task, "validation", tokenizer, ends, 2 if options.quick else 6):
        for decoder in decoders.values():
            whole["prompt"] = row[0]
            begin(*row)
            decoder.generate(row[0][-READ:], params)
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    tokens, counts, differing = 0, {"misses": 0, "checks": 0, "full_steps": 0}, 0
    forget = [forgetting(decoder) for decoder in decoders.values()]
    for repeat in range(options.repeats):
        for each in forget:
            each()
        spent = dict.fromkeys(decoders, 0.0)
        number = dict.fromkeys(decoders, 0)
        for turn, (prompt, answer) in enumerate(rows):
            whole["prompt"], said = prompt, {}
            names = list(decoders)[turn % len(decoders) :] + list(decoders)[: turn % len(decoders)]
            for name in names:
                begin(prompt, answer)
                got = decoders[name].generate(prompt[-READ:], params)
                said[name] = got.tokens
                spent[name] += got.seconds - got.prefill_seconds
                number[name] += len(got.tokens) - 1
                if name == "exact" and repeat == 0:
                    counts = {k: counts[k] + got.extra[k] for k in counts}
                    tokens += len(got.tokens)
            differing += any(said[n] != said["plain"] for n in said if "exact" in n)
        for name in decoders:
            seconds[name].append(spent[name] / number[name])
    plain = np.asarray(seconds["plain"])
    return {
        "task": task,
        "list_rows": len(profile.ids),
        "head_bytes": head.nbytes,
        "full_bytes": slim.head.nbytes,
        "answers": len(rows),
        "tokens": tokens,
        **counts,
        "exact_differs": differing,
        "coverage_held_out": profile.held_out.share,
        "ms_a_token": {name: float(1e3 * np.median(each)) for name, each in seconds.items()},
        "against_plain": {
            name: spread_of((plain / np.asarray(each)).tolist())
            for name, each in seconds.items()
            if name != "plain"
        },
    }


PEAK = """
import json, sys
import numpy as np
import torch
small, large, how, listed, device = sys.argv[1:]

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field + ":"))

def load(folder):
    ids = np.asarray(json.load(open(listed)), np.int32)
    if how == "stock":
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
        return model.to(device), None
    from tascade.config import VocabConfig
    from tascade.tailor.tailored import tailor_model
    from tascade.tailor.offload.load import load_offloaded
    slim = load_offloaded(folder, device=device)
    made = tailor_model(slim.model, ids, VocabConfig(head="masked"), table=slim.head)
    return slim.model, made

with torch.inference_mode():
    model, made = load(small)
    ids = torch.arange(8, device=device)[None]
    model.base_model(ids)
    del model, made
    before, anonymous = status("VmHWM"), status("RssAnon")
    rest = max(0, before - status("VmRSS"))
    ballast = np.ones(rest + (1 << 20), np.uint8)  # lifts what is resident to the mark
    before = status("VmHWM")
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    model, made = load(large)
    if made is None:
        model(ids)
    else:
        made.target.begin(np.arange(8, dtype=np.int32))
        made.target.forward(list(range(8)))
    print(json.dumps({
        "peak": status("VmHWM") - before,
        **({} if device == "cpu" else {"device_peak": torch.cuda.max_memory_allocated() - held}),
        "anonymous": status("RssAnon") - anonymous - ballast.nbytes,
        "head": 0 if made is None else made.head.nbytes,
    }))
"""


def peaks(small: Path, large: Path, ids: IntArray, work: Path, device: str) -> dict[str, Any]:
    """Bytes by which memory grows in loading and a first forward, by how the model is loaded."""
    listed = work / "ids.json"
    listed.write_text(json.dumps(ids.tolist()))
    found = {}
    for how in ("stock", "tailored"):
        words = [sys.executable, "-c", PEAK, small, large, how, listed, device]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
        found[how] = json.loads(done.stdout.splitlines()[-1])
    slim = load_offloaded(large, device="cpu")
    body = sum(p.nbytes for p in slim.model.parameters())
    allowed = 1.05 * (body + found["tailored"]["head"])
    return {
        "body": body,
        "table": slim.head.nbytes,
        **found,
        "allowed": allowed,
        "within": found["tailored"]["peak" if device == "cpu" else "device_peak"] <= allowed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=0, help="fewer layers, to try the script")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--drafts", action="store_true", help="with TASC-spec's too")
    parser.add_argument(
        "--quick", action="store_true", help="warm up on two validation rows, not six"
    )
    parser.add_argument("--no-load", action="store_true", help="speed alone")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine_info(),
        "settings": {
            "dtype": options.dtype,
            "tokens": options.tokens,
            "repeats": options.repeats,
            "device": options.device,
        },
        "results": [],
    }
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as work:
            small, large = Path(work) / "small", Path(work) / "large"
            for folder, layers in ((small, 1), (large, options.layers)):
                folder.mkdir()
                write_model(shape, folder, getattr(torch, options.dtype), layers)
            tokenizer = load_offloaded(small, device="cpu").tokenizer
            size = SHAPES[shape]["vocab_size"]
            ids = profile_of(options.tasks[0], tokenizer, [tokenizer.eos_token_id], size)[0].ids
            found: dict[str, Any] = {"shape": shape, "load": {}}
            if not options.no_load:
                found["load"] = peaks(small, large, ids, Path(work), options.device)
            found["tasks"] = []
            report["results"].append(found)
            for task in options.tasks:
                found["tasks"].append(decode(large, task, options))
                print(time.strftime("%H:%M:%S"), shape, json.dumps(found["tasks"][-1]), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
