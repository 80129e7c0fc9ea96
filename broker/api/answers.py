"""What the documentation says of answers: the model of a good one, and the one shape of all refusals."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from pydantic import BaseModel

from broker.api.problems import Problem

Answers = dict[str | int | HTTPStatus, type[BaseModel] | dict[Any, Any] | None]

# 429: an empty bucket; 503: the database or a worker too busy. Any route may answer either.
_REFUSALS = (400, 401, 403, 404, 409, 413, 415, 422, 429, 503)


def answers(model: type[BaseModel] | None = None, status: int = 200) -> Answers:
    """Return the answers of a route for its documentation."""
    documented: Answers = {str(status): model}
    documented.update({str(refusal): Problem for refusal in _REFUSALS})
    return documented
