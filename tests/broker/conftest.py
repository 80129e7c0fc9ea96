"""What the tests of the journey ask for: a market of their own on each engine, copied from one that was made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.broker.speaking import Scene


@pytest.fixture
def scene(market_url: str, tmp_path: Path) -> Iterator[Scene]:
    """A market with three sites of two slots each, audited when the test ends."""
    scene = Scene(market_url, tmp_path / "home")
    yield scene
    scene.close()
