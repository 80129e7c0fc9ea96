"""A job's secrets at its site: a file in the ranks' private /tmp, and nowhere else before, during and after."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag

from sites.drivers.interface import Run, secret_files
from sites.drivers.process import ProcessDriver
from sites.protocol import ExitCause, Skill
from sites.sandbox import SECRETS_FOLDER, Bubblewrap, View
from sites.secret_box import box_public_key, close_box, new_box_key, open_box, secrets_context
from tests.sites.conftest import StartAgent, job
from tests.sites.market import Grant, Market
from tests.sites.waiting import wait_until
from training.attempt import SECRETS_ENVIRONMENT
from training.clock import SystemClock

VALUE = "kept-from-every-disk-7f3a"

SCRIPT = """
import hashlib, json, os, pathlib
folder = pathlib.Path(os.environ["HANSA_SECRETS"])
seen = {path.name: [hashlib.sha256(path.read_bytes()).hexdigest(), oct(path.stat().st_mode & 0o777)]
        for path in folder.iterdir()}
value = (folder / "HF_TOKEN").read_text()
seen["elsewhere"] = [name for name, content in os.environ.items() if value in content]
seen["elsewhere"] += [str(path) for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if value in path.read_text()]
seen["folder"] = [str(folder), oct(folder.stat().st_mode & 0o777)]
seen["open"] = [number for number in os.listdir("/proc/self/fd") if int(number) >= 20]
print(json.dumps(seen), flush=True)
"""


def holding(value: str, *folders: Path) -> list[Path]:
    """Return the files below `folders` in which `value` stands."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if value.encode() in path.read_bytes()]


def test_a_box_opens_for_its_key_and_its_lease_alone() -> None:
    key, context = new_box_key(), secrets_context("lease_a", 1)
    box = close_box(box_public_key(key), b"value", context)
    assert open_box(key, box, context) == b"value"
    assert b"value" not in box
    for other_key, other_box, other_context in (
        (new_box_key(), box, context),
        (key, box, secrets_context("lease_a", 2)),
        (key, box[:-1] + bytes([box[-1] ^ 1]), context),
        (key, box[:20], context),
    ):
        with pytest.raises(InvalidTag):
            open_box(other_key, other_box, other_context)


def test_a_run_finds_its_secrets_in_open_files_and_its_folder_holds_none(tmp_path: Path) -> None:
    driver, folder = ProcessDriver(sys.executable, SystemClock()), tmp_path / "run"
    numbers = secret_files(["B", "A"])
    assert numbers == {"A": 20, "B": 21}
    code = "import os; print(*(len(os.read(number, 100)) for number in (20, 21)), os.environ, flush=True)"
    driver.start(
        Run(
            folder=folder,
            argv=(sys.executable, "-I", "-S", "-c", code),
            cwd=tmp_path,
            environment={"PATH": os.defpath},
            log_path=tmp_path / "rank.log",
            deadline_s=SystemClock().monotonic_s() + 60,
            secrets={"A": VALUE.encode(), "B": (VALUE + VALUE).encode()},
        )
    )
    wait_until(lambda: driver.poll(folder).is_over)
    assert driver.poll(folder).exit_code == 0, (tmp_path / "rank.log").read_text()
    assert (tmp_path / "rank.log").read_text().split()[:2] == [str(len(VALUE)), str(2 * len(VALUE))]
    assert json.loads((folder / "run.json").read_text())["secrets"] == numbers
    assert holding(VALUE, tmp_path) == []


def test_in_the_sandbox_a_secret_is_a_file_of_its_private_tmp_alone(tmp_path: Path) -> None:
    if not shutil.which("bwrap"):
        pytest.skip("no bubblewrap; on Debian: sudo apt-get install bubblewrap")
    driver, folder = ProcessDriver(sys.executable, SystemClock()), tmp_path / "run"
    secrets = {"HF_TOKEN": VALUE.encode(), "KEY": b"second"}
    view = View(writable=(), secrets=secret_files(secrets))
    sandbox = Bubblewrap(sys.executable, tmp_path / "sandbox")
    driver.start(
        Run(
            folder=folder,
            argv=sandbox.argv((sys.executable, "-I", "-S", "-c", SCRIPT), view, Path("/")),
            cwd=tmp_path,
            environment={"PATH": os.defpath, SECRETS_ENVIRONMENT: SECRETS_FOLDER},
            log_path=tmp_path / "rank.log",
            deadline_s=SystemClock().monotonic_s() + 60,
            secrets=secrets,
        )
    )
    wait_until(lambda: driver.poll(folder).is_over)
    seen = json.loads((tmp_path / "rank.log").read_text())
    assert seen["HF_TOKEN"] == [hashlib.sha256(VALUE.encode()).hexdigest(), "0o400"]
    assert seen["KEY"][1] == "0o400"
    assert seen["folder"] == ["/tmp/hansa-secrets", "0o700"]  # noqa: S108  the sandbox's own
    assert (seen["elsewhere"], seen["open"]) == ([], [])
    assert not Path(SECRETS_FOLDER).exists()
    assert holding(VALUE, tmp_path) == []


@pytest.mark.parametrize("sandbox", ["bubblewrap"])
def test_a_secret_that_was_deleted_meanwhile_ends_the_attempt_with_the_reason(
    market: Market, start_agent: StartAgent, tmp_path: Path
) -> None:
    market.grants["lease_a"] = Grant("lease_a", "job_a", job(market, tmp_path / "work", "", secrets=["GONE"]))
    agent = start_agent()
    wait_until(lambda: agent.tick() and "lease_a" in market.reports and market.reports["lease_a"].cause)
    report = market.reports["lease_a"]
    assert (report.cause, report.detail) == (ExitCause.INPUT, "secret.missing: there is no secret GONE")


def test_a_site_without_a_private_place_takes_no_job_with_secrets(
    market: Market, start_agent: StartAgent, tmp_path: Path
) -> None:
    market.secrets = {"KEY": VALUE}
    market.grants["lease_a"] = Grant("lease_a", "job_a", job(market, tmp_path / "work", "", secrets=["KEY"]))
    agent = start_agent()
    wait_until(lambda: agent.tick() and market.vetoes)
    assert market.vetoes["lease_a"].code == "secrets.no_private_place"
    assert market.vetoes["lease_a"].scope == "site"
    assert Skill.SECRETS not in market.heartbeats[-1].skills
    market.grants.clear()
