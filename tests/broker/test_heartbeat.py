"""What the broker keeps of who speaks: an agent that started anew is on record, one that goes on is not."""

from __future__ import annotations

from tests.broker.speaking import Scene


def test_an_agent_that_started_anew_is_on_record_once(scene: Scene) -> None:
    ada = scene.sites["ada"]
    ada.beat()
    assert scene.events("agent") == []
    for boot in ("boot-2", "boot-2"):
        ada.sequence += 1
        ada.send(ada.heartbeat().model_copy(update={"boot": boot}), ada.sequence)
    assert [(event.site_id, event.after) for event in scene.events("agent")] == [("ada", "restarted")]
