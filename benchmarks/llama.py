"""llama.cpp beside tascade: its server built from source, a model in its formats, and its requests.

    python benchmarks/llama.py build WORK            # llama-server and llama-quantize
    python benchmarks/llama.py convert WORK MODEL    # MODEL in bf16, q8_0 and q4_k_m under WORK

The source is the one that the package ``llama-cpp-python`` carries; building it takes CMake, a C++
compiler and, on two cores, a quarter of an hour. ``benchmarks/vllm_path.py --llama WORK`` measures.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import queue
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SOURCE = "llama-cpp-python==0.3.36"
THREADS = os.cpu_count() or 1
LOOKUP = ("--spec-type", "ngram-cache", "--spec-draft-n-max", "16")
METHODS = {  # the file of the model, and what the server is given besides
    "llama": ("bf16", ()),
    "llama-lookup": ("bf16", LOOKUP),
    "llama-q8": ("q8_0", ()),
    "llama-q4": ("q4_k_m", ()),
}


def build(work: Path) -> None:
    """The server and the quantiser, from the package's source."""
    work.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "install", "-q", "cmake", "ninja", "gguf", "sentencepiece"], check=True)
    fetch = ["download", "-q", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    if not source(work).is_dir():
        subprocess.run([*pip, "install", "-q", "scikit-build-core"], check=True)
        subprocess.run([*pip, *fetch, "-d", str(work), SOURCE], check=True)
        with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
    wanted = {"BUILD_TESTS": 0, "BUILD_EXAMPLES": 0, "OPENSSL": 0, "USE_PREBUILT_UI": 0}
    flags = [f"-DLLAMA_{name}={value}" for name, value in wanted.items()]
    made = str(work / "build")
    cmake = [str(Path(sys.executable).with_name("cmake"))]
    configure = ["-S", str(source(work)), "-B", made, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run([*cmake, *configure, *flags], check=True)
    targets = ["--target", "llama-server", "llama-quantize"]
    subprocess.run([*cmake, "--build", made, *targets], check=True)


def source(work: Path) -> Path:
    return work / SOURCE.replace("-", "_").replace("==", "-") / "vendor" / "llama.cpp"


def convert(work: Path, model: Path) -> None:
    """The model's weights as GGUF: bfloat16 as they are, then 8 and 4 bits a weight."""
    plain = gguf(work, model, "bf16")
    script = [sys.executable, str(source(work) / "convert_hf_to_gguf.py"), str(model)]
    subprocess.run([*script, "--outtype", "bf16", "--outfile", str(plain)], check=True)
    for kind in ("q8_0", "q4_k_m"):
        quantize = str(work / "build" / "bin" / "llama-quantize")
        subprocess.run([quantize, str(plain), str(gguf(work, model, kind)), kind], check=True)


def gguf(work: Path, model: Path, kind: str) -> Path:
    return work / f"{model.resolve().name}-{kind}.gguf"


class LlamaServer:
    """llama.cpp's server, asked over HTTP with token ids, as many requests at a time as wanted.

    It decodes greedily, and each slot keeps its last prompt, as it does by default; prompts that
    have left their slots are not kept, so that they can be forgotten. A slot has ``length`` tokens.
    """

    def __init__(self, method: str, work: Path, model: Path, slots: int, length: int) -> None:
        kind, extra = METHODS[method]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = tempfile.TemporaryDirectory()
        self.slots = slots
        command = [str(work / "build" / "bin" / "llama-server"), "-m", str(gguf(work, model, kind))]
        command += ["--port", str(self.port), "-np", str(slots), "-c", str(slots * length)]
        command += ["-t", str(THREADS), "-tb", str(THREADS), "--no-webui", *extra]
        command += ["--slot-save-path", self.folder.name, "--cache-ram", "0"]
        self.process = subprocess.Popen(command, stdout=sys.stderr, stderr=sys.stderr)
        while not self.ready():
            if self.process.poll() is not None:
                raise SystemExit("llama-server ended; run with --verbose to see why")
            time.sleep(0.2)

    def ready(self) -> bool:
        try:
            return self.request("GET", "/health")[0] == 200
        except OSError:
            return False

    def request(self, verb: str, path: str, body: Any = None) -> tuple[int, Any]:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        link.request(verb, path, json.dumps(body), {"Content-Type": "application/json"})
        answer = link.getresponse()
        status, text = answer.status, answer.read()
        link.close()
        return status, json.loads(text or "null")

    def answer(self, prompt: list[int], most: int) -> list[int]:
        body = {"prompt": prompt, "n_predict": most, "temperature": 0.0, "return_tokens": True}
        status, made = self.request("POST", "/completion", body)
        if status != 200:
            raise SystemExit(f"llama-server answered {status}: {made}")
        tokens: list[int] = made["tokens"]
        return tokens

    def drive(
        self, prompts: list[list[int]], concurrency: int, most: int, workload: str
    ) -> dict[str, Any]:
        """Answer all prompts, ``concurrency`` of them under way at a time."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(len(prompts)):
            waiting.put(i)
        answers: list[list[int]] = [[] for _ in prompts]

        def client() -> None:
            while True:
                try:
                    i = waiting.get_nowait()
                except queue.Empty:
                    return
                answers[i] = self.answer(prompts[i], most)

        clients = [threading.Thread(target=client) for _ in range(concurrency)]
        begin = time.perf_counter()
        for each in clients:
            each.start()
        for each in clients:
            each.join()
        return {"seconds": time.perf_counter() - begin, "answers": answers}

    def forget_prompts(self) -> None:
        for slot in range(self.slots):
            status, told = self.request("POST", f"/slots/{slot}?action=erase", {})
            if status != 200:
                raise SystemExit(f"llama-server kept its prefixes: {told}")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.folder.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["build", "convert"])
    parser.add_argument("work", type=Path)
    parser.add_argument("model", type=Path, nargs="?")
    options = parser.parse_args()
    if options.what == "build":
        build(options.work)
    elif options.model is None:
        parser.error("convert takes the folder of a model")
    else:
        convert(options.work, options.model)


if __name__ == "__main__":
    main()
