"""The round log of one attempt as the broker can see it: rounds sealed, chain hash, promises.

`History` is the truth: which round follows which. An attempt's gateway holds a position in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from training.exchange import Leaving
from training.roundlog.view import GENESIS_HASH, View, ViewReport


@dataclass(slots=True)
class History:
    """Every round that was ever sealed, by its hash: (number, hash before)."""

    rounds: dict[str, tuple[int, str]] = field(default_factory=lambda: {GENESIS_HASH: (0, GENESIS_HASH)})
    known_by: dict[str, set[str]] = field(default_factory=dict)
    # Which sites stop after a round, as its seal says.
    stopping: dict[str, frozenset[str]] = field(default_factory=dict)

    def seal(self, job_id: str, before: str, view_number: int, said: Mapping[str, Leaving | None]) -> str:
        """Add the round after `before` and return its hash; `said` is what each site said with its contribution."""
        number = self.rounds[before][0] + 1
        sealed = hashlib.sha256(f"{job_id}/{before}/{view_number}/{number}".encode()).hexdigest()
        self.rounds[sealed] = (number, before)
        all_stop = 2 * sum(each == "gang" for each in said.values()) > len(said)
        self.stopping[sealed] = frozenset(site for site, each in said.items() if all_stop or each == "site")
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

    site_id: str
    history: History
    view: View | None = None
    promised: int = 0
    chain_hash: str = GENESIS_HASH
    # What the hub has of this site: the view and the chain that its contribution continues.
    delivered: tuple[int, str] | None = None
    # What it said with that contribution: that its site stops after the round, or that all do.
    delivered_leaving: Leaving | None = None
    hub_lost_since_s: float | None = None
    members_lost_since_s: dict[str, float] = field(default_factory=dict)

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
        """Take a view. Asserts that its base forgets nothing that was sealed here.

        A site that was left out of the last view, and joins, may hold one round that no other member ever knew.
        """
        if view.number < self.promised or (self.view is not None and view.number <= self.view.number):
            return
        if self.site_id in view.joining:
            self._drop_what_nobody_else_knew(view)
        assert self.history.extends(view.base_hash, self.chain_hash), (
            f"view {view.number} is based on round {view.base_round}, which forgets round {self.sealed_round}"
        )
        self.view = view
        self.promised = view.number
        self._reach(view.base_hash)
        self.delivered = self.hub_lost_since_s = None
        self.members_lost_since_s = {}

    def _drop_what_nobody_else_knew(self, view: View) -> None:
        members = {member.site_id for member in view.members} - set(view.joining)
        dropped = 0
        while not self.history.extends(view.base_hash, self.chain_hash):
            knowing = self.history.known_by[self.chain_hash]
            assert not knowing & members, f"view {view.number} forgets round {self.sealed_round}, known to {knowing}"
            knowing.discard(self.site_id)
            self.chain_hash = self.history.rounds[self.chain_hash][1]
            dropped += 1
        assert dropped <= 1, f"{self.site_id} sealed {dropped} rounds alone although all must contribute"

    def _reach(self, chain_hash: str) -> None:
        self.chain_hash = chain_hash
        self.history.known_by.setdefault(chain_hash, set()).add(self.site_id)

    def deliver(self, leaving: Leaving | None = None) -> None:
        """Bring this site's contribution to the open round to the hub. A promise does not call it back."""
        if self.view is not None and self.may_seal() and self.delivered != (self.view.number, self.chain_hash):
            self.delivered, self.delivered_leaving = (self.view.number, self.chain_hash), leaving

    def has_delivered(self, view_number: int, chain_hash: str) -> bool:
        """Say whether the hub holds this site's contribution to the round after `chain_hash`."""
        return self.delivered == (view_number, chain_hash)

    def sealed(self, chain_hash: str) -> None:
        """Take a round that this very gateway has sealed as the hub."""
        self._reach(chain_hash)

    def may_seal(self) -> bool:
        """Say whether this gateway still serves its view."""
        return self.view is not None and self.promised <= self.view.number

    def learn(self, chain_hash: str, view_number: int) -> None:
        """Take a sealed round from the hub, unless a later view was promised."""
        if self.view is None or view_number != self.view.number or self.promised > view_number:
            return
        if self.history.extends(chain_hash, self.chain_hash):
            self._reach(chain_hash)
