"""A thin client of the broker's public API: one method a route, JSON in and out, errors as `CliError`.

Used by every command and by the demo; whatever this can do, anyone can do over HTTPS. A GET is tried again when
the broker restarts; a POST carries an idempotency key, so that trying it again is safe too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import ssl
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote, urlsplit

import httpx

from broker.cli.config import Context
from broker.cli.errors import CliError, RightsError, UnreachableError, UsageError, from_problem

Json = dict[str, Any]

TIMEOUT_S: Final = 30.0
CONNECT_TIMEOUT_S: Final = 5.0
TRIES: Final = 3
RETRY_S: Final = 0.4
RETRIED_STATUSES: Final = frozenset({429, 502, 503, 504})
RETRY_AFTER_S_MAX: Final = 10.0
CHUNK_BYTES: Final = 1_000_000
PAGES_MAX: Final = 1000
LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})


class BrokerClient:
    """A caller's connection to one market; a context manager."""

    def __init__(self, context: Context) -> None:
        """Prepare the connection; nothing is sent yet.

        Raises UsageError for an address that is not https:// (loopback excepted) or an unreadable authority.
        """
        self._url = _checked_url(context.url)
        headers = {"Accept": "application/json", "User-Agent": "hansa-cli"}
        if context.token:
            headers["Authorization"] = f"Bearer {context.token}"
        self._http = httpx.Client(
            base_url=self._url,
            headers=headers,
            verify=_trust(context.ca),
            timeout=httpx.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            trust_env=urlsplit(self._url).hostname not in LOOPBACK,  # a proxy cannot reach this host's own loopback
        )

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self._http.close()

    # --- What anyone may see ----------------------------------------------------------------------

    def prices(self) -> Json:
        """Return the prices of the last round, by pool."""
        document = self._get("/v1/prices")
        for _ in range(PAGES_MAX):
            if not document["next_cursor"]:
                break
            page = self._get("/v1/prices", cursor=document["next_cursor"])
            document |= {"items": document["items"] + page["items"], "next_cursor": page["next_cursor"]}
        return document

    def rounds(self, limit: int = 20) -> list[Json]:
        """Return the newest rounds, newest first."""
        return list(self._pages("/v1/rounds", limit))

    def round(self, number: int) -> Json:
        """Return one round with its prices, placements and certificate."""
        return self._get(f"/v1/rounds/{number}")

    def certificate(self, number: int) -> Json:
        """Return a round's signed certificate."""
        return self._get(f"/v1/rounds/{number}/certificate")

    # --- What a tenant may do ---------------------------------------------------------------------

    def account(self) -> Json:
        """Return the caller's balance, what is held, what its jobs cost in an hour and may cost."""
        return self._get("/v1/account")

    def quote(self, spec: Json, goal: str | None = None) -> Json:
        """Return what the job could get at the last prices, without any effect; with a goal, also what to ask for."""
        return self._post("/v1/quote" if goal is None else f"/v1/quote?goal={_word(goal)}", spec)

    def upload_workdir(self, packed: bytes, progress: Callable[[int, int], None] | None = None) -> str:
        """Bring a packed workdir to the broker and return its digest; what it holds already is not sent again."""
        digest = hashlib.sha256(packed).hexdigest()
        path = f"/v1/workdirs/{digest}"
        state = self._get(path, size=len(packed))
        while not state["complete"]:
            offset = int(state["held_bytes"])
            chunk = packed[offset : offset + CHUNK_BYTES]
            state = self._send(
                "PUT",
                path,
                params={"offset": offset, "size": len(packed)},
                content=chunk,
                headers={"Content-Type": "application/octet-stream"},
            ).json()
            if int(state["held_bytes"]) <= offset and not state["complete"]:
                raise UnreachableError(f"the upload of the workdir does not advance past {offset} bytes")
            if progress is not None:
                progress(int(state["held_bytes"]), len(packed))
        return digest

    def submit(self, spec: Json, key: str | None = None) -> Json:
        """Submit a job and return it; the same `key` with the same job never makes a second one."""
        return self._post("/v1/jobs", spec, key=key)

    def jobs(self, limit: int = 50, state: str | None = None) -> list[Json]:
        """Return the caller's jobs, newest first."""
        return list(self._pages("/v1/jobs", limit, **({"state": state} if state else {})))

    def job(self, job_id: str) -> Json:
        """Return one job."""
        return self._get(f"/v1/jobs/{_word(job_id)}")

    def cancel(self, job_id: str) -> Json:
        """Ask for a job's end."""
        return self._post(f"/v1/jobs/{_word(job_id)}/cancel", {})

    def events(self, job_id: str, limit: int = 1000) -> list[Json]:
        """Return what happened to a job, in order."""
        return list(self._pages(f"/v1/jobs/{_word(job_id)}/events", limit))

    def stream(self, job_id: str, name: str, **where: str | int | None) -> Json:
        """Return a piece of a job's `log` or `metrics`; `where` says from which site and offset."""
        given = {key: value for key, value in where.items() if value is not None}
        return self._get(f"/v1/jobs/{_word(job_id)}/{name}", **given)

    def explanation(self, job_id: str) -> Json:
        """Return why a job stands where it does, and what would change it."""
        return self._get(f"/v1/jobs/{_word(job_id)}/explanation")

    def artifacts(self, job_id: str) -> list[Json]:
        """Return what a job has left: checkpoints and outputs."""
        return list(self._get(f"/v1/jobs/{_word(job_id)}/artifacts")["items"])

    def invoice(self, job_id: str) -> Json:
        """Return what a job has cost, line by line."""
        return self._get(f"/v1/jobs/{_word(job_id)}/invoice")

    def download(self, path: str, target: Path, digest: str | None = None) -> int:
        """Write the file at the API's `path` to `target`, its digest checked, and return its size."""
        partial = target.with_name(target.name + ".partial")
        sha256, size = hashlib.sha256(), 0
        try:
            with (
                _reported(self._url),
                self._http.stream("GET", path) as answer,
                partial.open("wb") as stream,
            ):
                if answer.is_error:
                    answer.read()
                    raise _problem(answer)
                for chunk in answer.iter_bytes():
                    stream.write(chunk)
                    sha256.update(chunk)
                    size += len(chunk)
            if digest is not None and sha256.hexdigest() != digest:
                raise CliError(f"{target.name} arrived damaged", next_step="fetch it again", code="cli.damaged")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return size

    def set_budget(self, budget_micros_per_hour: int | None) -> Json:
        """Bound what the caller's jobs may cost in an hour, and return the account; None: no bound."""
        return self._put("/v1/account/budget", {"budget_micros_per_hour": budget_micros_per_hour})

    def tokens(self) -> Json:
        """Return the caller's tokens, newest first, without their secrets."""
        return self._get("/v1/tokens")

    def create_token(self, terms: Json) -> Json:
        """Make a token that may do no more than the caller's, and return it with its secret."""
        return self._post("/v1/tokens", terms)

    def revoke_token(self, token_id: str) -> Json:
        """Revoke one of the caller's tokens."""
        return self._post(f"/v1/tokens/{_word(token_id)}/revoke", {})

    def secrets(self) -> Json:
        """Return the names of the caller's secrets and when each was set."""
        return self._get("/v1/secrets")

    def set_secret(self, name: str, value: str) -> Json:
        """Store a value that the caller's jobs may name."""
        return self._put(f"/v1/secrets/{_word(name)}", {"value": value})

    def delete_secret(self, name: str) -> Json:
        """Forget one of the caller's secrets."""
        return _document(self._send("DELETE", f"/v1/secrets/{_word(name)}"))

    # --- What an admin may do ---------------------------------------------------------------------

    def admin_get(self, path: str, **parameters: str | int) -> Json:
        """Return what the admin route below `/v1/admin` says."""
        return self._get(f"/v1/admin{path}", **parameters)

    def admin_post(self, path: str, body: Json, key: str | None = None) -> Json:
        """Do what the admin route below `/v1/admin` does."""
        return self._post(f"/v1/admin{path}", body, key)

    def admin_put(self, path: str, body: Json) -> Json:
        """Set what the admin route below `/v1/admin` holds."""
        return self._put(f"/v1/admin{path}", body)

    def admin_list(self, path: str, limit: int = 100) -> list[Json]:
        """Return the rows of a paged admin route."""
        return list(self._pages(f"/v1/admin{path}", limit))

    # --- One request ------------------------------------------------------------------------------

    def _get(self, path: str, **parameters: str | int) -> Json:
        return _document(self._send("GET", path, params=parameters))

    def _post(self, path: str, body: Json, key: str | None = None) -> Json:
        headers = {"Idempotency-Key": key or uuid.uuid4().hex, "Content-Type": "application/json"}
        return _document(self._send("POST", path, content=json.dumps(body).encode(), headers=headers))

    def _put(self, path: str, body: Json) -> Json:
        headers = {"Content-Type": "application/json"}
        return _document(self._send("PUT", path, content=json.dumps(body).encode(), headers=headers))

    def _pages(self, path: str, limit: int, **parameters: str | int) -> Iterator[Json]:
        """Yield at most `limit` rows, page by page."""
        left, cursor = limit, None
        for _ in range(PAGES_MAX):
            page = self._get(path, limit=min(left, 100), **parameters, **({"cursor": cursor} if cursor else {}))
            rows = page["items"]
            yield from rows[:left]
            left -= len(rows)
            cursor = page.get("next_cursor")
            if not cursor or left <= 0 or not rows:
                return

    def _send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        for left in reversed(range(TRIES)):
            wait_s = RETRY_S
            try:
                with _reported(self._url):
                    answer = self._http.request(method, path, params=params, content=content, headers=headers)
            except UnreachableError:
                if not left:
                    raise
            else:
                if not answer.is_error:
                    return answer
                if answer.status_code not in RETRIED_STATUSES or not left:
                    raise _problem(answer)
                wait_s = _wait_s(answer)
            time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")


def _wait_s(answer: httpx.Response) -> float:
    """Return how long the broker asks to wait, within bounds."""
    asked = answer.headers.get("Retry-After", "")
    return min(RETRY_AFTER_S_MAX, float(asked)) if asked.isascii() and asked.isdigit() else RETRY_S


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return url.rstrip("/")
    if parts.scheme == "http" and parts.hostname in LOOPBACK:
        return url.rstrip("/")
    raise UsageError(
        f"{url!r} is not the address of a broker",
        next_step="use https://HOST:PORT; plain http:// is allowed to this machine's loopback only",
    )


def _trust(ca: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if ca is None else str(ca))
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"the certificate authority {ca} cannot be read: {error}", next_step="HANSA_CA names a PEM file"
        ) from None


@contextlib.contextmanager
def _reported(url: str) -> Iterator[None]:
    """Turn what httpx raises into words for people."""
    try:
        yield
    except httpx.TransportError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise UnreachableError(
                f"the broker at {url} shows a certificate that is not of the pinned authority",
                next_step="check the address; HANSA_CA must name the market's own ca.pem",
                code="cli.untrusted",
            ) from None
        what = "did not answer in time" if isinstance(error, httpx.TimeoutException) else "cannot be reached"
        raise UnreachableError(
            f"the broker at {url} {what} ({error or type(error).__name__})",
            next_step="check HANSA_URL and that the broker runs (`hansa broker serve`)",
        ) from None
    except httpx.InvalidURL as error:
        raise UsageError(f"{url!r} is not an address: {error}") from None


def _document(answer: httpx.Response) -> Json:
    try:
        document = answer.json()
    except ValueError:
        raise UnreachableError(
            f"{answer.url} does not answer in JSON; it may not be a broker", next_step="check HANSA_URL"
        ) from None
    if not isinstance(document, dict):
        raise UnreachableError(f"{answer.url} answers with a list where the API has objects; check HANSA_URL")
    return document


def _problem(answer: httpx.Response) -> CliError:
    try:
        problem = answer.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {"detail": f"{answer.url} answered {answer.status_code} {answer.reason_phrase}"}
    error = from_problem(answer.status_code, problem)
    if isinstance(error, RightsError) and "Authorization" not in answer.request.headers:
        error.detail = "no token is set"
    return error


def _word(text: str) -> str:
    """Return `text` as one segment of a path."""
    return quote(text, safe="") or "-"
