"""The market's loops compiled and as plain Python: one program, the same bits."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from broker.allocation.compiled import digest_of

ROOT = Path(__file__).parents[3]
PROGRAM = """
import hashlib, sys
from broker.allocation.generate import generate
from broker.allocation.generate_features import FEATURES
from broker.allocation.solve import clear_tables
for family, features in (("A", ()), ("B", FEATURES)):
    for seed in range(3):
        print(hashlib.sha256(clear_tables(generate(family, 24, 8, seed, features)).to_json()).hexdigest())
"""


def digests(wish: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HANSA_COMPILE": wish},
        check=True,
        timeout=1500,
    )
    return done.stdout.split()


@pytest.mark.soak
@pytest.mark.timeout(2000)
def test_compiled_loops_give_the_same_bytes_as_the_same_loops_in_python() -> None:
    plain = digests("0")
    assert len(set(plain)) == len(plain) == 6
    assert digests("1") == plain


def test_a_process_without_compiled_loops_never_loads_numba() -> None:
    program = "import sys, broker.allocation.solve; print('numba' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HANSA_COMPILE": "0"},
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "False"


def test_the_folder_of_compiled_loops_is_named_after_their_sources(tmp_path: Path) -> None:
    program = "from broker.allocation import compiled; print(compiled._cache_folder())"
    here = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True, timeout=60
    ).stdout.strip()
    for package in ("broker", "pricing", "training", "sites"):
        target = tmp_path / package
        subprocess.run(["cp", "-r", str(ROOT / package), str(target)], check=True, timeout=60)  # noqa: S607
    kernel = tmp_path / "broker" / "allocation" / "kernel.py"
    kernel.write_text(kernel.read_text() + "\n# changed\n")
    other = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True, timeout=60
    ).stdout.strip()
    assert Path(here).name != Path(other).name
    assert len(Path(here).name) == len(hashlib.sha256(b"").hexdigest()) // 4


def test_what_numba_would_compile_anew_has_another_name(tmp_path: Path) -> None:
    source = tmp_path / "kernel.py"
    source.write_text("x = 1\n")
    name = digest_of([source])
    assert digest_of([source]) == name
    touched = source.stat().st_mtime_ns + 1_000_000_000
    os.utime(source, ns=(touched, touched))
    assert digest_of([source]) != name
    os.utime(source, ns=(touched - 1_000_000_000, touched - 1_000_000_000))
    assert digest_of([source]) == name
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "kernel.py"
    source.rename(moved)
    assert digest_of([moved]) != name
