"""The figures for Prometheus are of all the processes that serve, whichever of them is asked."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import httpx

from broker.supervise.processes import ProcessSpec, Supervisor
from tests.broker.api.conftest import World

WORKERS = 2
REQUESTS = 60


def test_figures_are_of_all_workers_and_never_fall(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return httpx.get(f"{url}/metrics", trust_env=False, timeout=30).status_code == 200
        except httpx.TransportError:
            return False

    bind = ("--bind", f"127.0.0.1:{port}", "--workers", str(WORKERS), "--threads", "1", "--plain-http")
    argv = (sys.executable, "-m", "broker.cli.main", "broker", "serve", *bind)
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    killed = home / "figures-4194305"  # no process has a number beyond the kernel's most: its master was killed
    for folder in (killed, elsewhere):
        folder.mkdir(parents=True)
    env = {"HANSA_HOME": str(home), "HANSA_PUBLIC_URL": url, "TMPDIR": str(elsewhere)}
    supervisor = Supervisor(tmp_path / "logs")
    try:
        supervisor.start(
            ProcessSpec(
                name="api", argv=argv, cwd=Path(__file__).parents[3], env=env, ready=answers, ready_timeout_s=120
            )
        )
        for _ in range(REQUESTS):  # a connection each: any worker may take it
            assert httpx.get(f"{url}/healthz", trust_env=False, timeout=30).status_code == 200
        counts = [_answered(httpx.get(f"{url}/metrics", trust_env=False, timeout=30).text) for _ in range(4 * WORKERS)]
        assert counts == [REQUESTS] * len(counts)
        assert len(list(home.glob("figures-*"))) == 1
        assert not killed.exists()
    finally:
        supervisor.stop()
    assert not list(home.glob("figures-*"))
    assert not list(elsewhere.glob("*figures*"))


def test_states_that_are_gone_are_no_longer_shown(world: World) -> None:
    def shown() -> set[str]:
        text = world.call("GET", "/metrics").text
        assert "hansa_round_age_seconds -1.0" in text
        return set(re.findall(r'hansa_sites\{state="(\w+)"\}', text))

    assert shown() == set()
    world.join("lyon")
    world.beat("lyon")
    assert shown() == {"live"}


def _answered(text: str) -> int:
    return sum(
        round(float(value))
        for labels, value in re.findall(r"^hansa_requests_total\{(.*)\} (\S+)$", text, re.MULTILINE)
        if 'route="/healthz"' in labels
    )
