"""The ranks' end of the round log: `training.exchange.Exchange` over the gateway's Unix socket.

Every call makes a connection of its own, so threads may share a client. A gateway that restarts
keeps what it had acknowledged; a call meanwhile repeats until the job's patience is over. All
calls may be repeated: the gateway treats an equal repeat as the same one.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import shutil
import threading
from pathlib import Path
from typing import Final

from training.clock import Clock, SystemClock
from training.errors import ExchangeError
from training.exchange import Position, SampleRange, SealedRound
from training.roundlog.errors import ExchangeRefusedError, Reason, read_refusal
from training.roundlog.ranks_wire import (
    POLL_WAIT_S_MAX,
    ROUND_HEADER,
    AppliedRequest,
    CommitRequest,
    Measurements,
    position_json,
    sealed_round_json,
)
from training.roundlog.unix_http import Answer, Receive, exchange

_ANSWER_BYTES_MAX: Final = 64_000_000
_FRAGMENT_BYTES_MAX: Final = 1 << 34
# A local gateway answers in milliseconds; the margin is for one that reads or hashes a big blob.
_ANSWER_MARGIN_S: Final = 30.0
_RETRY_FIRST_S: Final = 0.05
_RETRY_LONGEST_S: Final = 1.0


class GatewayClient:
    """A site's ranks on the round log (see `training.exchange.Exchange` for what each call means)."""

    def __init__(self, socket_path: str, patience_s: float, clock: Clock | None = None) -> None:
        """Speak to the gateway behind `socket_path`; no call outlasts `patience_s` seconds by much."""
        self._socket_path = socket_path
        self._patience_s = patience_s
        self._clock = clock or SystemClock()
        self._pause = threading.Event()

    def position(self) -> Position:
        """Wait for the first view and return where to start."""
        return position_json.validate_json(self._poll("/position", "a first view of the job").body)

    def post_fragment(self, round_number: int, fragment: int, payload: bytes) -> None:
        """Hand over one compressed fragment of this site's contribution to `round_number`."""
        self._call("PUT", f"/rounds/{round_number}/fragments/{fragment}", payload)

    def commit(
        self,
        round_number: int,
        *,
        weight: int,
        samples: tuple[SampleRange, ...],
        fragments: int,
        outer_hash: str,
    ) -> None:
        """Complete the contribution; `outer_hash` is of the state before it. A repeat changes nothing."""
        request = CommitRequest(weight=weight, samples=samples, fragments=fragments, outer_hash=outer_hash)
        self._call("POST", f"/rounds/{round_number}/commit", request.model_dump_json().encode())

    def await_sealed(self, round_number: int) -> SealedRound:
        """Wait until `round_number` is sealed and its blobs are here.

        Raises ExchangeError after patience, and ExchangeRefusedError with reason
        snapshot.needed where this site's state left the chain: see `position` then.
        """
        answer = self._poll(f"/rounds/{round_number}/sealed", f"the seal of round {round_number}")
        return sealed_round_json.validate_json(answer.body)

    def sealed_already(self, round_number: int) -> SealedRound | None:
        """Return `round_number` where it is sealed and its blobs are here, None where not; does not wait."""
        answer = self._call("GET", f"/rounds/{round_number}/sealed?wait_s=0", None)
        return None if answer.status == http.client.NO_CONTENT else sealed_round_json.validate_json(answer.body)

    def fetch_fragment(self, round_number: int, site_id: str, fragment: int) -> bytes:
        """Return a fragment of a sealed contribution, verified against its signed digest."""
        return self._call("GET", f"/rounds/{round_number}/sites/{site_id}/fragments/{fragment}", None).body

    def applied(self, round_number: int, outer_hash: str) -> None:
        """Report that the site has applied `round_number` and holds the state with this hash."""
        request = AppliedRequest(outer_hash=outer_hash)
        self._call("POST", f"/rounds/{round_number}/applied", request.model_dump_json().encode())

    def offer_snapshot(self, round_number: int, path: str) -> None:
        """Let peers that join fetch the outer state after `round_number` from this safetensors file.

        The bytes are copied to the gateway, so the file may change afterwards.
        """
        self._call("PUT", f"/rounds/{round_number}/snapshot", Path(path))

    def fetch_snapshot(self, path: str) -> int:
        """Write a peer's newest outer state to `path` and return the round that it stands after."""
        part = Path(f"{path}.part")

        def receive(response: http.client.HTTPResponse) -> bytes:
            with part.open("wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
            return (response.getheader(ROUND_HEADER) or "").encode()

        try:
            round_number = int(self._poll("/snapshot", "a snapshot from a peer", receive=receive).body)
            part.replace(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()
        return round_number

    def report(self, measurements: dict[str, float]) -> None:
        """Append one row of measurements to the site's metrics; a figure that is not finite becomes null."""
        values = {name: value if math.isfinite(value) else None for name, value in measurements.items()}
        self._call("POST", "/report", Measurements(values=values).model_dump_json().encode())

    def _poll(self, path: str, awaited: str, receive: Receive | None = None) -> Answer:
        """Ask until the answer is there. Raises ExchangeError after patience."""
        deadline_s = self._clock.monotonic_s() + self._patience_s
        while True:
            remaining_s = deadline_s - self._clock.monotonic_s()
            wait_s = max(0.0, min(POLL_WAIT_S_MAX, remaining_s))
            answer = self._call(
                "GET", f"{path}?wait_s={wait_s:.3f}", None, patience_s=max(remaining_s, 0.0), receive=receive
            )
            if answer.status != http.client.NO_CONTENT:
                return answer
            if self._clock.monotonic_s() >= deadline_s:
                message = (
                    f"{awaited} did not come within the job's patience of {self._patience_s:g} s; "
                    "the site's gateway.log and the job's page say who is missing"
                )
                raise ExchangeError(message)

    def _call(
        self,
        method: str,
        path: str,
        body: bytes | Path | None,
        *,
        patience_s: float | None = None,
        receive: Receive | None = None,
    ) -> Answer:
        """Make one call, repeated while the gateway is away or busy. Raises ExchangeError."""
        deadline_s = self._clock.monotonic_s() + (self._patience_s if patience_s is None else patience_s)
        retry_s = _RETRY_FIRST_S
        while True:
            try:
                answer = self._exchange(method, path, body, receive)
                trouble = "it is busy"
            except (OSError, http.client.HTTPException) as error:
                answer, trouble = None, str(error)
            if answer is not None and answer.status < http.client.BAD_REQUEST:
                return answer
            if answer is not None:
                refusal = read_refusal(answer.status, answer.body)
                if refusal.code != Reason.BUSY:
                    raise ExchangeRefusedError(refusal.code, f"{method} {path}: {refusal.message}")
                trouble = refusal.message
            if self._clock.monotonic_s() + retry_s > deadline_s:
                message = f"the site's gateway did not serve {method} {path} within patience: {trouble}"
                raise ExchangeError(message)
            self._pause.wait(retry_s)
            retry_s = min(2 * retry_s, _RETRY_LONGEST_S)

    def _exchange(self, method: str, path: str, body: bytes | Path | None, receive: Receive | None) -> Answer:
        timeout_s = POLL_WAIT_S_MAX + _ANSWER_MARGIN_S
        limit = _FRAGMENT_BYTES_MAX if "/fragments/" in path else _ANSWER_BYTES_MAX
        if isinstance(body, Path):
            with body.open("rb") as file:
                length = os.fstat(file.fileno()).st_size
                return exchange(
                    self._socket_path, method, path, body=file, length=length, timeout_s=timeout_s, body_bytes_max=limit
                )
        return exchange(
            self._socket_path,
            method,
            path,
            body=body,
            timeout_s=timeout_s,
            body_bytes_max=limit,
            receive=receive,
        )
