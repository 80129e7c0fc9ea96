"""How a simulated market begins: keys and schema once for all worlds, then tenant, workdir and sites."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy.orm import Session

from broker import ledger
from broker.database.engine import Database
from broker.database.schema import upgrade
from broker.database.tables import Artifact, Site, Tenant
from broker.database.uploads import WorkdirUpload
from broker.identity.authority import Authority
from broker.transitions import SiteState, change_state
from sites.protocol import Offer
from training.clock import ManualClock

if TYPE_CHECKING:
    from tests.simulation.world import World

TENANT_ID: Final = "acme"
WORKDIR: Final = "ab" * 32


def make_template(folder: Path) -> Path:
    """Make what all worlds share: an empty schema and the market's keys."""
    database = Database(f"sqlite:///{folder / 'market.sqlite3'}")
    upgrade(database)
    database.close()
    Authority(folder, ManualClock()).authority_key  # noqa: B018  made on first use
    return folder


def found(world: World) -> None:
    """Write what every market starts with: accounts, a tenant with money, a workdir, the sites."""

    def work(session: Session) -> None:
        now_ms = world.clock.now_ms()
        ledger.open_accounts(session, now_ms)
        session.add(Tenant(tenant_id=TENANT_ID, name="Acme", created_ms=now_ms))
        session.flush()
        ledger.open_tenant(session, TENANT_ID, now_ms)
        ledger.deposit(session, TENANT_ID, 10**12, "first", now_ms)
        ledger.fund_equity(session, 10**9, "first", now_ms)
        session.add(Artifact(digest=WORKDIR, size_bytes=100, complete=True, created_ms=now_ms))
        session.flush()
        session.add(WorkdirUpload(tenant_id=TENANT_ID, digest=WORKDIR, created_ms=now_ms))
        for site_id in world.site_ids:
            site = Site(
                site_id=site_id,
                state="",
                version=0,
                offer=Offer(pools=()).model_dump_json(),
                sequence_max=0,
                sequence_seen="0",
                heartbeat_sequence=0,
                joined_ms=now_ms,
            )
            session.add(site)
            change_state(session, site, SiteState.LIVE, now_ms=now_ms)
            session.flush()
            ledger.open_site(session, site_id, now_ms)

    world.market.database.write("found", work)
