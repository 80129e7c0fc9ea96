"""What a killed demo leaves is swept by the next; what lives or failed is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from broker.demo import folders

LIVE = """
import signal, sys
from pathlib import Path
from broker.demo.folders import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    for name in ("killed", "failed", "of-another-kind"):
        (tmp_path / f"{folders.PREFIX}{name}" / "logs").mkdir(parents=True)
    (tmp_path / "something-else").mkdir()
    return tmp_path


def test_a_killed_demos_folder_is_swept_once_it_is_dead_and_no_other(parent: Path) -> None:
    killed, failed = parent / f"{folders.PREFIX}killed", parent / f"{folders.PREFIX}failed"
    with folders.held(failed):
        folders.keep(failed)
    with subprocess.Popen([sys.executable, "-c", LIVE, str(killed)], stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        assert demo.stdout.readline() == "held\n"
        assert folders.sweep(parent) == 0
        os.kill(demo.pid, signal.SIGKILL)
    assert folders.sweep(parent) == 1
    assert not killed.exists()
    assert failed.exists()
    assert (parent / f"{folders.PREFIX}of-another-kind").exists()
    assert (parent / "something-else").exists()


def test_a_link_to_elsewhere_is_not_followed(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / folders.ALIVE_FILE).touch()
    (parent / f"{folders.PREFIX}link").symlink_to(elsewhere)
    assert folders.sweep(parent) == 0
    assert (elsewhere / folders.ALIVE_FILE).exists()
