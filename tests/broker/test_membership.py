"""Which view a job needs: a pure decision over what peers and market last heard of each site."""

from __future__ import annotations

from dataclasses import replace

import pytest

from broker.membership import Change, Membership, Patience, Standing, needed_change

PATIENCE = Patience(absent_s=1.0, hub_lost_s=6.0, heartbeat_s=5.0)
NOW = Membership(
    sites=("ada", "bob", "cid"),
    hub="ada",
    is_issued=True,
    issued_number=4,
    issued_sites=("ada", "bob", "cid"),
    issued_hub="ada",
    standby="cid",
)


def site(name: str, *, unheard_s: float = 0.3, listens: bool = True, **gateway: object) -> Standing:
    return Standing(name, listens, unheard_s, **{"view_number": 4, **gateway})


def complaining(name: str, hub_lost_s: float = 1.0, **fields: object) -> Standing:
    return site(name, hub_lost_s=hub_lost_s, **fields)


def test_view_that_fits_stands() -> None:
    assert needed_change(NOW, [site("ada"), site("bob", unheard_s=5.5), site("cid")], PATIENCE) is None


def test_standby_takes_over_from_a_hub_that_neither_peers_nor_market_reach() -> None:
    gang = [site("ada", unheard_s=1.0), complaining("bob"), complaining("cid")]
    change = needed_change(NOW, gang, PATIENCE)
    assert change == Change(("bob", "cid"), "cid", "neither its peers nor the market reach ada")


@pytest.mark.parametrize(
    "gang",
    [
        [site("ada", unheard_s=0.9), complaining("bob"), complaining("cid")],
        [site("ada", unheard_s=9.0), complaining("bob"), site("cid")],
        [site("ada", unheard_s=9.0), complaining("bob", 0.9), complaining("cid", 0.9)],
        [site("ada", unheard_s=9.0), complaining("bob", view_number=3), complaining("cid", view_number=3)],
        [site("ada", unheard_s=9.0), site("bob"), site("cid")],
    ],
    ids=["market hears it", "no majority", "not for long", "of an older view", "only its agent is dead"],
)
def test_hub_that_may_be_alive_stays(gang: list[Standing]) -> None:
    assert needed_change(NOW, gang, PATIENCE) is None


def test_hub_that_the_market_hears_moves_later_and_stays_a_member() -> None:
    lost = [site("ada"), complaining("bob", 5.9), complaining("cid", 5.9)]
    assert needed_change(NOW, lost, PATIENCE) is None
    lost = [site("ada"), complaining("bob", 6.0), complaining("cid", 6.0)]
    change = needed_change(NOW, lost, PATIENCE)
    assert change is not None
    assert (change.sites, change.hub) == (("ada", "bob", "cid"), "cid")


def test_silent_member_is_left_out_once_the_hub_has_missed_it() -> None:
    hub = site("ada", members_lost_s={"cid": 6.0})
    change = needed_change(NOW, [hub, site("bob"), site("cid", unheard_s=6.0)], PATIENCE)
    assert change is not None
    assert (change.sites, change.hub) == (("ada", "bob"), "ada")
    for calm in (
        [hub, site("bob"), site("cid", unheard_s=5.9)],
        [site("ada", members_lost_s={"cid": 5.9}), site("bob"), site("cid", unheard_s=60.0)],
        [site("ada"), site("bob"), site("cid", unheard_s=60.0)],
    ):
        assert needed_change(NOW, calm, PATIENCE) is None


def test_last_survivor_goes_on_when_hub_and_member_fall_silent_together() -> None:
    gang = [site("ada", unheard_s=6.0), complaining("bob", 6.0), site("cid", unheard_s=6.0)]
    change = needed_change(NOW, gang, PATIENCE)
    assert change is not None
    assert (change.sites, change.hub) == (("bob",), "bob")


def test_nobody_takes_over_who_does_not_listen() -> None:
    gang = [site("ada", unheard_s=6.0), complaining("bob", listens=False), complaining("cid", listens=False)]
    assert needed_change(NOW, gang, PATIENCE) is None


def test_member_without_a_lease_is_out_at_once() -> None:
    change = needed_change(NOW, [site("bob"), site("cid")], PATIENCE)
    assert change == Change(("bob", "cid"), "cid", "lost ada")


REDUCED = replace(NOW, sites=("bob", "cid"), hub="cid", issued_sites=("bob", "cid"), issued_hub="cid", standby="bob")


def test_site_that_is_heard_again_comes_back_without_being_the_hub() -> None:
    change = needed_change(REDUCED, [site("ada", view_number=3), site("bob"), site("cid")], PATIENCE)
    assert change == Change(("ada", "bob", "cid"), "cid", "ada is back")


@pytest.mark.parametrize(
    "ada",
    [site("ada", unheard_s=1.0), site("ada", view_number=None)],
    ids=["silent", "its gateway does not answer"],
)
def test_site_that_is_not_back_stays_out(ada: Standing) -> None:
    assert needed_change(REDUCED, [ada, site("bob"), site("cid")], PATIENCE) is None


def test_nobody_joins_while_a_view_is_promised() -> None:
    promising = replace(REDUCED, is_issued=False, issued_sites=NOW.sites, issued_hub="ada")
    gang = [site("ada"), site("bob"), site("cid")]
    assert needed_change(promising, gang, PATIENCE) is None


def test_promise_is_not_waited_for_from_a_hub_that_falls_silent_meanwhile() -> None:
    promising = replace(NOW, is_issued=False, hub="cid")
    gang = [site("ada", unheard_s=1.2), complaining("bob", 3.0), complaining("cid", 3.0)]
    change = needed_change(promising, gang, PATIENCE)
    assert change is not None
    assert (change.sites, change.hub) == (("bob", "cid"), "cid")


def test_there_is_no_view_of_those_alone_who_missed_the_last_one() -> None:
    assert needed_change(REDUCED, [site("ada")], PATIENCE) is None
