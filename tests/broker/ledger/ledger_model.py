"""A ledger in forty lines, and the steps that it and the real one take side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from broker import ledger
from broker.database.tables import Account, Hold, Job, Tenant
from broker.errors import InsufficientFundsError, LedgerError, NotFoundError

Lines = tuple[tuple[str, int], ...]


@dataclass
class Model:
    """One tenant's ledger. Every verb says whether it is accepted; a retry is, and changes nothing."""

    tenant: str
    balances: Counter[str] = field(default_factory=Counter)
    holds: dict[str, list[int]] = field(default_factory=dict)  # of each job: amount, posted, voided, closed
    made: dict[str, tuple[str, Counter[str], str]] = field(default_factory=dict)

    def move(self, key: str, debit: str, lines: Lines, job: str = "") -> bool:
        paid: Counter[str] = Counter()
        for account, amount in lines:
            paid[account] += amount
        if key in self.made:
            return self.made[key] == (debit, +paid, job)
        if debit != "world" and self.balances[debit] < paid.total():
            return False
        self.balances[debit] -= paid.total()
        self.balances.update(paid)
        self.made[key] = (debit, +paid, job)
        return True

    def deposit(self, amount: int, key: str) -> bool:
        return amount > 0 and self.move(f"deposit/{key}", "world", ((f"tenant/{self.tenant}", amount),))

    def hold(self, job: str, amount: int) -> bool:
        if job in self.holds:
            return self.holds[job][0] == amount
        moved = amount > 0 and self.move(job, f"tenant/{self.tenant}", ((f"held/{self.tenant}", amount),))
        self.holds |= {job: [amount, 0, 0, 0]} if moved else {}
        return moved

    def post(self, job: str, lines: Lines, key: str) -> bool:
        total, hold = sum(amount for _, amount in lines), self.holds.get(job)
        if hold is None or min(amount for _, amount in lines) < 0:
            return False
        if total and f"post/{key}" not in self.made and (hold[3] or hold[1] + total > hold[0]):
            return False
        hold[1] += total if f"post/{key}" not in self.made else 0
        return not total or self.move(f"post/{key}", f"held/{self.tenant}", lines, job)

    def draw(self, job: str, lines: Lines, key: str) -> bool:
        total = sum(amount for _, amount in lines)
        return min(amount for _, amount in lines) >= 0 and (
            not total or self.move(f"uplift/{key}", "equity", lines, job)
        )

    def close(self, job: str) -> bool:
        if job in self.holds and not self.holds[job][3]:
            amount, posted, _, _ = self.holds[job]
            self.holds[job] = [amount, posted, amount - posted, 1]
            self.move(f"void/{job}", f"held/{self.tenant}", ((f"tenant/{self.tenant}", amount - posted),))
        return job in self.holds


@dataclass(frozen=True)
class Step:
    """One call of a verb. Keys are few, so that many a step is a retry, with the same content or another."""

    verb: str
    job: str = ""
    amount: int = 0
    lines: Lines = ()
    key: str = ""
    forget: bool = False


class Pair:
    """The model and the real ledger of one tenant, in a session that forgets after some of the steps.

    Between two that it remembers, a verb works on rows that an earlier one has changed; after
    forgetting, on what is in the database.
    """

    def __init__(self, session: Session, run: str) -> None:
        self.session = session
        self.model = Model(f"t{run}")
        self.run = run
        self._remember()
        shared = [row for row in self._remembered if isinstance(row, Account) and "/" not in row.account_id]
        self.model.balances.update({row.account_id: row.balance_micros for row in shared})

    def take(self, step: Step) -> None:
        """Take one step with both; they must agree on whether it is accepted."""
        expected, accepted = self._with_model(step), True
        try:
            self._with_ledger(step)
        except (LedgerError, InsufficientFundsError, NotFoundError):
            accepted = False
            assert not self.session.dirty, f"{step} was refused and changed something"
            assert not self.session.new, f"{step} was refused and wrote something"
        assert accepted == expected, f"run {self.run}: {step} accepted={accepted}, the model says {expected}"
        if step.forget:
            self.forget()

    def forget(self) -> None:
        """Drop all rows from memory: the next step reads them from the database."""
        self.session.expunge_all()
        self._remember()

    def _remember(self) -> None:
        # The session holds rows weakly; each read for itself would make up most of a run's time.
        accounts = [*run_accounts(self.run), "world", "fees", "equity"]
        jobs = run_jobs(self.run)
        self._remembered = [
            *self.session.scalars(select(Account).where(Account.account_id.in_(accounts))),
            *self.session.scalars(select(Job).where(Job.job_id.in_(jobs))),
        ]

    def compare(self) -> None:
        """See that all balances and holds agree."""
        accounts = [*run_accounts(self.run), "world", "fees", "equity"]
        rows = self.session.execute(
            select(Account.account_id, Account.balance_micros).where(Account.account_id.in_(accounts))
        )
        real = {account: balance for account, balance in rows}  # noqa: C416  a Row is no pair to a type checker
        assert real == {account: self.model.balances[account] for account in accounts}, f"run {self.run}"
        holds = self.session.execute(
            select(Hold.job_id, Hold.amount_micros, Hold.posted_micros, Hold.voided_micros, Hold.closed_ms).where(
                Hold.tenant_id == self.model.tenant
            )
        )
        found = {
            job: [amount, posted, voided, int(closed is not None)] for job, amount, posted, voided, closed in holds
        }
        assert found == self.model.holds, f"run {self.run}"

    def _with_model(self, step: Step) -> bool:
        model = self.model
        match step.verb:
            case "deposit":
                return model.deposit(step.amount, step.key)
            case "hold":
                return model.hold(step.job, step.amount)
            case "post":
                return model.post(step.job, step.lines, step.key)
            case "draw":
                return model.draw(step.job, step.lines, step.key)
            case _:
                return model.close(step.job)

    def _with_ledger(self, step: Step) -> None:
        session = self.session
        match step.verb:
            case "deposit":
                ledger.deposit(session, self.model.tenant, step.amount, step.key, 0)
            case "hold":
                ledger.place_hold(session, session.get_one(Job, step.job), step.amount, 0)
            case "post":
                ledger.post(session, step.job, None, step.lines, key=step.key, now_ms=0)
            case "draw":
                ledger.draw_equity(session, step.job, None, step.lines, key=step.key, now_ms=0)
            case _:
                ledger.close_hold(session, step.job, 0)


def run_accounts(run: str) -> list[str]:
    return [f"tenant/t{run}", f"held/t{run}", f"site/a{run}", f"site/b{run}"]


def run_jobs(run: str) -> list[str]:
    return [f"j{run}x", f"j{run}y"]


def set_the_stage(session: Session, runs: Sequence[str]) -> None:
    """Write what each run needs: a tenant with two jobs, two sites, and the market's own accounts."""
    ledger.open_accounts(session, 0)
    session.execute(insert(Tenant), [{"tenant_id": f"t{run}", "name": run, "created_ms": 0} for run in runs])
    session.execute(
        insert(Account),
        [
            {"account_id": name, "kind": name.partition("/")[0], "owner": None, "balance_micros": 0, "created_ms": 0}
            for run in runs
            for name in run_accounts(run)
        ],
    )
    session.execute(
        insert(Job),
        [
            {"job_id": job, "tenant_id": f"t{run}", "name": job, "state": "cancelled", "spec": "", "submitted_ms": 0}
            for run in runs
            for job in run_jobs(run)
        ],
    )


def random_steps(run: str, count: int) -> list[Step]:
    """Draw the steps of one run, the same each time; money comes first, or most would be refused."""
    random = Random(f"ledger {run}")  # noqa: S311  no secret, but a seed
    steps = [Step("deposit", amount=random.randrange(40, 120), key=f"{run}-0")]
    steps.append(Step("hold", job=run_jobs(run)[0], amount=random.randrange(10, 60)))
    while len(steps) < count:
        verb = random.choices(["deposit", "hold", "post", "draw", "close"], [1, 1, 4, 1, 1])[0]
        lines = tuple(
            (random.choice([f"site/a{run}", f"site/b{run}", "fees" if verb == "post" else f"site/a{run}"]), amount)
            for amount in random.choices([0, 1, 2, 5, 30, -1], [2, 4, 4, 4, 1, 1], k=random.randrange(1, 4))
        )
        steps.append(
            Step(
                verb,
                job=random.choice(run_jobs(run)),
                amount=random.choice([0, 5, 20, 90]),
                lines=lines,
                key=f"{run}-{random.randrange(3)}",
                forget=random.random() < 0.15,
            )
        )
        if random.random() < 0.3:  # a retry
            steps.append(random.choice(steps))
    return steps
