"""`hansa prices`, `account` and `budget`: the market's figures and one's own. `hansa market` (rounds from files) is `market_rounds`'."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from broker.cli import config
from broker.cli.errors import UsageError
from broker.cli.market_rounds import market_app
from broker.cli.output import JsonOption, credits_text, print_json, print_table, time_text


def register(app: typer.Typer) -> None:
    """Add the commands to the root."""
    app.command()(prices)
    app.command()(account)
    app.command()(budget)
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
    """Show your balance, what your jobs hold, and what they cost in an hour."""
    from broker.cli.client import BrokerClient

    with BrokerClient(config.load(os.environ)) as client:
        document = client.account()
    _print_account(document, as_json=as_json)


def budget(
    amount: Annotated[str, typer.Argument(metavar="CREDITS|none", help="an hour, over all jobs; none: no bound")],
    as_json: JsonOption = False,
) -> None:
    """Bound what all of your jobs may cost in an hour. What runs already runs on; nothing new starts beyond it."""
    from broker.cli.client import BrokerClient

    micros = budget_micros(amount)
    with BrokerClient(config.load(os.environ)) as client:
        document = client.set_budget(micros)
    _print_account(document, as_json=as_json)


def budget_micros(amount: str) -> int | None:
    """Return an hourly budget in micro-credits, None for "none". Raises UsageError."""
    from pricing.errors import PricingError
    from pricing.money import parse_credits

    if amount == "none":
        return None
    try:
        micros = parse_credits(amount)
    except PricingError as error:
        raise UsageError(str(error)) from None
    if micros < 1:
        raise UsageError(f"a budget of {amount} lets nothing run; give credits an hour, or 'none' for no bound")
    return micros


def budget_text(micros: int | None) -> str:
    """Say an hourly budget."""
    return "no bound" if micros is None else f"{credits_text(micros)} credits an hour"


def _print_account(document: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(document)
        return
    typer.echo(f"tenant   {document['tenant_id']}")
    typer.echo(f"balance  {credits_text(document['balance_micros'])} credits")
    typer.echo(f"held     {credits_text(document['held_micros'])} credits for jobs that wait or run")
    typer.echo(f"cost     {credits_text(document['spending_micros_per_hour'])} credits an hour for placed jobs")
    typer.echo(f"budget   {budget_text(document['budget_micros_per_hour'])}")
    if document["frozen"]:
        typer.echo("the market is frozen: nothing is placed until its admin thaws it")
