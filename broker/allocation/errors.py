"""The errors of allocation, each with a stable code that callers may rely on."""

from __future__ import annotations

from typing import ClassVar


class AllocationError(Exception):
    """Something that allocation could not do; the message says what, why and what to do next."""

    code: ClassVar[str] = "allocation.failed"


class DocumentError(AllocationError):
    """A snapshot or a clearing that does not read as one."""

    code: ClassVar[str] = "allocation.document_invalid"


class EngineMissingError(AllocationError):
    """An LP engine that is asked for and not installed, or not known."""

    code: ClassVar[str] = "allocation.engine_missing"
