"""Cost of the corpus index: size, build, memory, opening, appending; Arctic's suffix tree beside.

    python benchmarks/index_bench.py --tokens 1000000 10000000 --json index.json [--arctic]

Each size and each peer runs in its own process, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 32_000
END = 2
SEED = 0


def corpus(n_tokens: int, seed: int = SEED) -> list[list[int]]:
    """Outputs of a made-up task: Zipf-repeated templates with slots, about 90 tokens each."""
    rng = np.random.default_rng(seed)
    words = rng.permutation(np.arange(3, VOCAB))
    templates = []
    for _ in range(400):
        body = words[np.minimum(rng.zipf(1.3, rng.integers(30, 150)), len(words)) - 1]
        templates.append((body, np.flatnonzero(rng.random(len(body)) < 0.12)))
    fills = [words[rng.integers(0, len(words), rng.integers(1, 4))] for _ in range(5000)]
    documents, total = [], 0
    while total < n_tokens:
        body, slots = templates[min(int(rng.zipf(1.2)), len(templates)) - 1]
        parts, begin = [], 0
        for slot in slots:
            parts += [body[begin:slot], fills[min(int(rng.zipf(1.2)), len(fills)) - 1]]
            begin = slot + 1
        document = np.concatenate([*parts, body[begin:], [END]]).tolist()
        documents.append(document)
        total += len(document)
    return documents


def draft_latency(index: Any, held_out: list[list[int]]) -> dict[str, Any]:
    """Microseconds of one draft of 24 nodes, Python call included.

    The contexts are prefixes of documents of the same task that the index does not hold.
    """
    from tascade.draft.ngram.drafter import NgramDrafter

    rng = np.random.default_rng(2)
    contexts = []
    for document in (held_out[i] for i in rng.integers(0, len(held_out), 3000)):
        cut = int(rng.integers(1, len(document)))
        contexts.append(np.asarray([*document[:cut][::-1], -1][:32], np.int32))
    mixer = NgramDrafter(index)
    tree = []
    for context in contexts[:600]:
        mixer.start(np.empty(0, np.int32))
        mixer.commit(context[::-1][context[::-1] >= 0], 0, ())
        tree.append(timed(lambda: mixer.propose(24))[1] * 1e6)
    return {"tree_of_24": quantiles(tree[100:])}


def quantiles(microseconds: list[float]) -> dict[str, float]:
    return {"p50": float(np.median(microseconds)), "p99": float(np.quantile(microseconds, 0.99))}


def memory(field: str) -> int:
    """A field of this process's status in bytes: RssAnon, VmRSS, or VmHWM (the peak)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def forget_peak() -> None:
    """Let the peak start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def timed(call: Any, repeats: int = 1) -> tuple[Any, float]:
    """A call's result and the median of its seconds."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - begin)
    return result, float(np.median(seconds))


def measure_index(n_tokens: int, folder: Path) -> dict[str, Any]:
    from tascade.index.arrays import sort_shard
    from tascade.index.corpus import CorpusIndex

    path, options = folder / "index", {"vocab_size": VOCAB, "fingerprint": "bench"}
    small = corpus(1000)
    CorpusIndex.build(folder / "warm", small, **options).count([3, 4])  # compile
    documents = corpus(n_tokens + 50_000)
    held_out = documents[-500:]
    del documents[-500:]
    n = sum(map(len, documents))
    forget_peak()
    before = memory("VmRSS")
    index, build = timed(lambda: CorpusIndex.build(path, documents, **options))
    result: dict[str, Any] = {
        "tokens": n,
        "documents": len(documents),
        "index_bytes_per_token": index.n_bytes / n,
        "build_us_per_token": build / n * 1e6,
        "build_peak_extra_bytes_per_token": (memory("VmHWM") - before) / n,
    }
    tokens = index.shards[0].tokens.copy()
    result["sort_us_per_token"] = timed(lambda: sort_shard(tokens, VOCAB))[1] / n * 1e6
    _, opened = timed(lambda: CorpusIndex.open(path, fingerprint="bench"), 21)
    _, verified = timed(lambda: CorpusIndex.open(path, verify=True))
    result |= {"open_ms": opened * 1e3, "verify_us_per_token": verified / n * 1e6}
    rng = np.random.default_rng(1)
    queries = [documents[i][:k] for i, k in rng.integers(4, 30, (2000, 2)).tolist()]
    each = [timed(lambda q=q: index.count(q))[1] * 1e6 for q in queries]
    result["count_us"] = {"p50": float(np.median(each)), "p99": float(np.quantile(each, 0.99))}
    result |= measure_updates(path, CorpusIndex)
    result["draft_us"] = draft_latency(CorpusIndex.open(path), held_out)
    return result


def measure_updates(path: Path, index_class: Any) -> dict[str, Any]:
    """100k tokens appended in one call, then one document at a time; refresh; compaction."""
    reader = index_class.open(path)
    documents = corpus(100_000, seed=5)
    n = sum(map(len, documents))
    with index_class.open(path, writable=True) as index:
        _, bulk = timed(lambda: index.append(documents))
        _, refreshed = timed(reader.refresh)
        _, single = timed(lambda: [index.append([d], flush=False) for d in documents])
        _, one_sync = timed(lambda: index.append([documents[0]]), 21)
        _, folded = timed(index.compact)
        total = index.n_tokens
    return {
        "append_bulk_us_per_token": bulk / n * 1e6,
        "append_each_us_per_token": single / n * 1e6,
        "append_one_flushed_ms": one_sync * 1e3,
        "refresh_us_per_token": refreshed / n * 1e6,
        "compact_us_per_token": folded / total * 1e6,
    }


def measure_arctic(n_tokens: int, folder: Path) -> dict[str, Any]:
    from arctic_inference.suffix_decoding import SuffixDecodingCache

    documents = corpus(n_tokens)
    n = sum(map(len, documents))
    arrays = [np.array(document, np.int32) for document in documents]
    before = memory("RssAnon")
    cache = SuffixDecodingCache(max_tree_depth=24, max_cached_requests=-1)
    empty = np.empty(0, np.int32)

    def build() -> None:
        for i, tokens in enumerate(arrays):
            cache.start_request(i, empty)
            cache.add_active_response(i, tokens)
            cache.stop_request(i)

    _, seconds = timed(build)
    held = memory("RssAnon") - before
    rng = np.random.default_rng(1)
    cache.start_request("q", empty)
    each = []
    for i, k in rng.integers(4, 30, (2000, 2)).tolist():
        context = arrays[i][:k]
        each.append(timed(lambda c=context: cache.speculate("q", c, max_spec_tokens=24))[1] * 1e6)
    return {
        "tokens": n,
        "build_us_per_token": seconds / n * 1e6,
        "memory_bytes_per_token": held / n,
        "speculate_us": {"p50": float(np.median(each)), "p99": float(np.quantile(each, 0.99))},
    }


def in_own_process(what: str, n_tokens: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", what, "--tokens", str(n_tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--arctic", action="store_true", help="Arctic above 2M tokens as well")
    parser.add_argument("--one", choices=["index", "arctic"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        folder = Path(tempfile.mkdtemp())
        try:
            measure = measure_index if options.one == "index" else measure_arctic
            print(json.dumps(measure(options.tokens[0], folder)))
        finally:
            shutil.rmtree(folder)
        return
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()},
        "settings": {"vocab_size": VOCAB, "seed": SEED, "arctic_depth": 24},
        "results": [],
    }
    for n_tokens in options.tokens:
        report["results"].append({"name": "corpus-index", **in_own_process("index", n_tokens)})
        if n_tokens <= 2_000_000 or options.arctic:
            try:
                import arctic_inference  # noqa: F401
            except ImportError:
                print("arctic_inference is not installed: left out", file=sys.stderr)
            else:
                row = {"name": "arctic-suffix", **in_own_process("arctic", n_tokens)}
                report["results"].append(row)
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
