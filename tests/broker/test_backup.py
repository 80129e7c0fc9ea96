"""A market that is written away in the middle of its work comes back sound, on either engine."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import func, select

from broker.audit import audit
from broker.backup import MANIFEST_FILE, BackupError, back_up, restore
from broker.bootstrap import open_market
from broker.database.tables import Event, Job, MarketState, Transfer
from broker.freeze import set_frozen
from broker.settings import Settings
from broker.submit import submit_job
from tests.broker.speaking import Scene, spec
from tests.simulation.founding import TENANT_ID
from training.clock import ManualClock

WRITES_BEFORE = 3


@pytest.fixture(params=["sqlite", "postgresql"])
def target_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'restored.sqlite3'}"
    server = request.getfixturevalue("postgres_server")
    return str(server.url(server.create_database()))


def test_a_backup_taken_under_writes_restores_to_a_sound_market(scene: Scene, tmp_path: Path, target_url: str) -> None:
    running = scene.submit()
    (site,) = scene.start(running)
    site.meter(site.order(), 1000)
    site.beat()
    scene.market.artifacts.put_bytes(b"a checkpoint")
    stop, began, made = threading.Event(), threading.Event(), []

    def write() -> None:
        while not stop.is_set():
            made.append(submit_job(scene.market, TENANT_ID, spec(1, budget=1_000)).job_id)
            if len(made) == WRITES_BEFORE:
                began.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert began.wait(30)
    taken = back_up(scene.market, tmp_path / "backup")
    stop.set()
    writer.join()

    settings = Settings(home=tmp_path / "other-home", database_url=target_url)
    assert restore(settings, tmp_path / "backup", ManualClock()) == taken
    market = open_market(settings, clock=scene.clock)
    try:
        assert market.database.read(audit) == []
        jobs = market.database.read(lambda session: set(session.scalars(select(Job.job_id))))
        assert running in jobs
        assert WRITES_BEFORE <= len(jobs & set(made)) <= len(made)
        assert market.authority.ca_pem == scene.market.authority.ca_pem
        assert market.authority.derive_key("wake") == scene.market.authority.derive_key("wake")
        digest = scene.market.artifacts.put_bytes(b"a checkpoint")
        assert market.artifacts.get_bytes(digest) == b"a checkpoint"
        # It lives on: frozen until an admin says so, then new rows find new numbers.
        assert market.database.read(lambda session: session.get_one(MarketState, 1).frozen_ms) is not None
        assert set_frozen(market, frozen=False, reason="leases have run out")
        submit_job(market, TENANT_ID, spec(1, budget=1_000))
        assert market.database.read(audit) == []
    finally:
        market.database.close()


def test_rows_come_back_as_they_were(scene: Scene, tmp_path: Path) -> None:
    (site,) = scene.start(scene.submit())
    site.meter(site.order(), 1000)
    site.beat()
    back_up(scene.market, tmp_path / "backup")
    settings = Settings(home=tmp_path / "other-home", database_url="")
    restore(settings, tmp_path / "backup", ManualClock())
    market = open_market(settings, clock=scene.clock)
    try:
        for table in (Transfer, Job):
            rows = [
                scene.market.database.read(lambda s, t=table: _rows(s, t)),
                market.database.read(lambda s, t=table: _rows(s, t)),
            ]
            assert rows[0] == rows[1]
            assert rows[0]
        events = scene.market.database.read(lambda session: session.scalar(select(func.count()).select_from(Event)))
        assert (
            market.database.read(lambda session: session.scalar(select(func.count()).select_from(Event))) == events + 1
        )
    finally:
        market.database.close()


def test_a_backup_that_was_broken_off_is_refused(scene: Scene, tmp_path: Path) -> None:
    back_up(scene.market, tmp_path / "backup")
    (tmp_path / "backup" / MANIFEST_FILE).unlink()
    with pytest.raises(BackupError, match="no whole backup"):
        restore(Settings(home=tmp_path / "other-home"), tmp_path / "backup", ManualClock())


def test_nothing_is_restored_over_a_market(scene: Scene, tmp_path: Path) -> None:
    back_up(scene.market, tmp_path / "backup")
    with pytest.raises(BackupError, match="holds a market already"):
        restore(scene.market.settings, tmp_path / "backup", ManualClock())
    settings = Settings(home=tmp_path / "other-home", database_url=scene.market.database.url)
    with pytest.raises(BackupError, match="HANSA_DATABASE_URL"):
        restore(settings, tmp_path / "backup", ManualClock())
    with pytest.raises(BackupError, match="is there already"):
        back_up(scene.market, tmp_path / "backup")


def _rows(session: object, table: type) -> list[dict[str, object]]:
    return [dict(row) for row in session.execute(select(table.__table__)).mappings()]  # type: ignore[attr-defined]
