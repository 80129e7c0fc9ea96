"""`hansa lab run` as a user has it: real ranks and gateways, and what it prints of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from broker.cli.errors import UsageError
from broker.cli.lab import app
from tests.training.lab.test_compare import JOB, SCRIPT
from training.lab.compare import Point, thinned
from training.lab.errors import ReplayError


def test_a_run_prints_its_loss_against_bytes_and_time(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "job.yaml").write_text(JOB)
    told = CliRunner().invoke(app, ["run", str(tmp_path / "job.yaml"), "--sites", "2", "--quiet"])
    assert told.exit_code == 0, told.output
    title, columns, *lines = told.output.splitlines()
    assert title.startswith("small on 2 sites, diloco (int8), 64 samples")
    assert columns.split() == ["samples", "loss", "payload", "bytes", "seconds"]
    *points, total = (line.split() for line in lines)
    assert len(points) == 8, "a line for each step of site-1"
    assert float(points[-1][1]) < float(points[0][1])
    assert [int(each[2].replace(",", "")) for each in points] == sorted(
        int(each[2].replace(",", "")) for each in points
    )
    assert total[:2] == ["4", "rounds,"]
    # Four rounds, up and down: a header of 12 bytes, a scale of 4 and a byte for each of 5 parameters.
    assert total[2:4] == [str(4 * 2 * (12 + 4 + 5)), "payload"]


@pytest.mark.soak
def test_a_run_in_which_the_hubs_site_is_killed_replays_to_its_final_hash(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "job.yaml").write_text(JOB)
    record = str(tmp_path / "run")
    asked = ["run", str(tmp_path / "job.yaml"), "--sites", "2", "--samples", "800", "--kill", "site-1@3", "--quiet"]
    told = CliRunner().invoke(app, [*asked, "--record", record])
    assert told.exit_code == 0, told.output
    replayed = CliRunner().invoke(app, ["replay", record, "--json"])
    assert replayed.exit_code == 0, replayed.output
    found = json.loads(replayed.output)
    ends = json.loads((tmp_path / "run" / "run.json").read_text())["ends"]
    assert found["outer_hash"] == ends["site-2"]["outer_hash"]
    assert (found["views"], found["samples_done"], found["has_end"]) == (2, 800, True)
    victim = max((tmp_path / "run" / "contributions").iterdir())
    content = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused = CliRunner().invoke(app, ["replay", record])
    assert isinstance(refused.exception, ReplayError)
    assert "was altered or cut" in str(refused.exception)


def test_congestion_control_needs_a_network(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    told = CliRunner().invoke(app, ["run", str(tmp_path / "job.yaml"), "--congestion", "cubic"])
    assert isinstance(told.exception, UsageError)


@pytest.mark.parametrize(("length", "kept"), [(0, 0), (1, 1), (20, 20), (21, 20), (1000, 20)])
def test_a_long_run_is_told_in_as_many_lines_as_a_person_reads(length: int, kept: int) -> None:
    points = [Point(number, 0, 0.0, 0.0) for number in range(length)]
    found = thinned(points, 20)
    assert len(found) == len(set(found)) == kept
    assert found[:1] == points[:1]
    assert found[-1:] == points[-1:]
    assert json.dumps([each.samples for each in found]) == json.dumps(sorted(each.samples for each in found))
