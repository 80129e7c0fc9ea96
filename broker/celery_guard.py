"""Lets nothing but rings into a worker: whatever else stands in Redis is dropped and counted, and never parsed by Celery.

Redis is not trusted. A ring is a few hundred bytes of JSON that name one of our tasks, without
arguments; `read_ring` looks at the bytes as they come from the server, and what Celery then sees is
a message written anew from the task's name. So no header, body, serialiser or date of a stranger
reaches kombu's or Celery's parsers, some of which end the worker and one of which loops for ever.

`guard_redis` hooks in where kombu's own key prefix does, between the server's answer and the
channel. Nothing else is read from Redis: no acknowledgements (a lost ring is made up by the beat),
no bindings, and by the settings in `broker.tasks` no remote control and no events.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from queue import Empty
from typing import Any, Final

import redis
import structlog
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport.redis import Channel, Transport

from training.clock import Clock, SystemClock

# A ring as Celery writes it takes about 900 bytes.
RING_BYTES_MAX: Final = 8192
TASKS: Final = frozenset({"hansa.clear", "hansa.reconcile", "hansa.settle"})

_ID: Final = re.compile(r"[0-9A-Za-z-]{1,64}", re.ASCII)
_POPS: Final = frozenset({"BRPOP", "RPOP"})

_log = structlog.get_logger(__name__)


class NotARingError(ValueError):
    """A message is no ring of ours; `reason` is one of a few words, so that a counter can be kept for each."""

    def __init__(self, reason: str) -> None:
        """Keep the reason."""
        super().__init__(f"this message is no ring: {reason}")
        self.reason = reason


def read_ring(item: bytes, tasks: frozenset[str], now_ms: int) -> str:
    """Return the task that a message rings for. Raises NotARingError, whatever the bytes are."""
    if len(item) > RING_BYTES_MAX:
        raise NotARingError("too large")
    message = _dict(_json(item, "not JSON"), "no object")
    if message.get("content-type") != "application/json" or message.get("content-encoding") != "utf-8":
        raise NotARingError("not JSON inside")
    headers = _dict(message.get("headers"), "no headers")
    task, identity = headers.get("task"), headers.get("id")
    if not isinstance(identity, str) or _ID.fullmatch(identity) is None:
        raise NotARingError("no id")
    if not isinstance(task, str) or task not in tasks:
        raise NotARingError("unknown task")
    if headers.get("eta") is not None:
        raise NotARingError("put off")
    body = _body(message.get("body"), _dict(message.get("properties"), "no properties").get("body_encoding"))
    if not isinstance(body, list) or len(body) != 3 or body[:2] != [[], {}] or not _is_empty(body[2]):  # noqa: PLR2004  Celery's (args, kwargs, embed)
        raise NotARingError("arguments")
    if _ends_ms(headers.get("expires"), now_ms) <= now_ms:
        raise NotARingError("expired")
    return task


def write_ring(task: str) -> bytes:
    """Return a message for `task` as Celery writes it, with nothing of whoever rang."""
    identity = str(uuid.uuid4())
    return json.dumps(
        {
            "body": base64.b64encode(b"[[], {}, {}]").decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"lang": "py", "task": task, "id": identity, "root_id": identity, "argsrepr": "()"},
            "properties": {
                "correlation_id": identity,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": ""},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": identity,
            },
        }
    ).encode()


class Gate:
    """Reads what comes out of Redis, and counts by reason what it drops."""

    def __init__(self, tasks: frozenset[str], clock: Clock) -> None:
        """Let rings for `tasks` pass."""
        self._tasks = tasks
        self._clock = clock
        self.dropped: Counter[str] = Counter()

    def admit(self, queue: str, item: bytes) -> bytes | None:
        """Return the message for Celery, or None where there is none to give."""
        try:
            return write_ring(read_ring(item, self._tasks, self._clock.now_ms()))
        except NotARingError as error:
            self.drop(queue, error.reason, len(item))
            return None

    def drop(self, queue: str, reason: str, size_bytes: int) -> None:
        """Count a message; log the first of its kind and then each time that their number has doubled."""
        self.dropped[reason] += 1
        count = self.dropped[reason]
        if count & (count - 1) == 0 and reason != "expired":  # after an outage many have, by our own doing
            _log.warning("ring.dropped", queue=queue[:64], reason=reason, size_bytes=size_bytes, dropped=count)


GATE: Final = Gate(TASKS, SystemClock())


class GuardedRedis(redis.Redis):
    """A client whose pops pass a gate; one that is refused looks like a pop that found nothing."""

    def __init__(self, *, gate: Gate, **options: Any) -> None:  # noqa: ANN401  as redis-py has it
        """Connect as redis-py does."""
        super().__init__(**options)
        self._gate = gate

    def parse_response(self, connection: Any, command_name: str, **options: Any) -> Any:  # noqa: ANN401  as redis-py has it
        """Return the server's answer, or None in the place of a message that is no ring."""
        answer = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]  # redis-py
        if command_name == "BRPOP" and answer:
            queue, item = answer
            admitted = self._gate.admit(_text(queue), bytes(item))
            return None if admitted is None else (queue, admitted)
        if command_name == "RPOP" and answer:
            return self._gate.admit("", bytes(answer))
        return answer


class GuardedChannel(Channel):
    """A channel that pops through the gate and keeps no bindings: we send to queues by their names."""

    def _get_client(self) -> Callable[..., GuardedRedis]:
        super()._get_client()  # type: ignore[no-untyped-call]  # kombu has no types; checks redis-py's version
        return partial(GuardedRedis, gate=GATE)

    def _queue_bind(self, *_arguments: Any) -> None:  # noqa: ANN401  kombu has no types
        pass

    def _new_queue(self, queue: Any, auto_delete: Any = False, **options: Any) -> Any:  # noqa: ANN401, FBT002  as kombu has it
        self._remove_what_is_no_list(queue)
        return super()._new_queue(queue, auto_delete, **options)  # type: ignore[no-untyped-call]  # kombu has no types

    def _brpop_read(self, **options: Any) -> Any:  # noqa: ANN401  as kombu has it
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]  # kombu has no types
        except redis.ResponseError as error:
            if not str(error).startswith("WRONGTYPE"):
                raise
            for queue in self.active_queues:
                self._remove_what_is_no_list(queue)
            raise Empty from None

    def _remove_what_is_no_list(self, queue: str) -> None:
        with self.conn_or_acquire() as client:
            for priority in self.priority_steps:
                key = self._q_for_pri(queue, priority)  # type: ignore[no-untyped-call]  # kombu has no types
                if client.type(key) not in (b"none", b"list"):
                    client.delete(key)
                    GATE.drop(queue, "no list", 0)


class GuardedTransport(Transport):
    """Kombu's transport over Redis with the gate in each channel."""

    Channel = GuardedChannel


def guard_redis() -> None:
    """Put the gate into every connection to Redis that kombu makes in this process from now on.

    By the transport's name, because kombu's pools copy connections by their URLs and nothing else.
    """
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:{GuardedTransport.__name__}"


def _text(name: bytes | str) -> str:
    return name if isinstance(name, str) else name.decode("utf-8", "replace")


def _json(text: bytes | str, reason: str) -> object:
    try:
        document: object = json.loads(text)
    except (ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
        raise NotARingError(reason) from None
    return document


def _dict(value: object, reason: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise NotARingError(reason)
    return value


def _body(body: object, encoding: object) -> object:
    if not isinstance(body, str) or encoding not in ("base64", "utf-8", None):
        raise NotARingError("unreadable body")
    try:
        content = base64.b64decode(body, validate=True) if encoding == "base64" else body.encode()
    except (binascii.Error, ValueError):
        raise NotARingError("unreadable body") from None
    return _json(content, "unreadable body")


def _is_empty(embed: object) -> bool:
    # Celery's callbacks, errbacks, chain and chord: names of further tasks to run.
    return isinstance(embed, dict) and all(value is None for value in embed.values())


def _ends_ms(expires: object, now_ms: int) -> int:
    if expires is None:
        return now_ms + 1
    try:
        ends = datetime.fromisoformat(expires) if isinstance(expires, str) else None
    except ValueError:
        ends = None
    if ends is None:
        raise NotARingError("no date")
    if ends.tzinfo is None:
        ends = ends.replace(tzinfo=UTC)
    try:
        return int(ends.timestamp() * 1000)
    except (ValueError, OverflowError):
        raise NotARingError("no date") from None
