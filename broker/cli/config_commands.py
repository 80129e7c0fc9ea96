"""`hansa config …`: the named markets that this person works with."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from broker.cli import config
from broker.cli.errors import UsageError
from broker.cli.output import JsonOption, print_json

app = typer.Typer(help="Which market to talk to, and as whom.", no_args_is_help=True, rich_markup_mode=None)


@app.command("set")
def set_context(
    context: Annotated[str, typer.Option(help="which market")] = "",
    url: Annotated[str | None, typer.Option(help="address of the broker")] = None,
    token: Annotated[str | None, typer.Option(help="API token; it is kept in a file that only you can read")] = None,
    ca: Annotated[
        Path | None, typer.Option(help="PEM file of the authority to trust", exists=True, dir_okay=False)
    ] = None,
) -> None:
    """Set fields of a context, make it if it is new, and use it from now on."""
    path = config.config_path(os.environ)
    held = config.read(path)
    name = config.checked_name(context or held.current)
    changed = held.contexts.get(name, config.Context())
    changed = changed if url is None else replace(changed, url=url)
    changed = changed if token is None else replace(changed, token=token)
    changed = changed if ca is None else replace(changed, ca=ca.resolve())
    config.write(path, config.Config(name, {**held.contexts, name: changed}))
    typer.echo(f"{path}: context {name} is {changed.url}")


@app.command("use")
def use_context(name: Annotated[str, typer.Argument()]) -> None:
    """Use another context from now on."""
    path = config.config_path(os.environ)
    held = config.read(path)
    if name not in held.contexts:
        known = ", ".join(sorted(held.contexts)) or "none"
        raise UsageError(f"there is no context {name!r} (known: {known})")
    config.write(path, config.Config(name, held.contexts))
    typer.echo(f"now using {name}: {held.contexts[name].url}")


@app.command("show")
def show(as_json: JsonOption = False) -> None:
    """Show the contexts without their tokens; the one in force is marked."""
    held = config.read(config.config_path(os.environ))
    force = config.load(os.environ)
    rows = {
        name: {"url": context.url, "ca": str(context.ca or ""), "token": "set" if context.token else "none"}
        for name, context in sorted(held.contexts.items())
    }
    if as_json:
        print_json({"current": held.current, "url": force.url, "contexts": rows})
        return
    for name, row in rows.items():
        typer.echo(f"{'*' if name == held.current else ' '} {name}  {row['url']}  token {row['token']}")
    typer.echo(f"in force: {force.url}, token {'set' if force.token else 'none'}")
