"""Full rounds between real gateway processes on loopback."""

from __future__ import annotations

from training.exchange import SampleRange

from .conftest import Federation, run_round


def test_two_sites_seal_the_same_rounds(federation: Federation) -> None:
    one, two = federation.start("aachen", "bergen")
    federation.open(one, two, hub=one)
    for round_number in (1, 2, 3):
        here, there = run_round(round_number, one, two)
        assert here.manifest_hash == there.manifest_hash
        assert [entry.site_id for entry in here.entries] == ["aachen", "bergen"]
    statuses = [site.control.status() for site in (one, two)]
    assert {status.chain_hash for status in statuses} == {statuses[0].chain_hash}
    assert {status.outer_hash for status in statuses} == {statuses[0].outer_hash}
    assert statuses[0].samples_done == 3 * 2 * 8
    assert statuses[1].samples_by_site == {"aachen": 24, "bergen": 24}
    assert one.client.position().done == statuses_done(3)


def statuses_done(rounds: int) -> tuple[SampleRange, ...]:
    return tuple(SampleRange(number * 80, number * 80 + 16) for number in range(1, rounds + 1))
