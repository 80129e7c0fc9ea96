"""Settings under which a GPU could serve two, or a late heartbeat end good work, are refused with a sentence."""

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
