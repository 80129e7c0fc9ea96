"""The round log of one attempt as the broker can see it: rounds sealed, chain hash, promises.

`History` is the truth: which round follows which. An attempt's gateway holds a position in it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from training.roundlog.view import GENESIS_HASH, View, ViewReport


@dataclass(slots=True)
class History:
    """Every round that was ever sealed, by its hash: (number, hash before)."""

    rounds: dict[str, tuple[int, str]] = field(default_factory=lambda: {GENESIS_HASH: (0, GENESIS_HASH)})

    def seal(self, job_id: str, before: str, view_number: int) -> str:
        """Add the round after `before` and return its hash."""
        number = self.rounds[before][0] + 1
        sealed = hashlib.sha256(f"{job_id}/{before}/{view_number}/{number}".encode()).hexdigest()
        self.rounds[sealed] = (number, before)
        return sealed

    def number(self, chain_hash: str) -> int:
        """Return the round that a chain ends with."""
        return self.rounds[chain_hash][0]

    def extends(self, longer: str, shorter: str) -> bool:
        """Say whether the chain that ends with `longer` contains the one that ends with `shorter`."""
        while self.number(longer) > self.number(shorter):
            longer = self.rounds[longer][1]
        return longer == shorter


@dataclass(slots=True)
class SimulatedGateway:
    """One attempt's end of the log."""

    history: History
    view: View | None = None
    promised: int = 0
    chain_hash: str = GENESIS_HASH

    @property
    def sealed_round(self) -> int:
        """The last round that this gateway knows."""
        return self.history.number(self.chain_hash)

    def promise(self, number: int) -> ViewReport | None:
        """Promise a view, or repeat the promise; None where a later one was promised already."""
        if number < self.promised:
            return None
        self.promised = number
        return ViewReport(
            promised=number,
            sealed_round=self.sealed_round,
            chain_hash=self.chain_hash,
            applied_round=self.sealed_round,
            outer_hash=None,
        )

    def install(self, view: View) -> None:
        """Take a view. Asserts that its base forgets nothing that was sealed here."""
        if self.view is not None and view.number <= self.view.number:
            return
        assert self.history.extends(view.base_hash, self.chain_hash), (
            f"view {view.number} is based on round {view.base_round}, which forgets round {self.sealed_round}"
        )
        self.view = view
        self.promised = max(self.promised, view.number)
        self.chain_hash = view.base_hash

    def may_seal(self) -> bool:
        """Say whether this gateway still serves its view."""
        return self.view is not None and self.promised <= self.view.number

    def learn(self, chain_hash: str, view_number: int) -> None:
        """Take a sealed round from the hub, unless a later view was promised."""
        if self.view is None or view_number != self.view.number or self.promised > view_number:
            return
        if self.history.extends(chain_hash, self.chain_hash):
            self.chain_hash = chain_hash
