"""One market for all tests of the kill campaign: starting one takes longer than most kills take to heal."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.journey.market import RunningMarket, running_market


@pytest.fixture(scope="session")
def _whole_market(request: pytest.FixtureRequest) -> Iterator[RunningMarket]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HANSA_")]:
            patch.delenv(name)
        with running_market(lambda: request.session.testsfailed > 0) as market:
            yield market


@pytest.fixture
def market(_whole_market: RunningMarket) -> Iterator[RunningMarket]:
    """A running market with all of its processes and without a job; what a test kills it starts again."""
    yield _whole_market
    _whole_market.restart_dead()
