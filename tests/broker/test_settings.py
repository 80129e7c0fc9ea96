"""Settings under which a GPU could serve two, good work end or nothing be reached are refused with a sentence."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from broker.settings import Settings
from sites.drivers.warden import GRACE_EXPIRED_S


def test_the_broker_waits_longer_than_a_site_takes_to_kill_what_expired() -> None:
    with pytest.raises(ValidationError, match="liveness_margin_s"):
        Settings(liveness_margin_s=GRACE_EXPIRED_S + 0.9)
    assert Settings(liveness_margin_s=GRACE_EXPIRED_S + 1).liveness_margin_s == 3


def test_a_liveness_spans_three_heartbeats() -> None:
    with pytest.raises(ValidationError, match="set HANSA_LIVENESS_S to 180 or more"):
        Settings(heartbeat_s=60, liveness_s=5)
    with pytest.raises(ValidationError, match="set HANSA_LIVENESS_S to 15 or more"):
        Settings(heartbeat_s=5, liveness_s=14.9)
    assert Settings(heartbeat_s=5, liveness_s=15).liveness_s == 15


@pytest.mark.parametrize("dialect", ["postgresql", "postgresql+pg8000", "postgres"])
def test_a_database_that_no_driver_here_reaches_is_refused_with_the_one_that_does(dialect: str) -> None:
    with pytest.raises(ValidationError, match=r"write postgresql\+psycopg://") as refused:
        Settings(database_url=f"{dialect}://hansa:secret@127.0.0.1/hansa")
    assert "secret" not in str(refused.value)
    assert Settings(database_url="postgresql+psycopg://hansa@127.0.0.1/hansa").database_url
