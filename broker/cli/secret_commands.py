"""`hansa secret …`: values that a tenant's jobs find as files, and that nobody reads back."""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from broker.cli import config
from broker.cli.errors import UsageError
from broker.cli.output import JsonOption, print_json, print_table, time_text

if TYPE_CHECKING:
    from broker.cli.client import BrokerClient

app = typer.Typer(help="Secrets of your jobs: set, list by name, delete.", no_args_is_help=True, rich_markup_mode=None)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="as a job names it under `secrets:`")]


@app.command("set")
def set_secret(
    name: NameArgument,
    file: Annotated[Path | None, typer.Option(help="take the value from this file, byte for byte")] = None,
    as_json: JsonOption = False,
) -> None:
    """Store a value, asked for without echo or read from standard input; jobs find it in $HANSA_SECRETS/NAME."""
    value = _value(name, file)
    with _client() as client:
        document = client.set_secret(name, value)
    if as_json:
        print_json(document)
    else:
        typer.echo(f"secret {name} is set")


@app.command("list")
def list_secrets(as_json: JsonOption = False) -> None:
    """List your secrets: names and when each was set, never values."""
    with _client() as client:
        document = client.secrets()
    if as_json:
        print_json(document)
        return
    rows = [(row["name"], time_text(row["set_ms"])) for row in document["items"]]
    print_table(("secret", "set"), rows, empty="no secrets")


@app.command()
def delete(name: NameArgument, as_json: JsonOption = False) -> None:
    """Forget a secret for good; a job that names it fails when it starts next."""
    with _client() as client:
        document = client.delete_secret(name)
    if as_json:
        print_json(document)
    else:
        typer.echo(f"secret {name} is deleted")


def _value(name: str, file: Path | None) -> str:
    """Return the value; there is no option for it, because command lines are seen by others and kept in histories."""
    if file is None and sys.stdin.isatty():
        return getpass.getpass(f"{name}: ")
    try:
        content = (sys.stdin.buffer.read() if file is None else file.read_bytes()).decode()
    except UnicodeDecodeError:
        raise UsageError("a secret is text in UTF-8", next_step="encode it first, for instance with base64") from None
    # What `echo` puts at the end is no part of it.
    return content.rstrip("\r\n") if file is None else content


def _client() -> BrokerClient:
    from broker.cli.client import BrokerClient

    return BrokerClient(config.load(os.environ))
