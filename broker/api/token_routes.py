"""The routes of a tenant's own tokens: list them, make one that may do less, revoke one."""

from __future__ import annotations

from http import HTTPStatus

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field

from broker.api.answers import answers
from broker.api.context import the_market, the_principal, the_tenant_id
from broker.api.problems import json_answer
from broker.database.tables import Token
from broker.identity.tokens import LIFE_S_MAX, NewToken, Scope, TokenKind, create_token, revoke_token, tokens_of

_tag = Tag(name="tokens", description="A tenant's own tokens.")
api = APIBlueprint("tokens", __name__, url_prefix="/v1/tokens", abp_tags=[_tag], abp_security=[{"token": []}])


class TokenPath(BaseModel):
    """A token by its public id."""

    token_id: str = Field(pattern=r"^[0-9a-f]{16}$")


class TokenTerms(BaseModel):
    """A token to make. Without scopes it gets those of the one that makes it; without a life, what that has left."""

    model_config = ConfigDict(extra="forbid")

    scopes: list[Scope] | None = Field(default=None, min_length=1, max_length=len(Scope))
    life_s: int | None = Field(default=None, ge=1, le=LIFE_S_MAX)
    label: str = Field(default="", max_length=200)


class TokenDocument(BaseModel):
    """A token without its secret."""

    token_id: str
    label: str
    scopes: list[str]
    created_ms: int
    expires_ms: int
    revoked_ms: int | None
    last_used_ms: int | None


class TokenList(BaseModel):
    """Tokens, newest first; `own` is the one that asked."""

    own: str
    items: list[TokenDocument]


@api.get("", responses=answers(TokenList))
def get_own_tokens() -> Response:
    """List the tenant's tokens: what they are for, what they may do, until when, and when last used."""
    principal, tenant_id = the_principal(), the_tenant_id()
    assert principal is not None, "a tenant's token was checked"
    rows = the_market().database.read(lambda session: tokens_of(session, tenant_id))
    return json_answer(TokenList(own=principal.token_id, items=[token_document(row) for row in rows]))


@api.post("", responses=answers(None, 201))
def post_own_token(body: TokenTerms) -> Response:
    """Make a token that can do no more and lives no longer than the one that makes it; it is shown this once."""
    maker = the_principal()
    assert maker is not None, "a tenant's token was checked"
    made = create_token(
        the_market(),
        TokenKind.TENANT,
        tenant_id=the_tenant_id(),
        scopes=maker.scopes if body.scopes is None else frozenset(body.scopes),
        life_s=body.life_s,
        label=body.label,
        maker=maker,
    )
    return json_answer(new_token_document(made), HTTPStatus.CREATED)


@api.post("/<string:token_id>/revoke", responses=answers())
def post_own_revoke(path: TokenPath) -> Response:
    """Revoke one of the tenant's tokens, at once and for good."""
    revoke_token(the_market(), path.token_id, the_tenant_id())
    return json_answer({"token_id": path.token_id, "revoked": True})


def token_document(row: Token) -> TokenDocument:
    """Return what may be said of a token."""
    return TokenDocument(
        token_id=row.token_id,
        label=row.label,
        scopes=row.scopes.split(),
        created_ms=row.created_ms,
        expires_ms=row.expires_ms,
        revoked_ms=row.revoked_ms,
        last_used_ms=row.last_used_ms,
    )


def new_token_document(made: NewToken) -> dict[str, object]:
    """Return a token just made, with its secret."""
    return {"token_id": made.token_id, "token": made.text, "scopes": list(made.scopes), "expires_ms": made.expires_ms}
