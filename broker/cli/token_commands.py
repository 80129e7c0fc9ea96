"""`hansa token …`: a tenant's own API tokens."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from broker.cli import config
from broker.cli.output import JsonOption, print_json, print_table, time_text

if TYPE_CHECKING:
    from broker.cli.client import BrokerClient

app = typer.Typer(
    help="Your own API tokens: make one that may do less, list, revoke.", no_args_is_help=True, rich_markup_mode=None
)

SECONDS_PER_DAY: Final = 86_400


@app.command("list")
def list_tokens(as_json: JsonOption = False) -> None:
    """List your tokens: name, scopes, expiry, last use; never the secrets."""
    with _client() as client:
        document = client.tokens()
    if as_json:
        print_json(document)
        return
    print_table(
        ("token", "name", "scopes", "expires", "last used", ""),
        [
            (
                row["token_id"],
                row["label"] or "-",
                " ".join(row["scopes"]),
                time_text(row["expires_ms"]),
                time_text(row["last_used_ms"]),
                _standing(row, document["own"]),
            )
            for row in document["items"]
        ],
        empty="no tokens",
    )


@app.command()
def create(
    label: Annotated[str, typer.Option("--name", help="what it is for")] = "",
    scope: Annotated[list[str] | None, typer.Option(help="such as jobs:read; left out, those of your token")] = None,
    days: Annotated[int | None, typer.Option(min=1, max=366, help="left out, as long as your token")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token that may do no more and lives no longer than yours; it is shown once."""
    body: dict[str, Any] = {"label": label}
    if scope:
        body["scopes"] = scope
    if days is not None:
        body["life_s"] = days * SECONDS_PER_DAY
    with _client() as client:
        document = client.create_token(body)
    if as_json:
        print_json(document)
    else:
        typer.echo(document["token"])


@app.command()
def revoke(
    token_id: Annotated[str, typer.Argument(metavar="TOKEN", help="as listed")], as_json: JsonOption = False
) -> None:
    """Revoke one of your tokens, at once and for good."""
    with _client() as client:
        document = client.revoke_token(token_id)
    if as_json:
        print_json(document)
    else:
        typer.echo(f"token {token_id} is revoked")


def _standing(row: dict[str, Any], own: str) -> str:
    if row["revoked_ms"] is not None:
        return f"revoked {time_text(row['revoked_ms'])}"
    return "this one" if row["token_id"] == own else ""


def _client() -> BrokerClient:
    from broker.cli.client import BrokerClient

    return BrokerClient(config.load(os.environ))
