"""Fuzz the whole documented API: requests made up from its OpenAPI document, and hostile ones by hand.

    python -m tests.broker.api.fuzz --requests 20000

schemathesis (`pip install '.[fuzz]'`) makes bodies, paths and queries that fit the document, and others that do not; half of
the ids are those of things that exist. No answer may be a fault of the broker's own, have a status or a content type
that the document does not name, or a body that is not as documented; afterwards the market's audit must find nothing.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from broker.audit import audit
from broker.bootstrap import open_market
from broker.freeze import set_frozen
from broker.identity.passwords import Role, create_user
from broker.rounds.clear import hold_round
from broker.settings import Settings
from tests.broker.api.conftest import World, open_for_trade, populate, spec
from training.clock import ManualClock

CHECKS: Final = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)
SHARE_HOSTILE: Final = 0.15
SHARE_KNOWN_IDS: Final = 0.5
SHARE_WRONG_CREDENTIAL: Final = 0.1
FAULTS_TOLD_MAX: Final = 40
HOSTILE: Final = (
    b"",
    b"null",
    b"[]",
    b'{"a": NaN}',
    b'{"a": 1e400}',
    b'{"a": -0}',
    b'{"a": "\x00"}',
    b'{"a": "\\u0000"}',
    b'{"a": "\\ud800"}',
    b'{"a": 9223372036854775808}',
    b"\xff\xfe\xfd",
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b'{"name": "' + b"x" * 1_000_000 + b'"}',
    '{"name": "\u202egpj.exe", "reason": "\u202e\u0007"}'.encode(),
    b'{"amount_micros": 1.5}',
    b'{"amount_micros": "1e3"}',
    b'{"tenant_id": "a", "tenant_id": "b"}',
)


@dataclass
class Tally:
    """What was sent and what came of it."""

    statuses: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    operations: set[str] = field(default_factory=set)

    @property
    def requests(self) -> int:
        """How many requests were answered."""
        return sum(self.statuses.values())


class Fuzz:
    """One run over one market."""

    def __init__(self, world: World, seed: int) -> None:
        """Read the document that the application serves."""
        self.world = world
        self.schema = schemathesis.openapi.from_wsgi("/openapi/openapi.json", world.app)
        self.random = random.Random(seed)  # noqa: S311  a run that can be repeated
        self.seed = seed
        self.tally = Tally()
        self.known = _fill(world)

    def run(self, requests: int) -> None:
        """Send about `requests` requests, as many to each operation."""
        operations = [found.ok() for found in self.schema.get_all_operations()]
        each = max(4, requests // len(operations) + 1)
        for operation in operations:
            name = f"{operation.method.upper()} {operation.path}"
            self.tally.operations.add(name)
            by_hand = round(each * SHARE_HOSTILE) if operation.method in {"post", "put"} else 0
            made = each - by_hand
            for mode, count in ((GenerationMode.POSITIVE, made - made // 2), (GenerationMode.NEGATIVE, made // 2)):
                self._made_up(operation, mode, count)
            for _ in range(by_hand):
                self._by_hand(operation)
            # What froze or closed the market for this operation must not shield the next.
            set_frozen(self.world.market, frozen=False, reason="")
            self.world.clock.advance_s(1)

    def _made_up(self, operation: Any, mode: GenerationMode, count: int) -> None:
        @hypothesis.seed(self.random.randrange(2**32))
        @hypothesis.settings(
            max_examples=max(1, count),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            self._send(case)

        try:
            send()
        except Unsatisfiable:
            pass  # nothing about this operation can be wrong: it takes no values
        except BaseException as error:  # noqa: BLE001  a part that cannot be made up is named, and the run goes on
            self.tally.faults[f"{operation.method.upper()} {operation.path}: not made up: {error!r:.200}"] += 1

    def _send(self, case: Any) -> None:
        for name in list(case.path_parameters or {}):
            known = self.known.get(name)
            if known and self.random.random() < SHARE_KNOWN_IDS:
                case.path_parameters[name] = self.random.choice(known)
        answer = case.call(headers=self._headers(case.path))
        self.tally.statuses[answer.status_code] += 1
        try:
            case.validate_response(answer, checks=list(CHECKS))
        except (Failure, FailureGroup) as failure:
            for one in getattr(failure, "exceptions", [failure]):
                self.tally.faults[f"{case.method} {case.path} {answer.status_code}: {one.title}: {_first(one)}"] += 1

    def _by_hand(self, operation: Any) -> None:
        path = operation.path
        for name, known in self.known.items():
            path = path.replace(f"{{{name}}}", str(self.random.choice(known)))
        body = self.random.choice(HOSTILE)
        kind = self.random.choice(["application/json", "application/json", "text/plain", "application/octet-stream"])
        headers = self._headers(path) | {"Content-Type": kind, "Idempotency-Key": f"k{self.random.random()}"}
        answer = self.world.client.open(path, method=operation.method.upper(), data=body, headers=headers)
        self.tally.statuses[answer.status_code] += 1
        documented = operation.responses.status_codes
        if str(answer.status_code) not in documented:
            self.tally.faults[
                f"{operation.method.upper()} {operation.path} {answer.status_code}: undocumented for {body[:30]!r}"
            ] += 1

    def _headers(self, path: str) -> dict[str, str]:
        if self.random.random() < SHARE_WRONG_CREDENTIAL:
            wrong = self.random.choice(
                ["", "Bearer x", "Basic eA==", f"Bearer {self.world.tokens['rival']}", "Bearer \x01"]
            )
            return {"Authorization": wrong} if wrong else {}
        who = "admin" if path.startswith("/v1/admin") else "acme"
        return {"Authorization": f"Bearer {self.world.tokens[who]}"}


def _first(failure: Any) -> str:
    return " ".join(str(failure).split())[:160]


def _fill(world: World) -> dict[str, list[Any]]:
    """Give the market something behind each kind of id, and return the ids by the parameter that takes them."""
    open_for_trade(world)
    made = [
        world.post("/v1/jobs", who, spec(name=f"job-{n}"), key=f"{who}-{n}")
        for who in ("acme", "rival")
        for n in (1, 2)
    ]
    jobs = [answer.get_json()["job_id"] for answer in made]
    hold_round(world.market)
    world.beat("lyon")
    world.join("spare")
    for number in range(20):
        create_user(world.market, f"person{number}", "correct horse battery", Role.TENANT, "acme")
    tokens = [
        world.post("/v1/admin/tenants/acme/tokens", "admin", {"label": f"spare {number}"}).get_json()["token_id"]
        for number in range(20)
    ]
    return {
        "job_id": jobs,
        "tenant_id": ["acme", "rival"],
        "site_id": ["spare", "spare", "lyon"],
        "login": [f"person{number}" for number in range(20)],
        "token_id": tokens,
        "round_number": [1, 0, 2**62, 2**64],
        "digest": [spec()["workdir_digest"], "0" * 64],
        "name": ["lyon/summary.json", "workdir.tar.gz"],
    }


def open_world(folder: Path) -> World:
    """Return a market of its own without limits of rate: its clock stands still."""
    clock = ManualClock()
    settings = Settings(home=folder / "home", requests_per_s=100_000, site_requests_per_s=100_000)
    return populate(open_market(settings, clock=clock), clock, folder)


def main() -> Iterator[str]:
    """Run and say what came of it, line by line."""
    arguments = argparse.ArgumentParser(description="Fuzz the whole documented API.")
    arguments.add_argument("--requests", type=int, default=20_000)
    arguments.add_argument("--seed", type=int, default=1)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = open_world(Path(folder))
        fuzz = Fuzz(world, given.seed)
        started = time.monotonic()
        fuzz.run(given.requests)
        tally = fuzz.tally
        findings = world.market.database.read(audit)
        world.market.database.close()
    yield f"{tally.requests} requests to {len(tally.operations)} operations in {time.monotonic() - started:.0f} s"
    yield "statuses " + ", ".join(f"{status}: {count}" for status, count in sorted(tally.statuses.items()))
    yield f"server errors: {sum(count for status, count in tally.statuses.items() if status >= 500)}"
    yield f"findings: {sum(tally.faults.values())} of {len(tally.faults)} kinds; the audit finds {len(findings)}"
    for told, count in tally.faults.most_common(FAULTS_TOLD_MAX):
        yield f"  {count} x {told}"
    if tally.faults or findings or tally.requests < given.requests:
        sys.exit("the API is not as documented")


if __name__ == "__main__":
    for line in main():
        sys.stdout.write(line + "\n")
