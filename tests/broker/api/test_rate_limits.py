"""One credential's bucket runs dry without another's, refills with time, and takes a bounded memory."""

from __future__ import annotations

import json

import pytest
from werkzeug.test import TestResponse

from broker.api import rate_limits
from broker.api.problems import PROBLEM_TYPE
from broker.api.rate_limits import BURST_S, KEYS_MAX, RateLimit, RateLimits
from broker.settings import Settings
from tests.broker.api.conftest import World, code_of
from training.clock import ManualClock


@pytest.fixture
def slow(world: World) -> World:
    """A market in which ten requests of a caller, and twenty of a site, are all at once."""
    settings = Settings(home=world.market.settings.home, requests_per_s=1, site_requests_per_s=2)
    world.app.extensions[rate_limits.EXTENSION] = RateLimits(settings, world.clock)
    return world


def statuses(answers: list[TestResponse]) -> list[int]:
    return [answer.status_code for answer in answers]


def test_a_token_that_asks_too_often_is_told_when_to_come_again(slow: World) -> None:
    answers = [slow.call("GET", "/v1/account", "acme") for _ in range(11)]
    assert statuses(answers) == [200] * 10 + [429]
    refused = answers[-1]
    assert (refused.content_type, code_of(refused)) == (PROBLEM_TYPE, "request.rate")
    assert refused.headers["Retry-After"] == "1"
    assert json.loads(refused.data)["request_id"] == refused.headers["X-Request-Id"]
    slow.clock.advance_s(1)
    assert statuses([slow.call("GET", "/v1/account", "acme") for _ in range(2)]) == [200, 429]


def test_one_callers_haste_is_not_anothers_wait(slow: World) -> None:
    while slow.call("GET", "/v1/account", "acme").status_code == 200:
        pass
    assert slow.call("GET", "/v1/account", "rival").status_code == 200
    assert slow.call("GET", "/v1/admin/tenants", "admin").status_code == 200
    assert slow.call("GET", "/v1/prices").status_code == 200
    # A token is asked for itself on routes that are open to anyone too.
    assert slow.call("GET", "/v1/prices", "acme").status_code == 429


def test_a_refused_post_leaves_no_key_behind_and_has_no_effect(slow: World) -> None:
    while slow.call("GET", "/v1/admin/tenants", "admin").status_code == 200:
        pass
    path = "/v1/admin/tenants/acme/deposit"
    assert slow.post(path, "admin", {"amount_micros": 7}, key="k").status_code == 429
    slow.clock.advance_s(5)
    assert slow.post(path, "admin", {"amount_micros": 7}, key="k").status_code == 200
    assert slow.call("GET", "/v1/account", "acme").get_json()["balance_micros"] == 7


def test_a_site_has_a_wider_bucket_of_its_own(slow: World) -> None:
    slow.join("lyon")
    assert statuses([slow.beat("lyon") for _ in range(21)]) == [200] * 20 + [429]
    slow.clock.advance_s(1)
    assert slow.beat("lyon").status_code == 200  # its sequence number was not spent by a refusal


def test_strangers_share_their_addresss_bucket_and_health_is_always_told(slow: World) -> None:
    assert statuses([slow.call("GET", "/v1/rounds") for _ in range(11)])[-1] == 429
    assert slow.call("GET", "/healthz").status_code == 200
    assert slow.client.get("/v1/rounds", environ_base={"REMOTE_ADDR": "192.0.2.7"}).status_code == 200


def test_agents_at_their_fastest_pace_and_people_who_watch_are_far_below_the_limits() -> None:
    settings = Settings()
    # A checkpoint of 4 MB chunks at 5 Gbit/s beside a heartbeat a second; a page that redraws five parts a second.
    assert settings.site_requests_per_s > 5e9 / 8 / 4e6 + 1
    assert settings.requests_per_s > 5


def test_a_bucket_refills_to_its_size_and_never_beyond() -> None:
    clock = ManualClock()
    limit = RateLimit(5, clock)
    clock.advance_s(3600)
    taken = 0
    while limit.take("a") == 0:
        taken += 1
    assert taken == 5 * BURST_S
    assert limit.take("a") == pytest.approx(0.2)


def test_memory_is_bounded_and_the_longest_quiet_is_forgotten_first() -> None:
    limit = RateLimit(0.1, ManualClock())
    assert limit.take("first") == 0
    assert limit.take("first") > 0
    for number in range(KEYS_MAX - 1):
        limit.take(f"other-{number}")
    assert limit.take("first") > 0
    for number in range(KEYS_MAX):
        limit.take(f"more-{number}")
    assert len(limit._buckets) == KEYS_MAX
    assert limit.take("first") == 0
