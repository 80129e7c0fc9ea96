"""What the tests of the journey ask for: a market of their own on each engine, copied from one that was made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.broker.speaking import Scene

# Modules whose tables other modules write on PostgreSQL in `make test`: their own runs there are the soak's.
ON_POSTGRESQL_IN_THE_SOAK: Final = frozenset(
    {
        "test_advice",
        "test_amends",
        "test_attempts",
        "test_certificates",
        "test_earnings",
        "test_instant",
        "test_last_round",
        "test_memberships",
        "test_moves",
        "test_offered_terms",
        "test_offers",
        "test_probes",
        "test_refusals",
        "test_speeds",
        "test_tenant_limits",
        "test_terms",
        "test_underdelivery",
        "test_views",
    }
)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave some modules' second database to `make soak`."""
    for item in items:
        if item.path.stem in ON_POSTGRESQL_IN_THE_SOAK and "postgresql" in item.name:
            item.add_marker(pytest.mark.soak)


@pytest.fixture
def scene(market_url: str, tmp_path: Path) -> Iterator[Scene]:
    """A market with three sites of two slots each, audited when the test ends."""
    scene = Scene(market_url, tmp_path / "home")
    yield scene
    scene.close()
