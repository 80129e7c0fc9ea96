"""The end of a log as plain text: what a site's ranks printed, made harmless to look at.

The bytes are a stranger's. Jinja escapes the markup in them; here go control characters and
terminal sequences, and text that would turn the page's reading order around.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from broker.streams import StreamStore

TAIL_BYTES: Final = 12_000
LINE_LENGTH_MAX: Final = 1_000
# CSI and OSC sequences first, then all control characters but tab and newline, and Unicode's
# marks that reorder text (CVE-2021-42574).
_TERMINAL: Final = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_CONTROL: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True, slots=True)
class Tail:
    """The last lines of a log. `cut` says that there is more above them."""

    text: str
    size_bytes: int
    cut: bool
    full: bool


def read_tail(streams: StreamStore, lease_id: str) -> Tail:
    """Return the end of a lease's log."""
    state = streams.state(lease_id, "log")
    offset = max(0, state.held_bytes - TAIL_BYTES)
    lines = streams.read(lease_id, "log", offset, TAIL_BYTES).splitlines()
    if offset and len(lines) > 1:
        lines = lines[1:]  # the first one is cut
    return Tail(
        text="\n".join(plain(line) for line in lines),
        size_bytes=state.held_bytes,
        cut=offset > 0,
        full=state.full,
    )


def plain(line: bytes) -> str:
    """Return a line without what a terminal or a bidirectional reader would act on."""
    text = _TERMINAL.sub("", line.decode("utf-8", "replace"))
    return _CONTROL.sub("", text)[:LINE_LENGTH_MAX]
