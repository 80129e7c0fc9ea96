"""A ledger in forty lines, and the steps that it and the real one take side by side.

Runs share a stage: each has a tenant and sites of its own, all draw on one world, one equity and
one account of fees. So a hundred short runs cost one transaction and two comparisons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from sqlalchemy import insert, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from broker import ledger
from broker.database.tables import Account, Hold, Job, Tenant
from broker.errors import InsufficientFundsError, LedgerError, NotFoundError

Lines = tuple[tuple[str, int], ...]

SHARED: Final = ("world", "fees", "equity")
RETRIED: Final = 0.2  # of the steps of a run
FORGOTTEN: Final = 0.1


@dataclass
class Model:
    """One tenant's ledger. Every verb says whether it is accepted; a retry is, and changes nothing."""

    tenant: str
    balances: Counter[str]
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

    def fund(self, amount: int, key: str) -> bool:
        return amount > 0 and self.move(f"fund/{key}", "world", (("equity", amount),))

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


class DifferenceError(AssertionError):
    """The ledger did what the model did not; the message names the run and the step."""


class Stage:
    """What a hundred runs play on: the rows that they need, and what the model says of the accounts that they share."""

    def __init__(self, session: Session, runs: Sequence[str]) -> None:
        self.runs = list(runs)
        self.enter(session)
        self.balances = Counter({name: row.balance_micros for name, row in self.accounts.items()})
        self.pairs = {run: Pair(self, run) for run in runs}

    def enter(self, session: Session) -> None:
        """Go on in this session: read the rows of all runs at once and hold on to them, or it would forget them."""
        self.session = session
        accounts = [*SHARED, *(name for run in self.runs for name in run_accounts(run))]
        jobs = [job for run in self.runs for job in run_jobs(run)]
        rows = session.scalars(select(Account).where(Account.account_id.in_(accounts)))
        self.accounts = {row.account_id: row for row in rows}
        self.jobs = {row.job_id: row for row in session.scalars(select(Job).where(Job.job_id.in_(jobs)))}

    def compare(self) -> None:
        """See that all balances and holds are in the database as the models say. Raises DifferenceError."""
        rows = self.session.execute(
            select(Account.account_id, Account.balance_micros).where(Account.account_id.in_(self.accounts))
        )
        real = {row.account_id: row.balance_micros for row in rows}
        _require_equal({account: self.balances[account] for account in self.accounts}, real)
        holds = self.session.execute(
            select(Hold.job_id, Hold.amount_micros, Hold.posted_micros, Hold.voided_micros, Hold.closed_ms).where(
                Hold.job_id.in_(self.jobs)
            )
        )
        found = {
            job: [amount, posted, voided, int(closed is not None)] for job, amount, posted, voided, closed in holds
        }
        _require_equal({job: hold for pair in self.pairs.values() for job, hold in pair.model.holds.items()}, found)


class Pair:
    """The model and the real ledger of one run, in a session that forgets after some of the steps.

    Between two that it remembers, a verb works on rows that an earlier one has changed; after
    forgetting, on what is in the database.
    """

    def __init__(self, stage: Stage, run: str) -> None:
        self.stage = stage
        self.model = Model(f"t{run}", stage.balances)
        self.run = run

    def take(self, step: Step) -> None:
        """Take one step with both; they must agree on whether it is accepted. Raises DifferenceError."""
        expected, accepted = self._with_model(step), True
        try:
            self._with_ledger(step)
        except (LedgerError, InsufficientFundsError, NotFoundError):
            accepted = False
            if self.stage.session.dirty or self.stage.session.new:
                message = f"run {self.run}: {step} was refused and changed something"
                raise DifferenceError(message) from None
        except SQLAlchemyError as error:
            message = f"run {self.run}: {step} was left to the database to refuse: {error}"
            raise DifferenceError(message) from error
        if accepted != expected:
            message = f"run {self.run}: {step} accepted={accepted}, the model says {expected}"
            raise DifferenceError(message)
        if step.forget:
            self.forget()

    def forget(self) -> None:
        """Let the next step read the run's rows from the database."""
        for row in (
            *(self.stage.accounts[name] for name in (*SHARED, *run_accounts(self.run))),
            *(self.stage.jobs[job] for job in run_jobs(self.run)),
        ):
            self.stage.session.expire(row)

    def _with_model(self, step: Step) -> bool:
        model = self.model
        match step.verb:
            case "deposit":
                return model.deposit(step.amount, step.key)
            case "fund":
                return model.fund(step.amount, step.key)
            case "hold":
                return model.hold(step.job, step.amount)
            case "post":
                return model.post(step.job, step.lines, step.key)
            case "draw":
                return model.draw(step.job, step.lines, step.key)
            case _:
                return model.close(step.job)

    def _with_ledger(self, step: Step) -> None:
        session = self.stage.session
        match step.verb:
            case "deposit":
                ledger.deposit(session, self.model.tenant, step.amount, step.key, 0)
            case "fund":
                ledger.fund_equity(session, step.amount, step.key, 0)
            case "hold":
                ledger.place_hold(session, self.stage.jobs[step.job], step.amount, 0)
            case "post":
                ledger.post(session, step.job, None, step.lines, key=step.key, now_ms=0)
            case "draw":
                ledger.draw_equity(session, step.job, None, step.lines, key=step.key, now_ms=0)
            case _:
                ledger.close_hold(session, step.job, 0)


Play = list[tuple[str, Step]]  # whose turn it is, and what it does


def play(stage: Stage, turns: Play) -> None:
    """Take all turns, then compare. Raises DifferenceError at the first step at which the two differ."""
    for run, step in turns:
        stage.pairs[run].take(step)
    stage.compare()


def shrink(turns: Play, differs: Callable[[Play], bool]) -> Play:
    """Return the fewest of these turns, in their order, that still differ: no single one can be left out."""
    size = len(turns)
    while size:
        size, before, start = size // 2, len(turns), 0
        while size and start < len(turns):
            fewer = turns[:start] + turns[start + size :]
            if fewer and differs(fewer):
                turns = fewer
            else:
                start += size
        if size == 1 and len(turns) < before:
            size = 2  # what is left may do without a step that it needed before
    return turns


def _require_equal(expected: dict[str, Any], found: dict[str, Any]) -> None:
    if found != expected:
        names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        told = "; ".join(f"{name}: {found.get(name)}, the model says {expected.get(name)}" for name in names[:5])
        message = f"{len(names)} rows differ: {told}"
        raise DifferenceError(message)


def run_accounts(run: str) -> list[str]:
    return [f"tenant/t{run}", f"held/t{run}", f"site/a{run}", f"site/b{run}"]


def run_jobs(run: str) -> list[str]:
    return [f"j{run}x", f"j{run}y"]


def set_the_stage(session: Session, runs: Sequence[str]) -> Stage:
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
    return Stage(session, runs)


def random_steps(run: str, count: int) -> list[Step]:
    """Draw the steps of one run, the same each time; money comes first, or most would be refused."""
    random = Random(f"ledger {run}")  # noqa: S311  no secret, but a seed
    steps = [Step("deposit", amount=random.randrange(40, 120), key=f"{run}-0")]
    steps.append(Step("hold", job=run_jobs(run)[0], amount=random.randrange(10, 60)))
    while len(steps) < count:
        steps.append(random.choice(steps) if random.random() < RETRIED else _random_step(random, run))
    return steps


def _random_step(random: Random, run: str) -> Step:
    verb = random.choices(["deposit", "fund", "hold", "post", "draw", "close"], [2, 1, 2, 8, 3, 2])[0]
    third = "fees" if verb == "post" else f"site/a{run}"
    lines = tuple(
        (random.choice([f"site/a{run}", f"site/b{run}", third]), amount)
        for amount in random.choices([0, 1, 2, 5, 30, -1], [2, 4, 4, 4, 1, 1], k=random.randrange(1, 4))
    )
    return Step(
        verb,
        job=random.choice(run_jobs(run)),
        amount=random.choice([0, 1, 5, 20] if verb == "fund" else [0, 5, 20, 90]),
        lines=lines,
        key=f"{run}-{random.randrange(3)}",
        forget=random.random() < FORGOTTEN,
    )
