"""What lies in deploy/ fits the program: commands that exist, metrics that are shown, units that systemd takes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker.api.app import create_app
from broker.cli.processes import app as processes
from broker.settings import Settings
from tests.broker.speaking import Scene
from tests.deploy.grammar import refusal

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").iterdir())
PROGRAM = "/opt/hansa/.venv/bin/hansa"
# Standard names of Prometheus itself.
OF_PROMETHEUS = {"up"}


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())  # type: ignore[no-any-return]


def own_services() -> dict[str, dict[str, Any]]:
    return {name: row for name, row in compose()["services"].items() if row["image"] == "hansa-broker"}


@pytest.fixture
def scene(sqlite_schema: Path, tmp_path: Path) -> Iterator[Scene]:
    path = tmp_path / "market.sqlite3"
    shutil.copy(sqlite_schema, path)
    scene = Scene(f"sqlite:///{path}", tmp_path / "home")
    yield scene
    scene.close()


@pytest.fixture
def shown(scene: Scene) -> set[str]:
    """The names of all samples that /metrics gives for a market that has held a round."""
    scene.start(scene.submit())
    client = create_app(scene.market).test_client()
    client.get("/healthz")
    text = client.get("/metrics").get_data(as_text=True)
    return {line.partition(" ")[0].partition("{")[0] for line in text.splitlines() if not line.startswith("#")}


def names_in(expression: str) -> set[str]:
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", expression)
    bare = re.sub(r"by \([^)]*\)", "", bare)
    return {name for name in re.findall(r"\b[a-z_]{2,}\b(?!\s*\()", bare) if name not in {"by", "and", "or", "sum"}}


def test_every_metric_that_is_watched_is_one_that_is_shown(shown: set[str]) -> None:
    alerts = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
    expressions = [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    dashboard = json.loads((DEPLOY / "grafana/broker.json").read_text())
    expressions += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > 20
    for expression in expressions:
        unknown = names_in(expression) - shown - OF_PROMETHEUS
        assert not unknown, f"{expression}: /metrics has no {unknown}"


def test_labels_that_alerts_pick_are_states_that_exist(scene: Scene) -> None:
    client = create_app(scene.market).test_client()
    text = client.get("/metrics").get_data(as_text=True)
    assert 'hansa_ledger_credits{kind="equity"}' in text
    assert 'hansa_sites{state="live"}' in text
    balances = re.findall(r'hansa_ledger_credits\{kind="\w+"\} (\S+)', text)
    assert len(balances) > 3
    assert sum(map(float, balances)) == pytest.approx(0, abs=1e-6)


def test_every_alert_says_how_grave_it_is_and_where_the_runbook_helps() -> None:
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", line.removeprefix("## ").lower()).replace(" ", "-")
        for line in (DEPLOY / "RUNBOOK.md").read_text().splitlines()
        if line.startswith("## ")
    }
    alerts = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
    for rule in alerts["groups"][0]["rules"]:
        assert rule["labels"]["severity"] in {"page", "ticket"}
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (page, anchor in anchors) == ("RUNBOOK.md", True), rule["annotations"]["runbook"]


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((DEPLOY / "grafana/broker.json").read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("unit", [path for path in UNITS if path.suffix == ".service"], ids=lambda path: path.name)
def test_units_run_commands_that_exist(unit: Path) -> None:
    commands = re.findall(rf"{re.escape(PROGRAM)} ([^'\n]*)", unit.read_text())
    assert commands
    for command in commands:
        assert refusal(shlex.split(command.replace("$(date -u +%%Y-%%m-%%dT%%H%%M%%SZ)", "now"))) is None


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze: apt-get install systemd")
    for path in UNITS:
        # Verified with a program that is there: what is installed where is the admin's.
        (tmp_path / path.name).write_text(path.read_text().replace(PROGRAM, "/bin/true"))
    files = [str(tmp_path / path.name) for path in UNITS]
    run = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", *files], check=False, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_both_ways_to_deploy_run_every_process_of_a_broker_and_one_beat() -> None:
    by_compose = [" ".join(row["command"]) for row in own_services().values()]
    by_systemd = re.findall(rf"{re.escape(PROGRAM)} (broker .*)", "\n".join(unit.read_text() for unit in UNITS))
    for commands in (by_compose, by_systemd):
        for process in ("serve", "worker rounds", "worker upkeep", "economics", "wake"):
            assert sum(command.startswith(f"broker {process}") for command in commands) == 1, process
        assert sum("--beat" in command for command in commands) == 1
    assert {
        command.name or command.callback.__name__ for command in processes.registered_commands if command.callback
    } == {*("serve", "worker", "beat", "economics", "wake", "ca")}


def test_compose_runs_commands_that_exist_and_depends_on_services_that_are_there() -> None:
    services, volumes = compose()["services"], compose()["volumes"]
    for name, row in own_services().items():
        assert refusal(list(row["command"])) is None, name
    for name, row in services.items():
        for other, terms in row.get("depends_on", {}).items():
            assert terms["condition"] != "service_healthy" or "healthcheck" in services[other], f"{name} → {other}"
        for mount in row.get("volumes", []):
            source = mount.partition(":")[0]
            assert source in volumes or (DEPLOY / source).exists(), f"{name} mounts {source}"
        assert {"image", "build"} & row.keys()
    assert [row["ports"] for row in services.values() if "ports" in row and "profiles" not in row] == [["7400:7400"]]


def test_settings_in_the_example_are_settings_of_the_broker() -> None:
    text = (DEPLOY / "broker.env.example").read_text()
    names = re.findall(r"^#?(HANSA_[A-Z_]+)=", text, re.MULTILINE)
    names += [name for row in own_services().values() for name in row["environment"]]
    assert len(names) > 5
    assert {name.removeprefix("HANSA_").lower() for name in names} <= set(Settings.model_fields)


def test_the_image_copies_what_is_there() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert (DEPLOY.parent / name).exists(), name
    command = json.loads(re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)[0])
    assert refusal(command) is None


def test_every_command_in_the_runbook_is_one_that_the_program_takes() -> None:
    text = (DEPLOY / "RUNBOOK.md").read_text()
    commands = re.findall(
        r"`hansa ([^`…]+)`|^ *hansa (.+)$|run --rm api (admin .+)$|bin/hansa (.+)$", text, re.MULTILINE
    )
    lines = [next(part for part in found if part).partition("#")[0] for found in commands]
    assert len(lines) > 15
    for line in lines:
        assert refusal(shlex.split(line)) is None, line
