"""`make install` does what it must once, nothing the second time, and starts anew where an environment is broken.

The interpreter here is a small program that makes an environment in no time and notes what pip was asked for, so
that the script's own decisions are seen without installing anything.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

# Plays the interpreter outside (`-m venv`) and, copied into the environment, the one inside (`-m pip`).
INTERPRETER = """#!/bin/sh
case "$*" in
    *"import ensurepip"*) exit ${NO_ENSUREPIP:-0} ;;
    *"version_info <"*) exit ${TOO_OLD:-0} ;;
    *"%d.%d"*) echo 3.12 ;;
    *sys.prefix*) echo "$PWD/.venv" ;;
    "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo "#!$PWD/.venv/bin/python" >.venv/bin/pip; echo venv >>asked ;;
    "-m pip "*) echo "$*" >>asked; exit ${PIP_STATUS:-0} ;;
    --version) echo Python 3.12.0 ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files that an installation reads, and the interpreter."""
    (tmp_path / "deploy").mkdir()
    for name in ("pyproject.toml", "deploy/constraints.txt", "deploy/install.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "interpreter").write_text(INTERPRETER)
    (tmp_path / "interpreter").chmod(0o755)
    return tmp_path


def _install(clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TORCH_INDEX"}
    return subprocess.run(
        [clone / "deploy/install.sh"],
        check=False,
        capture_output=True,
        text=True,
        cwd=clone,
        env={**inherited, "PYTHON": str(clone / "interpreter"), **environment},
    )


def _asked(clone: Path) -> list[str]:
    """What was asked for since the last look."""
    path = clone / "asked"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_the_second_run_does_nothing(clone: Path) -> None:
    assert _install(clone).returncode == 0
    made, installed = _asked(clone)
    assert made == "venv"
    assert "--constraint deploy/constraints.txt --editable .[broker,site,train,dev]" in installed
    again = _install(clone)
    assert (again.returncode, again.stdout, _asked(clone)) == (0, "", [])


@pytest.mark.parametrize("name", ["pyproject.toml", "deploy/constraints.txt"])
def test_a_change_of_what_is_needed_installs_into_the_same_environment(clone: Path, name: str) -> None:
    _install(clone)
    _asked(clone)
    with (clone / name).open("a") as file:
        file.write("# changed\n")
    assert _install(clone).returncode == 0
    asked = _asked(clone)
    assert len(asked) == 1
    assert "--editable" in asked[0]


def test_an_installation_that_was_broken_off_starts_anew(clone: Path) -> None:
    assert _install(clone, PIP_STATUS="1").returncode != 0
    _asked(clone)
    again = _install(clone)
    assert again.returncode == 0
    assert "making it anew" in again.stdout
    assert _asked(clone)[0] == "venv"


def test_an_environment_without_its_interpreter_starts_anew(clone: Path) -> None:
    _install(clone)
    _asked(clone)
    (clone / ".venv/bin/python").unlink()
    assert "making it anew" in _install(clone).stdout
    assert _asked(clone)[0] == "venv"


def test_the_index_of_torch_is_used_for_torch_alone_and_remembered(clone: Path) -> None:
    _install(clone, TORCH_INDEX="https://index.example/cu")
    _, torch, rest = _asked(clone)
    assert "--index-url https://index.example/cu torch==" in torch
    assert "index.example" not in rest
    _install(clone)
    assert _asked(clone) == []
    _install(clone, TORCH_INDEX="https://index.example/cpu")
    torch, rest = _asked(clone)
    assert "--force-reinstall --index-url https://index.example/cpu" in torch


def test_without_venv_the_package_to_install_is_named(clone: Path) -> None:
    run = _install(clone, NO_ENSUREPIP="1")
    assert run.returncode != 0
    assert "sudo apt-get install python3.12-venv" in run.stderr
    assert _asked(clone) == []


def test_an_interpreter_that_is_too_old_is_refused_with_what_to_do(clone: Path) -> None:
    run = _install(clone, TOO_OLD="1")
    assert run.returncode != 0
    assert "needs Python 3.11 or later" in run.stderr


def test_torch_is_pinned_without_a_build_so_that_the_index_may_choose_it() -> None:
    lines = (ROOT / "deploy/constraints.txt").read_text().splitlines()
    (torch,) = [line for line in lines if line.startswith("torch==")]
    assert "+" not in torch
    assert not [line for line in lines if line.startswith(("nvidia-cu", "nvidia-nccl", "triton"))]
