"""A ring costs next to nothing, whether or not Redis is there: heartbeats and submits wait for it."""

from __future__ import annotations

import signal
import tempfile
import time
from pathlib import Path

import pytest

from broker.celery_doorbell import REDIS_WAIT_S, CeleryDoorbell
from broker.supervise.processes import Supervisor
from broker.supervise.valkey import resolve


def ring_everything(doorbell: CeleryDoorbell) -> None:
    doorbell.ring_round()
    doorbell.wake_site("bergen")
    doorbell.wake_watchers("job_1")


def test_rings_to_a_lost_redis_are_dropped_at_once(tmp_path: Path) -> None:
    doorbell = CeleryDoorbell(f"unix://{tmp_path}/nobody.sock")
    ring_everything(doorbell)  # loads what Celery loads late
    begun_s = time.monotonic()
    ring_everything(doorbell)
    # Kombu's own retries would take six seconds; a busy machine takes some of the rest.
    assert time.monotonic() - begun_s < 4.0


@pytest.mark.xdist_group("serial")
def test_rings_to_a_redis_that_hangs_are_dropped_within_their_wait(tmp_path: Path) -> None:
    # Not pytest's own folder: its path may be too long for a socket.
    with tempfile.TemporaryDirectory(prefix="hansa-hang-") as folder, Supervisor(tmp_path) as supervisor:
        source = resolve({}, Path(folder))
        assert source.process is not None
        supervisor.start(source.process)
        doorbell = CeleryDoorbell(source.url)
        ring_everything(doorbell)
        supervisor.kill("valkey", signal.SIGSTOP)
        begun_s = time.monotonic()
        ring_everything(doorbell)
        lasted_s = time.monotonic() - begun_s
        supervisor.kill("valkey", signal.SIGCONT)
        assert lasted_s < 4 * 2 * REDIS_WAIT_S + 1.0
