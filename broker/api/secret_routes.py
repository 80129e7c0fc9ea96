"""The routes of a tenant's secrets: set, list by name, delete. No route of tenants returns a value."""

from __future__ import annotations

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from sqlalchemy.orm import Session

from broker.api.answers import answers
from broker.api.context import the_actor, the_market, the_tenant_id
from broker.api.problems import json_answer
from broker.tenant_secrets import VALUE_BYTES_MAX, delete_secret, list_secrets, set_secret
from training.spec import SecretName

_tag = Tag(name="secrets", description="Values that a tenant's jobs find as files, and nobody reads back.")
api = APIBlueprint("secrets", __name__, url_prefix="/v1/secrets", abp_tags=[_tag], abp_security=[{"token": []}])


class SecretPath(BaseModel):
    """A secret by its name."""

    name: SecretName


class SecretValue(BaseModel):
    """A value to store; no answer and no log repeats it."""

    model_config = ConfigDict(extra="forbid")

    value: SecretStr = Field(min_length=1, max_length=VALUE_BYTES_MAX)


class SecretDocument(BaseModel):
    """A secret without its value."""

    name: str
    set_ms: int


class SecretList(BaseModel):
    """All secrets of the tenant, by name."""

    items: list[SecretDocument]


@api.get("", responses=answers(SecretList))
def get_secrets() -> Response:
    """List the names of the tenant's secrets and when each was set."""
    tenant_id = the_tenant_id()
    rows = the_market().database.read(lambda session: list_secrets(session, tenant_id))
    return json_answer(SecretList(items=[SecretDocument(name=row.name, set_ms=row.set_ms) for row in rows]))


@api.put("/<string:name>", responses=answers(SecretDocument))
def put_secret(path: SecretPath, body: SecretValue) -> Response:
    """Store a value under this name, in place of the former one; it cannot be read back."""
    market, tenant_id, actor = the_market(), the_tenant_id(), the_actor()

    def work(session: Session) -> None:
        set_secret(session, market, tenant_id, path.name, body.value.get_secret_value(), actor=actor)

    market.database.write("secret set", work)
    return json_answer(SecretDocument(name=path.name, set_ms=market.clock.now_ms()))


@api.delete("/<string:name>", responses=answers())
def delete_own_secret(path: SecretPath) -> Response:
    """Forget a value for good; a job that names it fails when it starts next."""
    market, tenant_id, actor = the_market(), the_tenant_id(), the_actor()
    market.database.write(
        "secret delete", lambda session: delete_secret(session, market, tenant_id, path.name, actor=actor)
    )
    return json_answer({"name": path.name, "deleted": True})
