"""`tascade serve` in vLLM: it starts in this environment, answers, learns, and ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from tascade.index.corpus import CorpusIndex


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"content-type": "application/json"})
    with urlopen(request, timeout=120) as reply:
        return json.loads(reply.read() or "null")


def wait_for(what: Any, seconds: float, server: subprocess.Popen[bytes]) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert server.poll() is None, "the server ended"
        try:
            if found := what():
                return found
        except (OSError, URLError):
            pass
        time.sleep(0.3)
    raise AssertionError("it did not come")


def test_a_pack_is_served_and_learns(
    ticket_pack: Path, tmp_path: Path, prompts: list[dict[str, list[int]]]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    learned, log = tmp_path / "learned", tmp_path / "log"
    words = ["serve", str(ticket_pack), "--engine", "vllm", "--port", str(port)]
    words += ["--served-model-name", "tickets", "--learn", str(learned), "--dtype", "float32"]
    words += ["--max-model-len", "1024", "--max-num-seqs", "4"]
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "tascade.cli", *words], stdout=out, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: ask(f"{url}/health") is None or True, 600, server)
        body = {
            "model": "tickets",
            "prompt": prompts[0]["prompt_token_ids"],
            "temperature": 0,
            "max_tokens": 96,
            "return_token_ids": True,
        }
        [choice] = ask(f"{url}/v1/completions", body)["choices"]
        assert choice["finish_reason"] == "stop"

        def stored() -> list[list[int]]:
            return [tokens.tolist() for _, tokens in CorpusIndex.open(learned).documents()]

        assert wait_for(stored, 30, server) == [choice["token_ids"]]
    except BaseException:
        print(log.read_text()[-4000:])  # noqa: T201
        raise
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    told, command = log.read_text().splitlines()[:2]
    assert told == f"{url}/v1, model tickets, engine vllm"
    assert "tascade.integrations.vllm.TascadeProposer" in command
