"""Only a ring is a ring: whatever else the bytes are, they are refused with one of a few reasons."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from celery import Celery
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.celery_guard import RING_BYTES_MAX, TASKS, Gate, NotARingError, read_ring, write_ring
from broker.tasks import app
from training.clock import ManualClock

NOW_MS = 1_800_000_000_000
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def celery_message(**options: Any) -> dict[str, Any]:
    """A ring as the very Celery that is installed writes it."""
    written: list[dict[str, Any]] = []
    sender = Celery("sender", broker="memory://")
    with sender.connection_for_write() as connection:
        channel = connection.default_channel
        put = channel._put
        channel._put = lambda queue, message, **more: (written.append(message), put(queue, message, **more))
        producer = sender.amqp.Producer(channel)
        sender.send_task("hansa.clear", queue="rounds", producer=producer, **options)
    return written[0]


def reason_of(message: Any) -> str:
    with pytest.raises(NotARingError) as refused:
        read_ring(message if isinstance(message, bytes) else json.dumps(message).encode(), TASKS, NOW_MS)
    return refused.value.reason


def test_what_celery_sends_is_a_ring() -> None:
    assert read_ring(json.dumps(celery_message(expires=30)).encode(), TASKS, 0) == "hansa.clear"
    assert set(app.tasks) >= TASKS


def test_what_the_guard_writes_is_a_ring_for_the_same_task() -> None:
    for task in TASKS:
        assert read_ring(write_ring(task), TASKS, NOW_MS) == task


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"args": [1]}, "arguments"),
        ({"kwargs": {"job": "x"}}, "arguments"),
        ({"countdown": 10}, "put off"),
        ({"link": Celery("l").signature("hansa.settle")}, "arguments"),
        ({"expires": -5}, "expired"),
        ({"task_id": "../" * 3}, "no id"),
        ({"serializer": "yaml"}, "not JSON inside"),
    ],
)
def test_what_celery_can_say_besides_is_no_ring(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotARingError) as refused:
        read_ring(json.dumps(celery_message(**options)).encode(), TASKS, 10**15 if reason == "expired" else 0)
    assert refused.value.reason == reason


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_raise_anything_else(item: bytes) -> None:
    with pytest.raises(NotARingError):
        read_ring(item, TASKS, NOW_MS)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_ring_with_a_part_exchanged_is_a_ring_or_refused(data: st.DataObject) -> None:
    message = json.loads(write_ring("hansa.clear"))
    part = data.draw(st.sampled_from([message, message["headers"], message["properties"]]))
    name = data.draw(st.sampled_from([*part, "eta", "expires", "compression"]))
    part[name] = data.draw(JSON)
    try:
        assert read_ring(json.dumps(message).encode(), TASKS, NOW_MS) == "hansa.clear"
    except NotARingError:
        return
    assert name not in ("task", "id", "body", "headers", "content-type") or part[name] == "hansa.clear" or name == "id"


def test_size_and_depth_are_bounded() -> None:
    assert reason_of(b" " * (RING_BYTES_MAX + 1)) == "too large"
    assert reason_of(b"[" * RING_BYTES_MAX) == "not JSON"
    deep = json.loads(write_ring("hansa.clear")) | {"body": base64.b64encode(b"[" * 5000).decode()}
    assert reason_of(deep) == "unreadable body"


def test_the_gate_counts_each_reason() -> None:
    gate = Gate(TASKS, ManualClock())
    assert gate.admit("rounds", write_ring("hansa.settle")) is not None
    assert [gate.admit("rounds", item) for item in (b"x", b"y", b"{}")] == [None] * 3
    assert gate.dropped == {"not JSON": 2, "not JSON inside": 1}
