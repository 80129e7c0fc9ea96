"""Training: what a job is, how fast it would run, and the runtime that runs it across sites."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.session import Session, join

__all__ = ["Session", "join"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module's attributes are of any type
    """Load the runtime, and with it torch, only when a script asks for it."""
    if name in __all__:
        from training import session  # noqa: PLC0415 - lazy, so that training.spec never drags in torch

        return getattr(session, name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
