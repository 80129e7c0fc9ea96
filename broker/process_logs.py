"""Logs of the broker's processes: JSON lines, or pretty on a terminal, and never with a secret.

Whatever looks like a token, a join string, a password field or a private key is cut out of every
line, and tracebacks come without the frames' variables.
"""

from __future__ import annotations

import re
import sys
from collections.abc import MutableMapping
from typing import Any, Final

import structlog

CUT: Final = "[cut out]"
_SECRET: Final = re.compile(
    r"hansa_(?:tenant|admin)_[0-9a-f]{16}_[0-9a-f]+"
    r"|hansa-join\.[A-Za-z0-9_-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)",
    re.DOTALL,
)
_SECRET_KEYS: Final = frozenset({"password", "token", "secret", "cookie", "authorization", "join_token", "join_string"})


def configure_logs(*, json_lines: bool | None = None) -> None:
    """Set up structlog for this process; JSON unless standard error is a terminal."""
    as_json = not sys.stderr.isatty() if json_lines is None else json_lines
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    )
    plain: list[structlog.typing.Processor] = [structlog.processors.format_exc_info] if as_json else []
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *plain,
            cut_secrets,
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def redacted(text: str) -> str:
    """Return `text` without the secrets in it."""
    return _SECRET.sub(CUT, text)


def cut_secrets(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Cut secrets out of a log line: structlog's processor."""
    for key, value in event.items():
        if key.lower() in _SECRET_KEYS:
            event[key] = CUT
        elif isinstance(value, str):
            event[key] = redacted(value)
        elif not isinstance(value, int | float | bool | type(None)) and key != "exc_info":
            event[key] = redacted(repr(value)) if _SECRET.search(repr(value)) else value
    return event
