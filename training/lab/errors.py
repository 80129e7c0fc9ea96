"""The laboratory's errors."""

from __future__ import annotations

from typing import ClassVar

from training.errors import TrainingError


class LabError(TrainingError):
    """A run in the laboratory that did not come to its end."""

    code: ClassVar[str] = "lab.failed"


class ReplayError(LabError):
    """A record that does not lead to the same end, or cannot be followed there: the message names the first round."""

    code: ClassVar[str] = "lab.replay"
