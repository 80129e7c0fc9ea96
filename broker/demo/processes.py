"""The processes of the demo's market: what each runs, with which settings, and when it is ready.

Every one is the real thing, started through the same `hansa` commands that a production market uses.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from broker.demo.errors import DemoError
from broker.demo.folders import make_folder
from broker.demo.world import BROKER_SETTINGS, CREDIT_MICROS, GPU_TYPE, SITES, DemoSite
from broker.supervise import valkey
from broker.supervise.processes import ProcessSpec
from broker.supervise.readiness import http_answers
from broker.supervise.valkey import ValkeySource
from sites.inventory import MEASURED_FILE, measure
from sites.settings import load_settings

HOST: Final = "127.0.0.1"
PORT_MAX: Final = 65_535
PORT_TRIES_MAX: Final = 200
LOG_TAIL: Final = 2000
START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 4.0  # nothing of theirs is to be kept, and a person waits
JOIN_TIMEOUT_S: Final = 60.0
# Each attempt at a listening site takes one port for its gateway.
PORTS_PER_SITE: Final = 4
LINK_BANDWIDTH: Final = "20 Mbit/s"
LINK_DELAY_MS: Final = 20
EGRESS_CREDITS_PER_GB: Final = "0.02"
# On two cores, threads inside a process would only wait for each other.
ONE_THREAD: Final = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@dataclass(frozen=True, slots=True)
class Places:
    """Where the demo's market lives: its private folder and its ports."""

    home: Path
    api_port: int
    wake_port: int

    @property
    def broker_home(self) -> Path:
        """The broker's keys, database and files."""
        return self.home / "broker"

    @property
    def logs(self) -> Path:
        """What the processes print."""
        return self.home / "logs"

    @property
    def ca(self) -> Path:
        """The market's certificate authority, for clients to pin."""
        return self.home / "ca.pem"

    @property
    def url(self) -> str:
        """Where the API and the portal are."""
        return f"https://{HOST}:{self.api_port}"

    def site_home(self, site: DemoSite) -> Path:
        """Return the folder of a site: its identity, its journal, its attempts."""
        return self.home / "sites" / site.site_id


def make_places() -> Places:
    """Return a new private folder and ports that are free now."""
    folder = make_folder()
    api_port, wake_port = free_ports(2)
    return Places(folder, api_port, wake_port)


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback interface that nobody listens on now."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(count)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def port_ranges(count: int) -> list[tuple[int, int]]:
    """Return ranges of `PORTS_PER_SITE` consecutive ports, each free now."""
    found: list[tuple[int, int]] = []
    for _ in range(PORT_TRIES_MAX):
        if len(found) == count:
            return found
        first = free_ports(1)[0]
        last = first + PORTS_PER_SITE - 1
        taken = any(first <= other_last and other_first <= last for other_first, other_last in found)
        if not taken and last <= PORT_MAX and all(_is_free(port) for port in range(first, last + 1)):
            found.append((first, last))
    raise DemoError("there are not enough free ports on this machine's loopback interface; close some programs")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def clear_environment() -> None:
    """Forget `HANSA_…` variables of the caller: the demo is a market of its own and must not reach another's."""
    for name in [name for name in os.environ if name.startswith("HANSA_")]:
        del os.environ[name]


def broker_environment(places: Places, redis_url: str, settings: Mapping[str, str] = BROKER_SETTINGS) -> dict[str, str]:
    """Return the settings of the broker's processes."""
    return {
        **ONE_THREAD,
        **settings,
        "HANSA_HOME": str(places.broker_home),
        "HANSA_REDIS_URL": redis_url,
        "HANSA_PUBLIC_URL": places.url,
        "HANSA_WAKE_URL": f"http://{HOST}:{places.wake_port}",
        "HANSA_MARKET_NAME": "demo",
    }


def private_valkey(places: Places) -> ValkeySource:
    """Return a Valkey of the demo's own; a server named by the caller's environment is not touched."""
    return valkey.resolve({}, places.home / "valkey")


def hansa(*arguments: str) -> tuple[str, ...]:
    """Return the command line of `hansa` in this very installation."""
    return (sys.executable, "-P", "-m", "broker.cli.main", *arguments)  # -P: the cwd is the demo's, not code


def api_process(places: Places, environment: Mapping[str, str]) -> ProcessSpec:
    """Return gunicorn with Flask, over TLS."""
    address = f"{HOST}:{places.api_port}"
    return ProcessSpec(
        name="api",
        argv=hansa("broker", "serve", "--bind", address, "--workers", "1", "--threads", "16"),
        env=environment,
        cwd=places.home,
        ready=http_answers(HOST, places.api_port, "/healthz", ca=places.ca),
        ready_timeout_s=START_TIMEOUT_S,
        stop_timeout_s=STOP_TIMEOUT_S,
    )


def worker_processes(places: Places, environment: Mapping[str, str]) -> tuple[ProcessSpec, ...]:
    """Return the Celery worker that clears rounds, the one for upkeep with the beat, and what certificates wait for."""
    return tuple(
        ProcessSpec(
            name=name,
            argv=hansa("broker", *arguments),
            env=environment,
            cwd=places.home,
            stop_timeout_s=STOP_TIMEOUT_S,
        )
        for name, arguments in (
            ("rounds", ("worker", "rounds")),
            ("upkeep", ("worker", "upkeep", "-B")),
            ("economics", ("economics",)),
        )
    )


def wake_process(places: Places, environment: Mapping[str, str]) -> ProcessSpec:
    """Return the process that tells agents and browsers to look now."""
    return ProcessSpec(
        name="wake",
        argv=hansa("broker", "wake", "--bind", f"{HOST}:{places.wake_port}"),
        env=environment,
        cwd=places.home,
        stop_timeout_s=STOP_TIMEOUT_S,
    )


def write_site_settings(
    places: Places, site: DemoSite, ports: tuple[int, int], sites: Sequence[DemoSite] = SITES, sandbox: str = "plain"
) -> Path:
    """Write a site's settings as an operator would, and return the file; it has links to all other `sites`."""
    document: dict[str, object] = {
        "site_id": site.site_id,
        "folder": ".",
        "pools": [
            {
                "gpu_type": GPU_TYPE,
                "gpus": site.slots,
                "ask": f"{site.ask_micros_per_slot_hour / CREDIT_MICROS:.6f}",
            }
        ],
        "links": [
            {
                "target": other.site_id,
                "bandwidth": LINK_BANDWIDTH,
                "delay_ms": LINK_DELAY_MS,
                "egress_price": EGRESS_CREDITS_PER_GB,
            }
            for other in sites
            if other != site
        ],
        # All sites share this one machine: each may count on its part of the cores, and no more.
        "cores": round(len(os.sched_getaffinity(0)) * site.slots / sum(each.slots for each in sites), 3),
        "sandbox": sandbox,
        "i_trust_all_tenants": sandbox == "plain",
    }
    if site.listens:
        document["listen"] = {"host": HOST, "ports": f"{ports[0]}-{ports[1]}"}
    folder = places.site_home(site)
    folder.mkdir(mode=0o700, parents=True)
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def measure_once(settings: list[Path]) -> None:
    """Measure what a CPU slot can do, and let all sites know: they stand on the same machine.

    Three agents that measured at the same time would measure each other.
    """
    sites = [load_settings(path) for path in settings]
    measure(sites[0])
    for site in sites[1:]:
        shutil.copy(sites[0].folder / MEASURED_FILE, site.folder / MEASURED_FILE)


def join_site(settings: Path, join_string: str) -> None:
    """Let a site join with its one-time join string, as its operator would. Raises DemoError."""
    joined = subprocess.run(
        hansa("site", "join", join_string, "--settings", str(settings)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=JOIN_TIMEOUT_S,
        check=False,
        process_group=0,  # Ctrl-C reaches the demo alone, which then ends this
    )
    if joined.returncode != 0:
        raise DemoError(f"{settings.parent.name} could not join: {joined.stderr.strip()[-LOG_TAIL:]}")


def agent_process(places: Places, site: DemoSite, settings: Path) -> ProcessSpec:
    """Return a site's agent. What it runs would outlive it, as it must; the supervisor ends that with the market."""
    return ProcessSpec(
        name=site.site_id,
        argv=hansa("site", "run", "--settings", str(settings)),
        env=ONE_THREAD,
        cwd=places.site_home(site),
        stop_timeout_s=STOP_TIMEOUT_S,
    )
