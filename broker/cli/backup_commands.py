"""`hansa admin backup` and `restore`: on the broker's own host, over its home and its database."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from broker.cli.output import JsonOption, bytes_text, print_json, time_text

if TYPE_CHECKING:
    from broker.backup import Backup

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="the backup's folder; it holds the market's keys")]


def register(app: typer.Typer) -> None:
    """Add the commands to `hansa admin`."""
    app.command()(backup)
    app.command()(restore)


def backup(folder: Folder, as_json: JsonOption = False) -> None:
    """Write the whole market (rows, keys, files) to a new FOLDER while it goes on; on the broker's host only."""
    from broker.backup import back_up
    from broker.bootstrap import open_market
    from broker.settings import Settings

    market = open_market(Settings())
    try:
        taken = back_up(market, folder)
    finally:
        market.database.close()
    _say(taken, f"{folder} holds", as_json=as_json)


def restore(folder: Folder, as_json: JsonOption = False) -> None:
    """Fill an empty HANSA_HOME and an empty HANSA_DATABASE_URL from FOLDER; the market stands frozen then."""
    from broker.backup import restore as bring_back
    from broker.settings import Settings
    from training.clock import SystemClock

    taken = bring_back(Settings(), folder, SystemClock())
    _say(taken, "restored", as_json=as_json)
    if not as_json:
        typer.echo("the market is frozen; next: hansa admin audit, then hansa admin thaw (deploy/RUNBOOK.md says when)")


def _say(taken: Backup, done: str, *, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print_json(asdict(taken))
        return
    newest = "no round" if taken.round_number is None else f"round {taken.round_number}"
    typer.echo(
        f"{done} {taken.rows} rows up to {newest} and {bytes_text(taken.files_bytes)}, {time_text(taken.taken_ms)}"
    )
