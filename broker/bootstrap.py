"""Opens a market from its settings: what every process of the broker does first."""

from __future__ import annotations

from broker import ledger
from broker.artifacts import ArtifactStore
from broker.celery_doorbell import CeleryDoorbell
from broker.database.engine import Database
from broker.database.schema import upgrade
from broker.doorbell import Doorbell, SilentDoorbell
from broker.identity.authority import Authority
from broker.ids import RandomIds
from broker.market import Market
from broker.settings import Settings
from training.clock import Clock, SystemClock


def open_market(settings: Settings, *, clock: Clock | None = None, doorbell: Doorbell | None = None) -> Market:
    """Make what is missing (home, keys, schema) and return the market.

    Without a `redis_url` nothing rings: everything goes at the pace of beat and polling.
    """
    clock = clock or SystemClock()
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    database = Database(settings.resolved_database_url)
    upgrade(database)
    database.write("open accounts", lambda session: ledger.open_accounts(session, clock.now_ms()))
    return Market(
        settings=settings,
        database=database,
        clock=clock,
        ids=RandomIds(),
        authority=Authority(settings.home, clock),
        artifacts=ArtifactStore(settings.home / "artifacts"),
        doorbell=doorbell or _doorbell(settings),
    )


def _doorbell(settings: Settings) -> Doorbell:
    return CeleryDoorbell(settings.redis_url) if settings.redis_url else SilentDoorbell()
