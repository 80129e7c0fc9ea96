"""The OpenAPI document as it is served: what the routes declare, with refusals under the type that they are sent as."""

from __future__ import annotations

from typing import Any, Final

from flask_openapi3.openapi import OpenAPI

_PROBLEM_SCHEMA: Final = "#/components/schemas/Problem"


class DocumentedApi(OpenAPI):
    """flask-openapi3's application; it documents every answer as application/json, and refusals are problem+json."""

    def generate_spec_json(self) -> None:
        """Make the document and correct it."""
        super().generate_spec_json()  # type: ignore[no-untyped-call]  # flask-openapi3 has no types there
        for operations in self.spec_json["paths"].values():
            for operation in operations.values():
                for answer in operation["responses"].values():
                    _name_the_type(answer)


def _name_the_type(answer: dict[str, Any]) -> None:
    content = answer.get("content", {})
    plain = content.get("application/json", {})
    if plain.get("schema", {}).get("$ref") == _PROBLEM_SCHEMA:
        content["application/problem+json"] = content.pop("application/json")
