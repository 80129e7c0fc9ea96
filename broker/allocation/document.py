"""Documents with one canonical spelling: what snapshots and clearings have in common.

A document is a frozen pydantic model whose JSON has sorted keys and no spaces, so equal values
give equal bytes and the SHA-256 of those bytes names the document.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from broker.allocation.errors import DocumentError

# A wrong document may be wrong a hundred thousand times.
_ERRORS_TOLD_MAX: Final = 3


class Row(BaseModel):
    """A frozen part of a document; unknown keys, NaN and infinities are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Document(Row):
    """A whole document: canonical bytes, their digest, and the way back."""

    def to_json(self) -> bytes:
        """Return the canonical JSON: sorted keys, no spaces, ASCII."""
        return json.dumps(self.spelled(), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    def spelled(self) -> dict[str, Any]:
        """Return the plain values that the canonical JSON says."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON in hexadecimal."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Return the document that `text` spells. Raises DocumentError where it is none."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            wrong = error.errors(include_url=False, include_input=False)
            told = [f"{'.'.join(map(str, row['loc'])) or 'document'}: {row['msg']}" for row in wrong[:_ERRORS_TOLD_MAX]]
            more = f", and {len(wrong) - len(told)} more" if len(wrong) > len(told) else ""
            message = (
                f"not a {cls.__name__.lower()}: {'; '.join(told)}{more}; correct the fields named, or check that it was "
                "written by this version of Hansa (`hansa market schema` prints what it reads)"
            )
            raise DocumentError(message) from None
