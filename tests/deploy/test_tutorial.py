"""The tutorial is followed literally: its commands are taken from the page and run in one shell, in order."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from broker.cli.main import app

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "deploy/TUTORIAL.md").read_text()
PORTS = ("7400", "7402")  # another market may stand there while the tests run


def commands(page: str) -> list[str]:
    """Return the commands of a page's console blocks, those over several lines whole."""
    found: list[str] = []
    for block in re.findall(r"^```console\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(line[2:])
            else:
                assert line.startswith("> "), f"a console block holds commands alone, not {line!r}"
                found[-1] += "\n" + line[2:]
    return found


def test_the_tutorial_names_only_commands_that_there_are() -> None:
    named = {match.strip() for match in re.findall(r"hansa ((?:[a-z]+ ?){1,3})", "\n".join(commands(PAGE)))}
    assert len(named) >= 12
    runner = CliRunner()
    for words in sorted(named):
        answer = runner.invoke(app, [*words.split(), "--help"])
        assert answer.exit_code == 0, f"hansa {words}: {answer.output}"


def test_every_command_stands_in_a_block_of_its_own_kind() -> None:
    assert len(commands(PAGE)) >= 25
    assert commands("```console\n$ a <<END\n> b\n> END\n$ c\n```\n") == ["a <<END\nb\nEND", "c"]


@pytest.mark.soak
@pytest.mark.timeout(480)
def test_the_tutorial_works_as_it_stands() -> None:
    script = "set -euo pipefail\n" + "\n".join(commands(PAGE))
    for port in PORTS:
        script = script.replace(port, _free_port())
    # The page takes the clone's own .venv; here it is that of these tests.
    script = script.replace("$PWD/.venv/bin", os.path.dirname(sys.executable))  # noqa: PTH120  a link must stay one
    shell = subprocess.Popen(
        ["/bin/bash", "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = shell.communicate(timeout=420)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, said[-3000:]
    assert "finished" in said
    assert "sound: every invariant holds" in said
    assert "identical" in said or "same bits" in said


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
