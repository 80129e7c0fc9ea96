"""The audit finds each fault when the rows are changed behind the services' back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from broker.audit import CHECKS, Finding, audit
from broker.database.engine import Database
from broker.database.tables import Lease, Table
from broker.market import Market
from broker.metering import accept_usage
from sites.protocol import Usage
from tests.broker.sold import GPUS, sold_market
from tests.fixtures.databases import PostgresServer


@dataclass(frozen=True)
class Fault:
    """A change that no service makes, and what the audit must say of it."""

    name: str
    statements: tuple[str, ...]
    invariant: int
    subject: str
    word: str


UNBIND_INDEXES = tuple(
    f"DROP INDEX {name}" for name in ("one_live_lease_per_gpu", "one_live_placement_per_job", "one_placement_per_epoch")
)
SECOND_PLACEMENT = (
    "INSERT INTO placements SELECT {columns} FROM placements",
    {"placement_id": "'second'", "epoch": "2", "state": "'active'"},
)
PARTED_CHECKPOINTS = (
    "INSERT INTO artifacts (digest, size_bytes, complete, created_ms) SELECT 'none', 1, live, 0 FROM leased_gpus LIMIT 1",
    """INSERT INTO job_artifacts
       (job_id, kind, name, digest, site_id, epoch, round_number, chain_hash, outer_hash, samples_done, created_ms)
       VALUES ('job', 'checkpoint', 'ada', 'none', 'ada', 1, 7, 'chain', 'aaa', 0, 0),
              ('job', 'checkpoint', 'bob', 'none', 'bob', 1, 7, 'chain', 'bbb', 0, 0)""",
)
FAULTS = (
    Fault("money from nowhere", ("UPDATE accounts SET balance_micros = balance_micros + 1 WHERE account_id = 'fees'",), 1, "accounts", "sum to 1"),
    Fault("a balance without a transfer", ("UPDATE accounts SET balance_micros = balance_micros + 1 WHERE account_id = 'fees'",), 1, "fees", "its transfers make 0"),
    Fault("an overdrawn account", ("UPDATE accounts SET balance_micros = -5 WHERE account_id = 'equity'",), 1, "equity", "below nought"),
    Fault("more posted than transferred", ("UPDATE holds SET posted_micros = posted_micros + 1",), 2, "job", "posted, its transfers say"),
    Fault("a hold above its transfer", ("UPDATE holds SET amount_micros = amount_micros + 1",), 2, "job", "set aside, its transfers say"),
    Fault("a closed hold with a rest", ("UPDATE holds SET closed_ms = 1", "UPDATE jobs SET state = 'cancelled'"), 2, "job", "neither posted nor voided"),
    Fault("a hold closed under a running job", ("UPDATE holds SET closed_ms = 1",), 2, "job", "the job is not over"),
    Fault("more posted than held", ("UPDATE holds SET posted_micros = amount_micros + 1",), 2, "job", "more was posted and voided"),
    Fault("a held account without a hold", ("DELETE FROM holds",), 2, "held/acme", "open holds have 0 left"),
    Fault("transfers that can be changed", ("{drop_trigger}",), 3, "transfers", "is missing or disabled"),
    Fault("a changed transfer", ("{drop_trigger}", "UPDATE transfers SET amount_micros = amount_micros + 1 WHERE kind = 'hold'"), 1, "held/acme", "its transfers make"),
    Fault("a transfer of no verb", ("{drop_trigger}", "UPDATE transfers SET debit_account = 'world' WHERE kind = 'hold'"), 3, "hold/job", "none of the ledger's verbs"),
    Fault("a transfer of nothing", ("{drop_trigger}", "UPDATE transfers SET amount_micros = 0 WHERE kind = 'hold'"), 3, "hold/job", "moves 0"),
    Fault("a GPU sold twice", ("INSERT INTO leased_gpus SELECT 'lease_bob', site_id, gpu_id, live FROM leased_gpus WHERE site_id = 'ada' AND gpu_id = 'g0'",), 4, "ada/g0", "2 live leases"),
    Fault("a lease without its GPU", ("UPDATE leased_gpus SET live = {false} WHERE lease_id = 'lease_ada' AND gpu_id = 'g1'",), 4, "lease_ada", "sold 4 GPUs and holds 3"),
    Fault("a GPU of another site", ("UPDATE leased_gpus SET site_id = 'eve' WHERE lease_id = 'lease_ada' AND gpu_id = 'g1'",), 4, "lease_ada", "some at eve"),
    Fault("two live placements", ("{second_placement}", "UPDATE jobs SET epoch = 2"), 5, "job", "2 live placements"),
    Fault("an epoch that went back", ("UPDATE jobs SET epoch = 7",), 5, "job", "its newest placement has given out 1"),
    Fault("a lease of another epoch", ("UPDATE leases SET epoch = 9 WHERE lease_id = 'lease_ada'",), 5, "lease_ada", "its placement's 1"),
    Fault("usage of another epoch", ("UPDATE usage_reports SET epoch = 9 WHERE lease_id = 'lease_ada'",), 6, "lease_ada report 1", "for epoch 9"),
    Fault("a lost report", ("DELETE FROM usage_reports WHERE lease_id = 'lease_ada' AND sequence = 1",), 6, "lease_ada", "the rows are [2]"),
    Fault("usage after expiry", ("UPDATE leases SET state = 'ended', end_cause = 'expired', ended_ms = 5 WHERE lease_id = 'lease_ada'",), 6, "lease_ada report 1", "the lease expired at 5"),
    Fault("usage before the start", ("UPDATE leases SET active_ms = NULL WHERE lease_id = 'lease_ada'",), 6, "lease_ada report 1", "never was active"),
    Fault("time delivered without a report", ("UPDATE leases SET delivered_gpu_milliseconds = 1 WHERE lease_id = 'lease_ada'",), 6, "lease_ada", "GPU-milliseconds delivered"),
    Fault("a state without an event", ("UPDATE jobs SET state = 'finished'",), 7, "job", "its last event left it running"),
    Fault("a lease without a history", ("DELETE FROM events WHERE lease_id = 'lease_ada'",), 7, "lease_ada", "no event says so"),
    Fault("an illegal change", ("UPDATE events SET before = 'queued', after = 'running' WHERE kind = 'job' AND after = 'running'",), 7, "job", "not legal"),
    Fault("a broken chain", ("DELETE FROM events WHERE kind = 'job' AND after = 'proposed'",), 7, "job", "while it was queued"),
    Fault("a placement without a history", ("DELETE FROM events WHERE kind = 'placement'",), 7, "job", "1 placements and the events of 0"),
    Fault("a site that fell silent unseen", ("UPDATE sites SET state = 'silent' WHERE site_id = 'bob'",), 7, "bob", "its last event left it live"),
    Fault("a view nobody opened", ("DELETE FROM events WHERE kind = 'view'",), 7, "job", "of its views are issued"),
    Fault("an event of nothing", ("UPDATE events SET lease_id = 'ghost' WHERE lease_id = 'lease_ada'",), 7, "ghost", "does not exist"),
    Fault("sites whose outer states have parted", PARTED_CHECKPOINTS, 12, "job", "ada (round 7): aaa…; bob (round 7): bbb…"),
    Fault("a price above the bid", ("UPDATE placements SET charge_micros_per_hour = value_micros_per_hour + 1",), 11, "placement", "its bid values at"),
    Fault("a site paid below its price", ("UPDATE usage_reports SET payout_micros = payout_micros - 100, fee_micros = fee_micros + 100 WHERE lease_id = 'lease_ada' AND sequence = 1",), 11, "lease_ada report 1", "its term prices at"),
    Fault("a term that no round priced", ("UPDATE rounds SET prices = '{}'", "UPDATE terms SET round_number = 1"), 11, "placement term 1", "round 1 says None"),
    Fault("a report out of balance", ("UPDATE usage_reports SET charge_micros = charge_micros + 1 WHERE lease_id = 'lease_ada' AND sequence = 1",), 14, "lease_ada report 1", "was given and"),
    Fault("a charge never posted", ("UPDATE usage_reports SET charge_micros = charge_micros + 1 WHERE lease_id = 'lease_ada' AND sequence = 1",), 14, "lease_ada", "was charged by its reports"),
    Fault("an uplift never drawn", ("UPDATE usage_reports SET uplift_micros = 0 WHERE lease_id = 'lease_ada'",), 14, "lease_ada", "drawn from equity"),
    Fault("usage paid to another site", ("{drop_trigger}", "UPDATE transfers SET credit_account = 'site/bob' WHERE lease_id = 'lease_ada' AND kind = 'post'"), 14, "post/usage/lease_ada/1.1/0", "was paid to site/bob"),
    Fault("a charge forgotten by its placement", ("UPDATE placements SET charged_micros = 0",), 15, "placement", "0 charged, its reports say"),
    Fault("a charge above the reservation", ("UPDATE placements SET reserved_micros = 1",), 15, "placement", "of 1 reserved"),
    Fault("a charge forgotten by its term", ("UPDATE terms SET charged_micros = 0",), 15, "placement term 1", "0 charged, its reports say"),
    Fault("a term charged above its reservation", ("UPDATE terms SET reserved_micros = 1",), 15, "placement term 1", "of 1 reserved"),
    Fault("usage in a term that never was", ("UPDATE usage_reports SET term = 2 WHERE lease_id = 'lease_ada'",), 15, "placement term 2", "never was"),
    Fault("a reservation of no term", ("UPDATE placements SET reserved_micros = reserved_micros + 1",), 15, "placement", "its terms"),
    Fault("a reservation that its hold does not cover", ("UPDATE placements SET reserved_micros = 1000000000000",), 15, "placement", "hold has"),
)  # fmt: skip


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    folder = tmp_path_factory.mktemp("audit")
    market = _market_with_usage(f"sqlite:///{folder}/market.sqlite3", folder)
    yield market
    market.database.close()


def test_a_sound_market_has_no_finding(market: Market) -> None:
    assert market.database.read(audit) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_planted_fault_is_found(market: Market, fault: Fault) -> None:
    _see_found(market.database, fault)


def test_a_fault_of_each_invariant_is_found_on_postgresql_too(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = postgres_server.create_database()
    market = _market_with_usage(postgres_server.url(name), tmp_path_factory.mktemp("audit"))
    assert market.database.read(audit) == []
    for fault in {fault.invariant: fault for fault in FAULTS}.values():
        _see_found(market.database, fault)
    market.database.close()
    postgres_server.drop_database(name)


def test_every_check_has_a_fault_that_it_alone_finds(market: Market) -> None:
    """Take any check away and some fault goes unseen: none is there for show."""
    seen_by: dict[str, set[str]] = {check.__name__: set() for check in CHECKS}
    for fault in FAULTS:
        with _planted(market.database, fault) as session:
            for check in CHECKS:
                if any(_answers(finding, fault) for finding in check(session)):
                    seen_by[check.__name__].add(fault.name)
    assert all(seen_by.values()), seen_by
    for name, faults in seen_by.items():
        others = set().union(*(seen for other, seen in seen_by.items() if other != name))
        assert faults - others, f"what {name} finds, others find too"


def _see_found(database: Database, fault: Fault) -> None:
    with _planted(database, fault) as session:
        findings = audit(session)
    assert any(_answers(finding, fault) for finding in findings), [str(finding) for finding in findings]


def _answers(finding: Finding, fault: Fault) -> bool:
    return finding.invariant == fault.invariant and finding.subject == fault.subject and fault.word in finding.detail


class _planted:  # noqa: N801  reads as the verb that it is
    """Open a session in which the constraints are gone and the fault is there; nothing of it stays."""

    def __init__(self, database: Database, fault: Fault) -> None:
        self.session = Session(database.engine)
        self.sqlite = database.engine.dialect.name == "sqlite"
        self.fault = fault

    def __enter__(self) -> Session:
        for statement in (*self._unbind(), *(self._resolved(sql) for sql in self.fault.statements)):
            self.session.execute(text(statement))
        return self.session

    def __exit__(self, *_: object) -> None:
        self.session.rollback()
        if self.sqlite:
            self.session.execute(text("PRAGMA ignore_check_constraints = OFF"))
        self.session.close()

    def _unbind(self) -> list[str]:
        if self.sqlite:
            # Foreign keys cannot be switched off inside a transaction, but their check can be put off to its end.
            return [*UNBIND_INDEXES, "PRAGMA ignore_check_constraints = ON", "PRAGMA defer_foreign_keys = ON"]
        checks = [
            f"ALTER TABLE {table.name} DROP CONSTRAINT {constraint.name}"
            for table in Table.metadata.tables.values()
            for constraint in sorted(table.constraints, key=lambda constraint: str(constraint.name))
            if type(constraint).__name__ == "CheckConstraint"
        ]
        return [*UNBIND_INDEXES, *checks]

    def _resolved(self, sql: str) -> str:
        if sql == "{drop_trigger}":
            return (
                "DROP TRIGGER transfers_refuse_update"
                if self.sqlite
                else "DROP TRIGGER transfers_refuse_change ON transfers"
            )
        if sql == "{second_placement}":
            template, changed = SECOND_PLACEMENT
            columns = Table.metadata.tables["placements"].columns.keys()
            return template.format(columns=", ".join(changed.get(column, column) for column in columns))
        return sql.replace("{false}", "0" if self.sqlite else "false")


def _market_with_usage(url: str, folder: Path) -> Market:
    market = sold_market(url, folder / "home")
    market.clock.advance_s(600)

    def work(session: Session) -> None:
        for site_id in GPUS:
            lease = session.get_one(Lease, f"lease_{site_id}")
            for sequence in (1, 2):
                usage = Usage(
                    lease_id=lease.lease_id,
                    epoch=1,
                    sequence=sequence,
                    gpu_milliseconds=lease.gpus * 60_000,
                    samples=10,
                    egress_bytes={},
                )
                accept_usage(session, market, lease, usage)

    market.database.write("probe", work)
    return market
