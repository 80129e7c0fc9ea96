"""The shells complete commands, those of groups that are loaded late too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = "import sys; sys.argv = ['hansa']; from broker.cli.main import main; main()"


@pytest.mark.parametrize(
    ("shell", "asked"),
    [
        ("bash", {"COMP_WORDS": "hansa admin user cr", "COMP_CWORD": "3"}),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "hansa admin user cr"}),
        ("fish", {"_TYPER_COMPLETE_ARGS": "hansa admin user cr", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_a_shell_completes_a_command_of_a_group(shell: str, asked: dict[str, str]) -> None:
    environment = os.environ | {"_HANSA_COMPLETE": f"complete_{shell}"} | asked
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert "create" in run.stdout, run.stderr
    assert "password" not in run.stdout
