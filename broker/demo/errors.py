"""What can go wrong with the demo, beyond a process that dies (`broker.supervise.errors`)."""

from __future__ import annotations

from typing import ClassVar


class DemoError(Exception):
    """The demo could not go on, or did not end as it should; the message says where to look."""

    code: ClassVar[str] = "demo.failed"
