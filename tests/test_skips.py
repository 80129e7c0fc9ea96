"""In continuous integration a skipped test is a failure that names the reason; elsewhere it is a skip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

INSIDE_A_TEST = """
import pytest
def test_portal():
    pytest.skip("no browser: apt-get install chromium")
"""
BY_A_MARK = """
import pytest
@pytest.mark.skip(reason="no browser: apt-get install chromium")
def test_portal(): ...
"""
A_WHOLE_FILE = """
import pytest
pytest.skip("no browser: apt-get install chromium", allow_module_level=True)
"""
IN_A_FIXTURE = """
import pytest
@pytest.fixture
def browser():
    pytest.skip("no browser: apt-get install chromium")
def test_portal(browser): ...
"""
EXPECTED_TO_FAIL = """
import pytest
@pytest.mark.xfail(strict=True)
def test_known(): assert False
"""


def _run(folder: Path, source: str, ci: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_inner.py").write_text(source)
    options = ["-p", "tests.fixtures.skips", "-p", "no:cacheprovider", "--rootdir", str(folder), "-c", os.devnull]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CI": ci, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )


@pytest.mark.parametrize("source", [INSIDE_A_TEST, BY_A_MARK, A_WHOLE_FILE, IN_A_FIXTURE])
def test_a_skip_fails_under_ci_and_names_its_reason(tmp_path: Path, source: str) -> None:
    run = _run(tmp_path, source, "true")
    assert run.returncode != 0
    assert "no browser: apt-get install chromium" in run.stdout
    assert "which CI=true forbids" in run.stdout


@pytest.mark.parametrize("source", [INSIDE_A_TEST, IN_A_FIXTURE])
def test_a_skip_is_a_skip_elsewhere(tmp_path: Path, source: str) -> None:
    run = _run(tmp_path, source, "")
    assert run.returncode == 0
    assert "1 skipped" in run.stdout


def test_an_expected_failure_is_no_skip(tmp_path: Path) -> None:
    assert _run(tmp_path, EXPECTED_TO_FAIL, "true").returncode == 0
