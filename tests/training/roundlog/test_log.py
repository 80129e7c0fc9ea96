"""The log as a state machine: what no order of messages may bring about."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.exchange import SampleRange
from training.roundlog.contribution import Contribution, FragmentPart, Header, sign_contribution
from training.roundlog.credentials import new_attempt_key
from training.roundlog.errors import Reason, Refusal
from training.roundlog.log import ChainPage, RoundLog
from training.roundlog.manifest import SealedManifest, seal_manifest
from training.roundlog.ranges import RangeSet
from training.roundlog.sealing import choose_entries, seal_wait_s
from training.roundlog.signing import public_hex
from training.roundlog.view import GENESIS_HASH, Member, View

SITES = ("aachen", "bergen", "cadiz")
KEYS = {site_id: new_attempt_key() for site_id in SITES}
OUTER = "0a" * 32
EMPTY = hashlib.sha256().hexdigest()


def make_view(number: int, hub: str = "aachen", base: tuple[int, str] = (0, GENESIS_HASH), **changes: object) -> View:
    members = tuple(
        Member(site_id=site, epoch=1, gpus=1, attempt_key=public_hex(KEYS[site]), address=None, weight_max=100)
        for site in SITES
    )
    fields: dict[str, object] = {
        "job_id": "j",
        "number": number,
        "members": members,
        "hub": hub,
        "standby": None,
        "base_round": base[0],
        "base_hash": base[1],
        "base_reporter": "aachen" if number > 1 else None,
        "quorum": 1,
        "grace_s": 0.0,
        "issued_ms": 0,
    }
    return View.model_validate(fields | changes)


def contribution(
    view: View, round_number: int, site_id: str, previous: str, samples: tuple[SampleRange, ...], *, outer: str = OUTER
) -> Contribution:
    header = Header(
        job_id="j",
        view_number=view.number,
        round_number=round_number,
        site_id=site_id,
        epoch=1,
        digest=EMPTY,
        size_bytes=0,
        weight=1,
        samples=samples,
        fragments=(FragmentPart(size_bytes=0, digest=EMPTY),),
        previous_hash=previous,
        outer_hash=outer,
    )
    return sign_contribution(header, KEYS[site_id])


def make_log(site_id: str, view: View | None = None) -> RoundLog:
    log = RoundLog("j", site_id, contribution_bytes_max=100)
    if view is not None:
        log.install(view)
    return log


def sealed_by(
    view: View, round_number: int, previous: str, samples: tuple[SampleRange, ...], site_id: str = "bergen"
) -> SealedManifest:
    entry = contribution(view, round_number, site_id, previous, samples)
    return seal_manifest(view, round_number, previous, (entry,), KEYS[view.hub])


def refusal(log: RoundLog, sealed: SealedManifest) -> Reason:
    with pytest.raises(Refusal) as refused:
        log.append(log.open_next(sealed.document))
    return refused.value.reason


def test_seals_below_the_promise_are_refused() -> None:
    view = make_view(1)
    log = make_log("bergen", view)
    log.promise(2)
    assert refusal(log, sealed_by(view, 1, GENESIS_HASH, ())) is Reason.VIEW_OLDER
    with pytest.raises(Refusal):
        log.promise(1)
    with pytest.raises(Refusal):
        log.install(make_view(1, quorum=2))


def test_seal_must_come_from_the_hub_and_continue_the_chain() -> None:
    view = make_view(1)
    log = make_log("bergen", view)
    entry = contribution(view, 1, "bergen", GENESIS_HASH, ())
    assert refusal(log, seal_manifest(view, 1, GENESIS_HASH, (entry,), KEYS["cadiz"])) is Reason.SIGNATURE
    assert refusal(log, sealed_by(view, 2, GENESIS_HASH, ())) is Reason.ROUND_FUTURE
    # The entries fit, but the hub chained its manifest to another past.
    assert refusal(log, seal_manifest(view, 1, "ab" * 32, (entry,), KEYS["aachen"])) is Reason.EQUIVOCATION
    assert refusal(log, sealed_by(view, 1, "ab" * 32, ())) is Reason.EQUIVOCATION
    log.append(log.open_next(sealed_by(view, 1, GENESIS_HASH, ()).document))
    assert refusal(log, sealed_by(view, 1, GENESIS_HASH, ())) is Reason.ROUND_SEALED


def test_two_pasts_show_one_round_later() -> None:
    view = make_view(1)
    log = make_log("bergen", view)
    told_to_bergen = sealed_by(view, 1, GENESIS_HASH, (SampleRange(0, 8),))
    told_to_cadiz = sealed_by(view, 1, GENESIS_HASH, (SampleRange(8, 16),))
    log.append(log.open_next(told_to_bergen.document))
    from_cadiz = contribution(view, 2, "cadiz", told_to_cadiz.manifest_hash, ())
    later = seal_manifest(view, 2, told_to_bergen.manifest_hash, (from_cadiz,), KEYS["aachen"])
    assert refusal(log, later) is Reason.EQUIVOCATION
    (report,) = log.equivocations
    assert (report.site_id, report.named) == ("cadiz", told_to_cadiz.manifest_hash)


def test_done_samples_are_not_sealed_again() -> None:
    view = make_view(1)
    log = make_log("bergen", view)
    log.append(log.open_next(sealed_by(view, 1, GENESIS_HASH, (SampleRange(0, 8),)).document))
    assert refusal(log, sealed_by(view, 2, log.chain_hash, (SampleRange(7, 9),))) is Reason.SAMPLES_OVERLAP


def test_base_is_reached_only_by_the_chain_that_the_broker_signed() -> None:
    view = make_view(1)
    ahead = make_log("aachen", view)
    for round_number in (1, 2):
        ahead.append(
            sealed_by(view, round_number, ahead.chain_hash, (SampleRange(8 * round_number, 8 * round_number + 8),))
        )
    behind = make_log("bergen", view)
    behind.install(make_view(2, base=(2, ahead.chain_hash)))
    assert behind.behind
    other = sealed_by(view, 1, GENESIS_HASH, ())
    forged = ChainPage(
        start_round=0,
        start_hash=GENESIS_HASH,
        manifests=(other.document, sealed_by(view, 2, other.manifest_hash, ()).document),
    )
    with pytest.raises(Refusal):
        behind.extend(forged)
    assert behind.sealed_round == 0
    assert behind.extend(ahead.chain_page(0, bytes_max=1)) is False
    assert behind.extend(ahead.chain_page(1, bytes_max=10**6))
    assert (behind.chain_hash, behind.done, behind.needs_snapshot) == (ahead.chain_hash, ahead.done, False)


def test_round_beyond_the_base_is_cut_and_calls_for_a_snapshot_if_applied() -> None:
    view = make_view(1)
    log = make_log("bergen", view)
    first = sealed_by(view, 1, GENESIS_HASH, ())
    log.append(first)
    log.append(sealed_by(view, 2, first.manifest_hash, (SampleRange(0, 8),)))
    log.applied(2, OUTER)
    log.install(make_view(2, base=(1, first.manifest_hash)))
    assert (log.sealed_round, log.needs_snapshot, log.done.count) == (1, True, 0)
    assert log.report(1, ()).sealed_round == 0


def test_quorum_and_grace_decide_when_to_seal() -> None:
    view = make_view(1, quorum=2, grace_s=5.0)
    assert seal_wait_s(view, {"aachen": 1.0}, 100.0) is None
    assert seal_wait_s(view, {"aachen": 1.0, "bergen": 3.0}, 4.0) == 4.0
    assert seal_wait_s(view, {"aachen": 1.0, "bergen": 3.0}, 8.0) == 0.0
    assert seal_wait_s(view, {"aachen": 1.0, "bergen": 3.0, "cadiz": 3.5}, 3.5) == 0.0


@pytest.mark.parametrize(
    ("outer", "sealed"),
    [
        ({"aachen": "a", "bergen": "b", "cadiz": "b"}, ["bergen", "cadiz"]),
        ({"aachen": "b", "bergen": "a"}, ["aachen"]),
        ({"bergen": "a", "cadiz": "b"}, ["bergen"]),
    ],
)
def test_most_sites_are_believed_then_the_hub_then_the_first(outer: dict[str, str], sealed: list[str]) -> None:
    view = make_view(1)
    entries = {site: contribution(view, 1, site, GENESIS_HASH, (), outer=name * 64) for site, name in outer.items()}
    choice = choose_entries(view, entries, RangeSet())
    assert [entry.header.site_id for entry in choice.sealed] == sealed
    assert {report.site_id for report in choice.equivocations} == set(outer) - set(sealed)


ranges = st.builds(lambda start, size: SampleRange(start, start + size), st.integers(0, 30), st.integers(1, 6))


@given(st.lists(ranges, max_size=12), st.lists(ranges, max_size=4))
def test_range_sets_agree_with_plain_sets(held: list[SampleRange], asked: list[SampleRange]) -> None:
    samples = {number for part in held for number in range(part.start, part.stop)}
    ranged = RangeSet().union(held)
    assert ranged.count == len(samples)
    first = next((part for part in asked if samples & set(range(part.start, part.stop))), None)
    assert ranged.overlaps(asked) == first


@dataclass
class World:
    """Three logs, a broker that opens views, hubs that may lie, and everything that ever counted."""

    logs: dict[str, RoundLog] = field(default_factory=lambda: {site: make_log(site, make_view(1)) for site in SITES})
    view: View = field(default_factory=lambda: make_view(1))
    applied: dict[tuple[str, int], str] = field(default_factory=dict)

    def offer(self, hub: str, targets: list[str], samples: SampleRange, author: str) -> None:
        """Let the hub of its log's view seal its next round and tell only `targets`."""
        source = self.logs[hub]
        view = source.view
        assert view is not None
        if view.hub != hub:
            return
        sealed = sealed_by(view, source.sealed_round + 1, source.chain_hash, (samples,), author)
        for target in targets:
            log = self.logs[target]
            try:
                log.append(log.open_next(sealed.document))
            except Refusal:
                continue

    def open_view(self, promisers: list[str], installers: list[str], hub: str) -> None:
        """Change the view with the promises of some, and let only some hear of the result."""
        number = self.view.number + 1
        reports = {}
        for site in promisers:
            self.logs[site].promise(number)
            reports[site] = self.logs[site].report(self.logs[site].sealed_round, ())
        reporter = max(reports, key=lambda site: reports[site].sealed_round)
        base = (reports[reporter].sealed_round, reports[reporter].chain_hash)
        self.view = make_view(number, hub, base, base_reporter=reporter)
        page = self.logs[reporter].chain_page(0, bytes_max=10**9)
        for site in installers:
            self.logs[site].install(self.view)
            self.logs[site].extend(page)
            if self.logs[site].needs_snapshot:
                self.logs[site].restored(base[0], OUTER)

    def check(self) -> None:
        """Look for two seals of one round in one view, and for samples that count twice."""
        for site, log in self.logs.items():
            hashes = {}
            seen: set[int] = set()
            for sealed in log.manifests_after(0):
                hashes[sealed.round_number] = sealed.manifest_hash
                named = [n for e in sealed.contributions for p in e.header.samples for n in range(p.start, p.stop)]
                assert not seen & set(named)
                seen |= set(named)
            assert log.done.count == len(seen) == sum(log.samples_by_site.values())
            assert log.hash_at(log.sealed_round) == log.chain_hash, site
        # Whoever is in the newest view and has caught up shares its base, and whatever follows it is one chain
        # as far as it was told the same: the base is in every such log.
        for log in self.logs.values():
            if log.view == self.view and not log.behind:
                assert log.hash_at(self.view.base_round) == self.view.base_hash


site_lists = st.lists(st.sampled_from(SITES), min_size=1, max_size=3, unique=True)
offers = st.tuples(st.just("offer"), st.sampled_from(SITES), site_lists, ranges, st.sampled_from(SITES))
views = st.tuples(st.just("view"), site_lists, site_lists, st.sampled_from(SITES))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(offers, views), max_size=14))
def test_no_order_of_messages_counts_a_sample_twice_or_leaves_the_base(steps: list[tuple[object, ...]]) -> None:
    world = World()
    for step in steps:
        if step[0] == "offer":
            world.offer(*step[1:])  # type: ignore[arg-type]
        else:
            world.open_view(*step[1:])  # type: ignore[arg-type]
        world.check()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(offers, views), max_size=14))
def test_round_known_to_anyone_who_promised_keeps_its_hash(steps: list[tuple[object, ...]]) -> None:
    """With an honest hub and all members at each opening, no round ever has two seals, whoever heard of them."""
    world = World()
    settled: dict[int, str] = {}
    for step in steps:
        if step[0] == "offer":
            # The hub takes its own seal first; where it may not, it tells nobody.
            hub = step[1]
            before = world.logs[hub].sealed_round  # type: ignore[index]
            world.offer(hub, [hub], step[3], step[4])  # type: ignore[list-item, arg-type]
            newest = world.logs[hub].manifest(before + 1)  # type: ignore[index]
            for target in step[2]:  # type: ignore[attr-defined]
                if newest is not None and target != hub:
                    with contextlib.suppress(Refusal):
                        world.logs[target].append(world.logs[target].open_next(newest.document))
        else:
            world.open_view(list(SITES), step[2], step[3])  # type: ignore[arg-type]
        world.check()
        for log in world.logs.values():
            for sealed in log.manifests_after(0):
                assert settled.setdefault(sealed.round_number, sealed.manifest_hash) == sealed.manifest_hash


def test_joiner_without_state_is_not_waited_for() -> None:
    view = make_view(1, quorum=3, grace_s=5.0)
    assert seal_wait_s(view, {"aachen": 1.0, "bergen": 1.0}, 2.0) is None
    assert seal_wait_s(view, {"aachen": 1.0, "bergen": 1.0}, 2.0, stateless={"cadiz"}) == 0.0
    assert seal_wait_s(view, {}, 2.0, stateless=set(SITES)) is None
