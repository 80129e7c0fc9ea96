"""Every metric is in the API's chapter, and the chapter names no other."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from broker.api.app import create_app
from tests.broker.speaking import Scene

CHAPTER = Path(__file__).parents[2] / "broker/api/README.md"


def test_metrics_and_their_chapter_name_the_same(sqlite_schema: Path, tmp_path: Path) -> None:
    path = tmp_path / "market.sqlite3"
    shutil.copy(sqlite_schema, path)
    scene = Scene(f"sqlite:///{path}", tmp_path / "home")
    try:
        scene.start(scene.submit())
        client = create_app(scene.market).test_client()
        client.get("/healthz")
        text = client.get("/metrics").get_data(as_text=True)
    finally:
        scene.close()
    shown = set(re.findall(r"^# TYPE (hansa_\w+) ", text, re.MULTILINE))
    shown -= {name for name in shown if name.endswith("_created")}
    documented = set(re.findall(r"`(hansa_\w+)`", CHAPTER.read_text()))
    assert shown == documented
