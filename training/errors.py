"""The errors of the training package, each with a stable code that callers may rely on."""

from __future__ import annotations

from typing import ClassVar, Final

# Of a site that stopped because it was asked to; the site's agent tells its broker that it left.
EXIT_LEFT: Final = 76


class TrainingError(Exception):
    """Something that training could not do; the message says what, why and what to do next."""

    code: ClassVar[str] = "training.failed"


class SpecError(TrainingError):
    """A job specification that cannot be accepted as it stands.

    `problems` lists each fault as (where, what): `where` is a JSON pointer such as
    `/market/budget`, and `line` (from one) is set where the text that was read had lines.
    """

    code: ClassVar[str] = "spec.invalid"

    def __init__(self, problems: list[tuple[str, str]], lines: dict[str, int] | None = None) -> None:
        """Keep the faults; the message lists every one, with its line where it is known."""
        self.problems = problems
        self.lines = lines or {}
        super().__init__("; ".join(self._sentence(where, what) for where, what in problems))

    def _sentence(self, where: str, what: str) -> str:
        line = self.lines.get(where)
        place = where or "the job"
        return f"line {line}, {place}: {what}" if line else f"{place}: {what}"


class ExchangeError(TrainingError):
    """The round log did not answer within the job's patience, or refused what was sent."""

    code: ClassVar[str] = "exchange.failed"


class Departure(SystemExit):
    """The site was asked to stop, and its state after `round_number` is in its checkpoint: the script ends here.

    Like any exit it passes through the tenant's `except Exception`, and no code after its loop runs.
    """

    def __init__(self, round_number: int) -> None:
        """End the process with EXIT_LEFT."""
        self.round_number = round_number
        super().__init__(EXIT_LEFT)


class SignatureError(TrainingError):
    """A signed document that its signature, its signer or its form does not support."""

    code: ClassVar[str] = "signature.invalid"


class CodecError(TrainingError):
    """Values that no codec may encode (NaN, infinite, huge), or bytes that are not a payload."""

    code: ClassVar[str] = "codec.invalid"


class CheckpointError(TrainingError):
    """A checkpoint or snapshot that cannot be read, or that is of another model."""

    code: ClassVar[str] = "checkpoint.invalid"


class ModelError(TrainingError):
    """A model or optimizer that the runtime cannot synchronise."""

    code: ClassVar[str] = "model.unsupported"
