"""Without the server's packages `tascade serve` says what to install, and nothing falls over."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tascade.errors import ConfigError
from tascade.serve import command

BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("prometheus_client", "uvicorn", "llguidance"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from tascade.cli.verbs import main
sys.argv = ["tascade", "serve", sys.argv[1], *sys.argv[2:]]
main()
"""


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    command.need_packages()
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else real(name)
    )
    with pytest.raises(ConfigError, match=r"uvicorn[\s\S]*\.\[serve\]"):
        command.need_packages()


def test_vllms_command_needs_none_of_them(ticket_pack: Path) -> None:
    asked = [sys.executable, "-c", BLOCKED, str(ticket_pack), "--print"]
    found = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert "vllm serve" in found.stdout
