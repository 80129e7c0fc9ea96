"""The market as the broker's services see it: one object with the edges that they work through.

Services are functions that take the `Market` first. They read the clock, the ids and the
database through it and nothing else, so that the fault simulator can run them unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

from broker.artifacts import ArtifactStore
from broker.database.engine import Database
from broker.doorbell import Doorbell
from broker.identity.authority import Authority
from broker.ids import Ids
from broker.settings import Settings
from training.clock import Clock


@dataclass(frozen=True, slots=True)
class Market:
    """Everything that a service of the broker may touch."""

    settings: Settings
    database: Database
    clock: Clock
    ids: Ids
    authority: Authority
    artifacts: ArtifactStore
    doorbell: Doorbell
