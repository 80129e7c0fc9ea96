"""Listens to the broker's wake stream, so that an agent looks when there is something to see.

The stream only says "look now"; what there is comes with the next heartbeat's answer. Without it
the agent goes at the pace of its heartbeat, so every failure here is only a delay.
"""

from __future__ import annotations

import ssl
import threading
from typing import Final

import httpx
import structlog

CONNECT_S: Final = 5.0
# The server writes a comment every 20 s; a stream that is silent for longer is dead.
SILENCE_S: Final = 60.0
RECONNECT_S: Final = 3.0
LOOK: Final = "event: look"

_log = structlog.get_logger(__name__)


class WakeListener:
    """Sets `wake` whenever the stream says so, from a thread of its own."""

    def __init__(self, wake: threading.Event, ca_pem: str) -> None:
        """Trust the broker's authority for an https stream."""
        self._wake = wake
        self._ca_pem = ca_pem
        self._url: str | None = None
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, url: str | None) -> None:
        """Listen to `url` from now on; None, or the URL that is followed already, changes nothing."""
        if url is None or url == self._url:
            return
        self._url = url
        self._changed.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="wake", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        context = ssl.create_default_context(cadata=self._ca_pem)
        with httpx.Client(verify=context, timeout=httpx.Timeout(CONNECT_S, read=SILENCE_S), trust_env=False) as client:
            while True:
                self._changed.clear()
                try:
                    self._listen(client)
                except (httpx.HTTPError, OSError) as error:
                    _log.info("wake.lost", detail=str(error))
                self._changed.wait(RECONNECT_S)

    def _listen(self, client: httpx.Client) -> None:
        assert self._url is not None, "follow() set it before the thread started"
        with client.stream("GET", self._url) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line == LOOK:
                    self._wake.set()
                if self._changed.is_set():
                    return
