"""`hansa admin rounds | round | replay | payment-rule`: what admins look at and set in the rounds of the market."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from broker.cli import config
from broker.cli.errors import CliError
from broker.cli.output import JsonOption, credits_text, print_json, print_table, time_text

if TYPE_CHECKING:
    from broker.cli.client import BrokerClient

RoundNumber = Annotated[int, typer.Argument(metavar="ROUND", min=0)]
DOCUMENTS: Final = ("snapshot", "clearing")


def register(app: typer.Typer) -> None:
    """Add the commands to `hansa admin`."""
    app.command("payment-rule")(payment_rule)
    app.command()(rounds)
    app.command("round")(show_round)
    app.command()(replay)


def payment_rule(
    rule: Annotated[str | None, typer.Argument(help="uniform or pay_as_bid; left out: show it")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show or set what buyers pay from the next round on: the market's prices, or their whole value."""
    if rule is not None:
        with _client() as client:
            document = client.admin_post("/payment-rule", {"payment_rule": rule})
    else:
        with _client() as client:
            document = client.admin_get("/payment-rule")
    if as_json:
        print_json(document)
    else:
        typer.echo(document["payment_rule"])


def rounds(
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 20,
    as_json: JsonOption = False,
) -> None:
    """List rounds, newest first."""
    with _client() as client:
        rows = client.rounds(limit)
    if as_json:
        print_json({"items": rows})
        return
    print_table(
        ("round", "committed", "status", ">solved in", ">jobs", ">placed", ">welfare/h", ">gap/h"),
        [
            (
                row["round_number"],
                time_text(row["committed_ms"]),
                row["status"],
                f"{row['solve_s'] * 1000:.0f} ms",
                row["jobs_considered"],
                row["placements_made"],
                credits_text(row["welfare_micros_per_hour"]),
                credits_text(row["gap_micros_per_hour"]),
            )
            for row in rows
        ],
        empty="no round yet",
    )


def show_round(
    number: RoundNumber,
    documents: Annotated[
        Path | None,
        typer.Option(help="a folder for its snapshot, clearing and certificate", file_okay=False, exists=True),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show one round: prices, placements and why, what each site has of it; fetch its documents."""
    with _client() as client:
        document = client.round(number)
        sites = client.admin_get(f"/rounds/{number}/sites")
        if documents is not None:
            _fetch(client, number, documents)
    if as_json:
        print_json({**document, "sites": sites["items"], "economics": sites["economics"]})
        return
    typer.echo(
        f"round {number}, {time_text(document['committed_ms'])}: {document['status']} by {document['solver']} "
        f"in {document['solve_s'] * 1000:.0f} ms"
    )
    print_table(
        ("pool", ">price/GPU-h"),
        [(pool, credits_text(price)) for pool, price in sorted(document["prices"].items())],
        empty="no pools",
    )
    print_table(
        ("job", "configuration", ">credits/h", "why"),
        [
            (row["job_id"], row["configuration_key"], credits_text(row["charge_micros_per_hour"]), row["why"])
            for row in document["placements"]
        ],
        empty="no new placements",
    )
    if sites["items"]:
        print_table(
            ("site", ">rent/h", ">with the others/h", ">alone/h", ">Shapley/h"),
            [
                (
                    row["site_id"],
                    credits_text(row["rent_micros_per_hour"]),
                    credits_text(row["federated_micros_per_hour"]),
                    credits_text(row["alone_micros_per_hour"]),
                    "-" if row["shapley_micros_per_hour"] is None else credits_text(row["shapley_micros_per_hour"]),
                )
                for row in sites["items"]
            ],
        )
    if documents is not None:
        typer.echo(
            f"fetched; check them: hansa market verify {documents}/round-{number}.snapshot.json "
            f"{documents}/round-{number}.clearing.json --certificate {documents}/round-{number}.certificate.json --ca ca.pem"
        )


def replay(number: RoundNumber, as_json: JsonOption = False) -> None:
    """Solve a stored round again; exit 1 where it comes out otherwise by the same solver or is unsound."""
    with _client() as client:
        document = client.admin_get(f"/rounds/{number}/replay")
    if as_json:
        print_json(document)
    else:
        typer.echo(f"{'identical to the bit' if document['identical'] else 'not identical'}: {document['solver_now']}")
        for finding in document["findings"]:
            typer.echo(finding)
    same_solver = document["solver_now"] == document["solver_recorded"]
    if document["findings"] or (same_solver and not document["identical"]):
        raise CliError(f"round {number} does not replay", code="round.unsound")


def _fetch(client: BrokerClient, number: int, folder: Path) -> None:
    """Write a round's documents as they are stored, and its certificate as it is served."""
    for name in DOCUMENTS:
        client.download(f"/v1/admin/rounds/{number}/{name}", folder / f"round-{number}.{name}.json")
    client.download(f"/v1/rounds/{number}/certificate", folder / f"round-{number}.certificate.json")


def _client() -> BrokerClient:
    from broker.cli.client import BrokerClient

    return BrokerClient(config.load(os.environ))
