"""Which links are probed: the least sure first, each site once at a time, within its bytes, and never in training's way."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from broker.links.choice import CONFIDENCE_ENOUGH, Chosen, ProbePair, ProbeSite, choose

HOUR_MS = 3_600_000
NOW_MS = 1000 * HOUR_MS
GB = 10**9


def site(site_id: str, **changes: Any) -> ProbeSite:
    return ProbeSite(**{"site_id": site_id, "listens": True, "bytes_left": GB, "is_busy": False, **changes})


def pair(first: str, second: str, confidence: float = 0.0, tried_h: float = 10, megabits: float = 100) -> ProbePair:
    return ProbePair((first, second), megabits * 1e6, confidence, NOW_MS - round(tried_h * HOUR_MS))


def chosen(sites: list[ProbeSite], pairs: list[ProbePair], **changes: Any) -> list[Chosen]:
    terms = {"interval_s": 3600.0, "bytes_max": GB, **changes}
    return choose({each.site_id: each for each in sites}, pairs, NOW_MS, **terms)


def names(found: list[Chosen]) -> list[tuple[str, str]]:
    return [(each.dialler, each.listener) for each in found]


def test_the_least_sure_pair_comes_first_and_of_equals_the_one_left_alone_longest() -> None:
    sites = [site("ada"), site("bob"), site("cid")]
    pairs = [pair("ada", "bob", 0.5), pair("ada", "cid", 0.2, 2), pair("bob", "cid", 0.2, 3)]
    assert names(chosen(sites, pairs)) == [("cid", "bob")]


def test_a_site_takes_part_in_one_probe_at_a_time() -> None:
    sites = [site(name) for name in ("ada", "bob", "cid", "dee")]
    pairs = [pair("ada", "bob"), pair("ada", "cid", 0.1), pair("cid", "dee", 0.2)]
    assert names(chosen(sites, pairs)) == [("bob", "ada"), ("dee", "cid")]


def test_a_busy_site_is_left_in_peace() -> None:
    assert chosen([site("ada"), site("bob", is_busy=True)], [pair("ada", "bob")]) == []


def test_a_sure_pair_and_one_just_tried_are_left_alone() -> None:
    sites = [site("ada"), site("bob")]
    assert chosen(sites, [pair("ada", "bob", CONFIDENCE_ENOUGH)]) == []
    assert chosen(sites, [pair("ada", "bob", tried_h=0.9)]) == []
    assert chosen(sites, [pair("ada", "bob", tried_h=1.0)])


def test_a_site_that_only_dials_dials_and_two_of_them_cannot_be_probed() -> None:
    dials = [site("ada", listens=False), site("bob")]
    assert names(chosen(dials, [pair("ada", "bob")])) == [("ada", "bob")]
    assert chosen([site("ada", listens=False), site("bob", listens=False)], [pair("ada", "bob")]) == []


def test_a_probe_is_two_seconds_of_the_link_within_what_the_market_allows() -> None:
    sites = [site("ada"), site("bob")]
    assert chosen(sites, [pair("ada", "bob", megabits=100)])[0].bytes_max == 25_000_000
    assert chosen(sites, [pair("ada", "bob", megabits=0.1)])[0].bytes_max == 4_000_000
    assert chosen(sites, [pair("ada", "bob", megabits=10_000)], bytes_max=300_000_000)[0].bytes_max == 300_000_000


def test_a_site_without_bytes_left_for_both_directions_waits() -> None:
    pairs = [pair("ada", "bob", megabits=100)]
    assert chosen([site("ada"), site("bob", bytes_left=49_999_999)], pairs) == []
    assert chosen([site("ada"), site("bob", bytes_left=50_000_000)], pairs)


_SITES = [f"s{number}" for number in range(6)]


@settings(max_examples=100, deadline=None)
@given(
    busy=st.sets(st.sampled_from(_SITES)),
    quiet=st.sets(st.sampled_from(_SITES)),
    left=st.dictionaries(st.sampled_from(_SITES), st.integers(0, GB)),
    drawn=st.lists(st.tuples(st.permutations(_SITES), st.floats(0, 1), st.integers(0, 3)), max_size=15),
)
def test_whatever_stands_no_rule_is_broken(busy: set[str], quiet: set[str], left: dict[str, int], drawn: Any) -> None:
    sites = [
        site(name, is_busy=name in busy, listens=name not in quiet, bytes_left=left.get(name, GB)) for name in _SITES
    ]
    found = chosen(sites, [pair(*order[:2], confidence, hours) for order, confidence, hours in drawn])
    engaged = [name for each in found for name in (each.dialler, each.listener)]
    assert len(engaged) == len(set(engaged))
    assert not set(engaged) & busy
    assert not {each.listener for each in found} & quiet
    assert all(2 * each.bytes_max <= left.get(name, GB) for each in found for name in (each.dialler, each.listener))
