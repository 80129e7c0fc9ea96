"""The admins' page of links shows what the market counts with and how old it is, and names what is wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import delete
from sqlalchemy.orm import Session

from broker.database.probes import LinkMeasurement, LinkProbe
from tests.broker.portal.conftest import Client
from tests.broker.portal.scene import HOSTILE, Scene

pytestmark = pytest.mark.xdist_group("portal")


@pytest.fixture
def measured(scene: Scene) -> Iterator[Scene]:
    """Let one direction be measured two hours ago, and the other pair's newest probe have failed."""
    now_ms = scene.clock.now_ms()

    def write(session: Session) -> None:
        session.add(
            LinkMeasurement(
                source="bremen",
                target="danzig",
                probe_id="probe_a",
                measured_ms=now_ms - 7_200_000,
                bandwidth_bits_per_s=3.45e8,
                delay_s=0.033,
                loss=0.002,
                sent_bits_per_s=9e8,
                received_bits_per_s=3.45e8,
                disagreement=f"bremen says 900 Mbit/s went, danzig that 345 came {HOSTILE}",
            )
        )
        failed = {"state": "failed", "detail": "lubeck did not answer in time", "ended_ms": now_ms}
        times = {"asked_ms": now_ms - 60_000, "expires_ms": now_ms}
        session.add(
            LinkProbe(
                probe_id="probe_b", dialler="lubeck", listener="bremen", bytes_max=1, bytes_charged=2, **failed, **times
            )
        )

    scene.market.database.write("measure", write)
    yield scene
    for table in (LinkMeasurement, LinkProbe):
        scene.market.database.write("forget", lambda session, table=table: session.execute(delete(table)))


def test_the_matrix_shows_what_counts_with_its_age_and_the_list_names_what_is_wrong(
    measured: Scene, client_of: dict[str, Client]
) -> None:
    text = client_of["root"].client.get("/admin/links").text
    assert '345.0 Mbit/s <span class="quiet">33 ms, 2 h old</span>' in text
    assert '1.0 Gbit/s <span class="quiet">20 ms, declared</span>' in text
    assert "danzig that 345 came" in text
    assert "the newest probe failed: lubeck did not answer in time" in text
    assert HOSTILE not in text


def test_only_admins_see_the_links(measured: Scene, client_of: dict[str, Client]) -> None:
    assert client_of["ada"].client.get("/admin/links").status_code in {302, 303, 403, 404}
