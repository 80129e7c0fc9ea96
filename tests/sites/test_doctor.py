"""`hansa site doctor` on a site that is well, and on broken ones: each fault is found, and named with its remedy."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from sites import doctor
from sites.doctor import Finding, Level
from sites.identity import Identity
from sites.settings import SiteSettings, load_settings
from tests.sites.conftest import SITE_YAML
from tests.sites.market import Market
from tests.sites.slurm_cluster import Cluster
from tests.sites.test_site_cli import hansa_site
from training.clock import SystemClock


class WrongClock(SystemClock):
    """UTC as on a host that nobody set."""

    def __init__(self, ahead_s: float) -> None:
        self._ahead_s = ahead_s

    def now_ms(self) -> int:
        return super().now_ms() + round(self._ahead_s * 1000)


def found(settings: SiteSettings, clock: SystemClock | None = None) -> dict[str, Finding]:
    findings = doctor.examine(settings, clock or SystemClock())
    assert all(finding.remedy for finding in findings if finding.level is not Level.OK)
    order = list(Level)
    return {each.check: each for each in sorted(findings, key=lambda each: order.index(each.level))}


@pytest.mark.parametrize("sandbox", ["bubblewrap"])
@pytest.mark.parametrize("limits", ["{disk_gb: 0.1, artifact_cache_gb: 0.1}"])
def test_healthy_site_has_no_fault(settings: SiteSettings, identity: Identity) -> None:
    findings = found(settings)
    faults = [finding for finding in findings.values() if finding.level is Level.FAULT]
    assert faults == []
    well = {name for name, finding in findings.items() if finding.level is Level.OK}
    assert well >= {"folder", "certificate", "broker", "clock", "interpreter", "sandbox", "driver", "ports"}


def test_broken_site_is_told_everything_at_once(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    (tmp_path / "hamburg").mkdir(mode=0o755)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        broken = SITE_YAML.replace("{host: 127.0.0.1}", f"{{host: 127.0.0.1, ports: {port}-{port}}}")
        path.write_text(broken + "python: /bin/false\n")
        code, output = hansa_site("doctor", "--settings", str(path), "--json")
    assert code == 1
    told = json.loads(output)
    assert told["level"] == "fault"
    faults = {entry["check"]: entry for entry in told["findings"] if entry["level"] == "fault"}
    assert set(faults) == {"folder", "certificate", "interpreter", "ports"}
    assert faults["folder"]["remedy"] == f"chmod 700 {tmp_path / 'hamburg'}"
    assert "hansa site join" in faults["certificate"]["remedy"]
    assert "hansa[train]" in faults["interpreter"]["remedy"]
    assert str(port) in faults["ports"]["detail"]
    lines = hansa_site("doctor", "--settings", str(path))[1]
    assert "-> chmod 700" in lines


@pytest.mark.parametrize(
    ("ahead_s", "level"), [(0, Level.OK), (60, Level.WARNING), (-60, Level.WARNING), (3600, Level.FAULT)]
)
def test_clock_is_held_against_the_broker_s(
    settings: SiteSettings, identity: Identity, ahead_s: float, level: Level
) -> None:
    clock = found(settings, WrongClock(ahead_s))["clock"]
    assert clock.level is level
    assert (ahead_s == 0) or ("ahead of" in clock.detail) == (ahead_s > 0)


def test_ended_certificate_and_readable_key_are_faults(settings: SiteSettings, identity: Identity) -> None:
    (settings.folder / "identity" / "key.pem").chmod(0o644)
    findings = found(settings, WrongClock(25 * 3600))
    assert findings["certificate"].level is Level.FAULT
    assert findings["key"].remedy.startswith("chmod 600")


def test_certificate_of_another_key_is_a_fault(settings: SiteSettings, identity: Identity, market: Market) -> None:
    other = market.ca.public_bytes(doctor.identities.Encoding.PEM)
    (settings.folder / "identity" / "certificate.pem").write_bytes(other)
    assert found(settings)["certificate"].level is Level.FAULT


def test_broker_that_does_not_answer_is_a_fault(settings: SiteSettings, identity: Identity, market: Market) -> None:
    market.close()
    assert found(settings)["broker"].level is Level.FAULT


SLURM = "driver: slurm\nslurm: {gpus_per_node: %d, partition: %s, gres: gpu, gateway_host: 127.0.0.1}\n"


@pytest.mark.parametrize(
    ("gpus", "per_node", "partition", "fault"),
    [(8, 4, "main", None), (9, 4, "main", "gpus"), (8, 6, "main", "gpus"), (8, 4, "nowhere", "driver")],
    ids=["as promised", "too many promised", "too many on a node", "no such partition"],
)
def test_what_slurm_has_is_held_against_what_is_promised(
    cluster: Cluster, tmp_path: Path, *, gpus: int, per_node: int, partition: str, fault: str | None
) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(SITE_YAML.replace("gpus: 4", f"gpus: {gpus}") + SLURM % (per_node, partition))
    findings = list(doctor._driver(load_settings(path), SystemClock()))
    assert [each.check for each in findings if each.level is Level.FAULT] == ([] if fault is None else [fault])
