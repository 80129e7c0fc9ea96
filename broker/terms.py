"""The terms of a placement: which price was locked for which time, and which of it a report of usage fell into.

A placement's first term begins when its gang becomes active, each renewal appends one at its end.
`broker.metering` charges usage by the term in which it was delivered: a report that straddles the
end of a term is split there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from broker.allocation.clearing import Placement as Award
from broker.database.tables import Lease, LeasedGpu, Placement
from broker.database.terms import Term
from broker.transitions import LeaseState
from pricing.money import divide_up
from sites.protocol import Usage


@dataclass(frozen=True, slots=True)
class Span:
    """When a term ran; the last one of a placement has no end for what its sites still report."""

    number: int
    starts_ms: int
    ends_ms: int | None


@dataclass(frozen=True, slots=True)
class Part:
    """What of a report was delivered in one term."""

    term: int
    gpu_milliseconds: int
    samples: int
    egress_bytes: dict[str, int]


def open_first_term(session: Session, placement: Placement, award: Award) -> None:
    """Write down the term that a proposal would have; it begins once the gang is active."""
    session.flush()  # the placement itself, which the term refers to
    session.add(_term(placement, award, number=1, round_number=placement.round_number))


def begin_first_term(session: Session, placement: Placement) -> None:
    """Let the first term begin with the gang's work."""
    term = session.get_one(Term, (placement.placement_id, 1))
    term.starts_ms, term.ends_ms = placement.active_ms, placement.term_ends_ms


def append_term(session: Session, placement: Placement, award: Award, round_number: int) -> None:
    """Let another term follow the last one at the price of the round that renewed it, and reserve it."""
    last = terms_of(session, placement.placement_id)[-1]
    assert last.ends_ms is not None, "an active placement has a term with an end"
    term = _term(placement, award, number=last.number + 1, round_number=round_number)
    term.starts_ms, term.ends_ms = last.ends_ms, last.ends_ms + award.term_s * 1000
    session.add(term)
    placement.term_ends_ms = term.ends_ms
    placement.reserved_micros += award.reservation_micros


def cut_terms(session: Session, placement: Placement, now_ms: int) -> None:
    """End a placement's running term now, and give back what a renewal reserved for a time that will not come."""
    for term in terms_of(session, placement.placement_id):
        if term.ends_ms is None or term.ends_ms <= now_ms:
            continue
        if term.starts_ms is not None and term.starts_ms >= now_ms:
            left = term.reserved_micros - term.charged_micros
            term.starts_ms, term.reserved_micros = now_ms, term.reserved_micros - left
            placement.reserved_micros -= left
        term.ends_ms = now_ms
    placement.term_ends_ms = now_ms


def release_finished(session: Session, placement: Placement) -> int:
    """Give back to a running placement's job what its finished terms reserved and nobody can charge; return how much.

    A term is finished once every lease that had a part in it has reported beyond its end, or is over and its GPUs are
    free: reports follow one another, so none of it is still to come.
    """
    terms = terms_of(session, placement.placement_id)
    released = 0
    for term in terms[:-1]:
        left = term.reserved_micros - term.charged_micros
        if left == 0 or term.ends_ms is None or not _reported_until(session, placement, term.ends_ms):
            continue
        term.reserved_micros -= left
        placement.reserved_micros -= left
        released += left
    return released


def _reported_until(session: Session, placement: Placement, ends_ms: int) -> bool:
    held = select(LeasedGpu.lease_id).where(LeasedGpu.lease_id == Lease.lease_id, LeasedGpu.live).exists()
    leases = session.scalars(
        select(Lease).where(
            Lease.placement_id == placement.placement_id,
            # One that joined later had no part in it.
            Lease.active_ms < ends_ms,
            or_(Lease.state != LeaseState.ENDED, held),
        )
    )
    return all(lease.usage_until_ms is not None and lease.usage_until_ms >= ends_ms for lease in leases)


def terms_of(session: Session, placement_id: str) -> list[Term]:
    """Return the terms of a placement in order."""
    return list(session.scalars(select(Term).where(Term.placement_id == placement_id).order_by(Term.number)))


def spans(terms: Sequence[Term]) -> list[Span]:
    """Return when each of the terms ran; what comes after the last one's end still is its own."""
    return [
        Span(term.number, term.starts_ms or 0, None if term is terms[-1] else term.ends_ms)
        for term in sorted(terms, key=lambda term: term.number)
    ]


def split(usage: Usage, ran: Sequence[Span], *, gpus: int, ended_ms: int) -> list[Part]:
    """Cut a report at the ends of the terms that it straddles; the parts add up to it exactly.

    Its GPUs ran without a pause until `ended_ms`, so it began as long before as its GPU time says.
    Samples and bytes are taken to be spread evenly over that time. What precedes the first span
    is part of it.
    """
    duration_ms = divide_up(usage.gpu_milliseconds, gpus)
    began_ms = ended_ms - duration_ms
    parts: list[Part] = []
    before = _up_to(usage, 0, 1)
    for span in ran:
        if span.ends_ms is None or span.ends_ms >= ended_ms:
            until = _up_to(usage, 1, 1)
        elif span.ends_ms <= began_ms:
            until = _up_to(usage, 0, 1)
        else:
            until = _up_to(usage, span.ends_ms - began_ms, duration_ms)
        part = _between(span.number, before, until)
        if part.gpu_milliseconds or part.samples or part.egress_bytes:
            parts.append(part)
        before = until
    return parts or [Part(ran[-1].number, 0, 0, {})]


def _up_to(usage: Usage, numerator: int, denominator: int) -> Part:
    return Part(
        0,
        usage.gpu_milliseconds * numerator // denominator,
        usage.samples * numerator // denominator,
        {target: size * numerator // denominator for target, size in usage.egress_bytes.items()},
    )


def _between(number: int, before: Part, until: Part) -> Part:
    sent = {target: size - before.egress_bytes[target] for target, size in until.egress_bytes.items()}
    return Part(
        number,
        until.gpu_milliseconds - before.gpu_milliseconds,
        until.samples - before.samples,
        {target: size for target, size in sent.items() if size},
    )


def _term(placement: Placement, award: Award, *, number: int, round_number: int) -> Term:
    return Term(
        placement_id=placement.placement_id,
        number=number,
        round_number=round_number,
        award=award.model_dump_json(),
        reserved_micros=award.reservation_micros,
        charged_micros=0,
    )
