"""`hansa prices` and `account`: the market's figures. `hansa market` (rounds from files) is `market_rounds`'."""

from __future__ import annotations

import os

import typer

from broker.cli import config
from broker.cli.market_rounds import market_app
from broker.cli.output import JsonOption, credits_text, print_json, print_table, time_text


def register(app: typer.Typer) -> None:
    """Add the commands to the root."""
    app.command()(prices)
    app.command()(account)
    app.add_typer(market_app, name="market")


def prices(as_json: JsonOption = False) -> None:
    """Show what a GPU costs in each pool: the duals of the last round."""
    from broker.cli.client import BrokerClient

    with BrokerClient(config.load(os.environ)) as client:
        document = client.prices()
    if as_json:
        print_json(document)
        return
    when = "" if document["committed_ms"] is None else f", {time_text(document['committed_ms'])}"
    print_table(
        ("pool", ">ask/GPU-h", ">price/GPU-h"),
        [
            (
                row["pool_id"],
                credits_text(row["ask_micros_per_gpu_hour"]),
                credits_text(row["price_micros_per_gpu_hour"]),
            )
            for row in document["items"]
        ],
        title="No round yet" if document["round_number"] is None else f"Round {document['round_number']}{when}",
        empty="no site offers anything yet",
    )


def account(as_json: JsonOption = False) -> None:
    """Show your balance and what your jobs hold."""
    from broker.cli.client import BrokerClient

    with BrokerClient(config.load(os.environ)) as client:
        document = client.account()
    if as_json:
        print_json(document)
        return
    typer.echo(f"tenant   {document['tenant_id']}")
    typer.echo(f"balance  {credits_text(document['balance_micros'])} credits")
    typer.echo(f"held     {credits_text(document['held_micros'])} credits for jobs that wait or run")
    if document["frozen"]:
        typer.echo("the market is frozen: nothing is placed until its admin thaws it")
