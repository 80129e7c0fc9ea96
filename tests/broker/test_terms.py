"""A report of usage is charged at the price of the term in which its GPUs ran, to the micro-credit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from broker.database.tables import Lease, UsageReport
from broker.database.terms import Term
from broker.invoices import invoice
from broker.rounds.snapshot import renewal_starts_ms
from broker.terms import Span, split
from sites.protocol import ExitCause, Usage
from tests.broker.speaking import ASK, TERM_S, Scene, SpeakingSite

ALL = ("ada", "bob", "cid")
DEARER = 3 * ASK
GPUS = 2


def test_usage_before_the_end_of_a_term_keeps_its_price_though_the_renewal_was_committed(scene: Scene) -> None:
    job_id, ada = _renewed(scene)
    order = ada.order()
    assert order.price_micros_per_gpu_hour == DEARER
    ada.meter(order, GPUS * 40_000)
    ada.beat()
    assert scene.hold(job_id).posted_micros == _cost(40_000, ASK)
    _until_the_end_of_the_first_term(scene, job_id)
    ada.meter(order, GPUS * (TERM_S * 1000 - 40_000), 2)
    ada.beat()
    assert scene.hold(job_id).posted_micros == _cost(40_000, ASK) + _cost(20_000, ASK)
    scene.clock.advance_s(5)
    ada.meter(order, GPUS * 5_000, 3)
    ada.beat()
    assert scene.hold(job_id).posted_micros == _cost(40_000, ASK) + _cost(20_000, ASK) + _cost(5_000, DEARER)


def test_a_report_that_straddles_the_end_of_a_term_is_split_there(scene: Scene) -> None:
    job_id, ada = _renewed(scene)
    _until_the_end_of_the_first_term(scene, job_id)
    scene.pass_s(4, *ALL)
    ada.meter(ada.order(), GPUS * 10_000)
    ada.beat()
    rows = scene.read(select(UsageReport).order_by(UsageReport.term))
    assert [(row.sequence, row.term, row.gpu_milliseconds) for row in rows] == [
        (1, 1, GPUS * 6_000),
        (1, 2, GPUS * 4_000),
    ]
    assert [row.charge_micros for row in rows] == [_cost(6_000, ASK), _cost(4_000, DEARER)]
    paper = scene.market.database.read(lambda session: invoice(session, job_id))
    assert [(line.price_micros_per_gpu_hour, line.gpu_milliseconds) for line in paper.lines] == [
        (ASK, GPUS * 6_000),
        (DEARER, GPUS * 4_000),
    ]
    assert paper.total_micros == paper.posted_micros == scene.hold(job_id).posted_micros


def test_a_report_that_is_late_is_charged_by_when_it_ended_on_its_sites_own_clock(scene: Scene) -> None:
    job_id, ada = _renewed(scene)
    _until_the_end_of_the_first_term(scene, job_id)
    scene.pass_s(5, *ALL)
    skew_ms = 123_456_789  # the site's clock is wrong by more than a day
    ada.meter(ada.order(), GPUS * 3_000)
    ((lease_id, (row,)),) = ada.usage.items()
    sent_ms = scene.clock.now_ms() - skew_ms
    late = row.model_copy(update={"ended_ms": sent_ms - 5_000})
    ada.say(usage=(late,), sent_ms=sent_ms, attempts=tuple(ada.reports.values()))
    assert scene.hold(job_id).posted_micros == _cost(3_000, ASK)
    # The same report again is acknowledged and not split or paid anew.
    again = ada.say(usage=(late,), sent_ms=sent_ms + 1, attempts=tuple(ada.reports.values()))
    assert again.usage_acknowledged == {lease_id: 1}
    assert scene.hold(job_id).posted_micros == _cost(3_000, ASK)


def test_a_straddling_report_that_comes_again_is_known_and_another_of_its_number_is_refused(scene: Scene) -> None:
    job_id, ada = _renewed(scene)
    _until_the_end_of_the_first_term(scene, job_id)
    scene.pass_s(4, *ALL)
    ada.meter(ada.order(), GPUS * 10_000)
    ((lease_id, (row,)),) = ada.usage.items()
    ada.beat()
    posted = scene.hold(job_id).posted_micros
    assert ada.say(usage=(row,), attempts=tuple(ada.reports.values())).usage_acknowledged == {lease_id: 1}
    other = row.model_copy(update={"gpu_milliseconds": GPUS * 6_000})  # what stands in one of its rows
    (refusal,) = ada.say(usage=(other,), attempts=tuple(ada.reports.values())).refusals
    assert refusal.code == "usage.conflict"
    assert scene.hold(job_id).posted_micros == posted


def test_reports_follow_one_another_whatever_delays_them_and_a_whole_term_is_paid_whole(scene: Scene) -> None:
    _, ada = _renewed(scene)
    # Every second report is on its way for a while: none of that moves usage over the end of the term.
    for number in range(1, 41):
        delay_ms = 0 if number % 2 else 700
        started = scene.read(select(Term).where(Term.number == 1))[0].starts_ms
        assert started is not None
        arrives_ms = started + number * 2_000 + delay_ms
        if arrives_ms > scene.clock.now_ms():
            scene.clock.advance_s((arrives_ms - scene.clock.now_ms()) / 1000)
        ada.meter(ada.order(), GPUS * 2_000, number)
        ada.beat()
    first, second = scene.read(select(Term).order_by(Term.number))
    delivered = {
        term: sum(row.gpu_milliseconds for row in scene.read(select(UsageReport).where(UsageReport.term == term)))
        for term in (1, 2)
    }
    assert delivered == {1: GPUS * TERM_S * 1000, 2: GPUS * 20_000}
    assert sum(row.cut_micros for row in scene.read(select(UsageReport))) == 0
    assert first.charged_micros <= first.reserved_micros
    assert second.charged_micros <= second.reserved_micros


def test_a_term_cannot_be_charged_more_than_it_reserved(scene: Scene) -> None:
    """A site that says that all it delivered fell into the dearer term is cut to what that term has."""
    job_id, ada = _renewed(scene)
    _until_the_end_of_the_first_term(scene, job_id)
    scene.pass_s(TERM_S - 1, *ALL)
    for number in (1, 2):
        ada.meter(ada.order(), GPUS * (TERM_S - 1) * 1000, number)
        ada.beat()
    first, second = scene.read(select(Term).order_by(Term.number))
    assert (first.charged_micros, second.charged_micros) == (0, second.reserved_micros)
    assert scene.hold(job_id).posted_micros == second.reserved_micros == _cost(TERM_S * 1000, DEARER)


def test_usage_past_the_last_term_is_that_terms_own(scene: Scene) -> None:
    job_id = scene.submit(GPUS, sites_allowed=["ada"])
    (ada,) = scene.start(job_id)
    order = ada.order()
    scene.pass_s(TERM_S, *ALL)
    ada.offer = ada.offer.model_copy(update={"draining": True})
    scene.pass_s(2, *ALL)
    scene.reconcile()
    ada.meter(order, GPUS * (TERM_S + 1) * 1000)
    ada.exit_of(order, ExitCause.ORDERED)
    (row,) = scene.read(select(UsageReport))
    assert row.term == 1
    assert row.charge_micros == _cost(TERM_S * 1000, ASK) + 1  # no more than the term reserved, which rounds up
    assert row.cut_micros > 0
    (lease,) = scene.read(select(Lease))
    assert lease.usage_until_ms is not None


@given(
    gpus=st.integers(1, 8),
    running_ms=st.integers(0, 10**6),
    samples=st.integers(0, 10**6),
    sent=st.integers(0, 10**12),
    ends=st.lists(st.integers(0, 10**6), max_size=4, unique=True),
    ended_ms=st.integers(0, 10**6),
)
def test_the_parts_of_a_report_make_it_whole_and_none_is_longer_than_its_term(
    *, gpus: int, running_ms: int, samples: int, sent: int, ends: list[int], ended_ms: int
) -> None:
    edges = sorted(ends)
    starts = [0, *edges]
    ran = [
        Span(number, start, end)
        for number, (start, end) in enumerate(zip(starts, [*edges, None], strict=True), start=1)
    ]
    usage = Usage(
        lease_id="lease",
        epoch=1,
        sequence=1,
        gpu_milliseconds=gpus * running_ms,
        samples=samples,
        egress_bytes={"bob": sent},
    )
    parts = split(usage, ran, gpus=gpus, ended_ms=ended_ms)
    assert sum(part.gpu_milliseconds for part in parts) == gpus * running_ms
    assert sum(part.samples for part in parts) == samples
    assert sum(part.egress_bytes.get("bob", 0) for part in parts) == sent
    numbers = [part.term for part in parts]
    assert numbers == sorted(set(numbers))
    for part in parts:
        span = ran[part.term - 1]
        begins = ended_ms - running_ms if part.term == 1 else max(span.starts_ms, ended_ms - running_ms)
        until = ended_ms if span.ends_ms is None else min(span.ends_ms, ended_ms)
        assert part.gpu_milliseconds == gpus * max(0, until - begins)


def _renewed(scene: Scene) -> tuple[str, SpeakingSite]:
    """Return a job whose term was renewed at three times the price, and has not ended yet."""
    job_id = scene.submit(GPUS, sites_allowed=["ada"])
    (ada,) = scene.start(job_id)
    pool = ada.offer.pools[0].model_copy(update={"ask_micros_per_gpu_hour": DEARER})
    ada.offer = ada.offer.model_copy(update={"pools": (pool,)})
    starts_ms = renewal_starts_ms(scene.placement(job_id))
    scene.pass_s((starts_ms - scene.clock.now_ms()) / 1000 + 0.1, *ALL)
    scene.reconcile()
    scene.round()
    ada.beat()
    assert len(scene.events("renewed")) == 1
    return job_id, ada


def _until_the_end_of_the_first_term(scene: Scene, job_id: str) -> None:
    (first, second) = scene.read(select(Term).order_by(Term.number))
    assert first.ends_ms is not None
    assert first.ends_ms == second.starts_ms
    assert scene.placement(job_id).term_ends_ms == second.ends_ms
    scene.pass_s((first.ends_ms - scene.clock.now_ms()) / 1000, *ALL)


def _cost(running_ms: int, price: int) -> int:
    return GPUS * running_ms * price // 3_600_000
