"""`hansa prices`, `account`, and `hansa market solve|verify`: the market's figures, and rounds to solve by oneself.

`solve` and `verify` need no broker: anyone who holds a snapshot can clear it again or check a clearing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import typer

from broker.cli import config
from broker.cli.errors import CliError, UsageError
from broker.cli.output import JsonOption, credits_text, print_json, print_table, time_text

if TYPE_CHECKING:
    from broker.allocation.document import Document

D = TypeVar("D", bound="Document")

DOCUMENT_BYTES_MAX: Final = 2_000_000_000
SnapshotFile = Annotated[Path, typer.Argument(help="a round's snapshot (JSON)", metavar="SNAPSHOT.json")]

market_app = typer.Typer(
    help="Clear or check a round from its documents, without a broker.", no_args_is_help=True, rich_markup_mode=None
)


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


@market_app.command()
def solve(
    snapshot: SnapshotFile,
    output: Annotated[Path, typer.Option("-o", "--output", help="where to write the clearing")],
) -> None:
    """Clear a snapshot and write the clearing; the same snapshot gives the same bytes."""
    from broker.allocation.snapshot import Snapshot
    from broker.allocation.solve import clear

    cleared = clear(_read(snapshot, Snapshot))
    output.write_bytes(cleared.to_json())
    certificate = cleared.certificate
    typer.echo(
        f"{len(cleared.placements)} placed, {len(cleared.unplaced)} not; welfare "
        f"{credits_text(certificate.welfare_micros_per_hour)} credits/h, at most "
        f"{credits_text(certificate.gap_micros_per_hour)} below the best; {output}"
    )


@market_app.command()
def verify(
    snapshot: SnapshotFile,
    clearing: Annotated[Path, typer.Argument(help="the clearing to check (JSON)", metavar="CLEARING.json")],
    as_json: JsonOption = False,
) -> None:
    """Check a clearing against its snapshot, by other code than made it; exit 1 where anything is wrong."""
    from broker.allocation.clearing import Clearing
    from broker.allocation.snapshot import Snapshot
    from broker.allocation.verify import verify as check

    findings = check(_read(snapshot, Snapshot), _read(clearing, Clearing))
    if as_json:
        print_json(
            {"findings": [{"code": row.code, "subject": row.subject, "sentence": row.sentence} for row in findings]}
        )
    else:
        for row in findings:
            typer.echo(f"{row.code}  {row.subject}: {row.sentence}")
    if findings:
        raise CliError(f"{len(findings)} things are wrong with {clearing}", code="market.unsound")
    if not as_json:
        typer.echo("sound: placements possible, money balanced, nobody above a bid or below an ask, certificate true")


def _read(path: Path, kind: type[D]) -> D:
    from broker.allocation.errors import AllocationError

    try:
        if path.stat().st_size > DOCUMENT_BYTES_MAX:
            raise UsageError(f"{path} is larger than {DOCUMENT_BYTES_MAX} bytes")
        return kind.from_json(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except (ValueError, AllocationError) as error:
        where = str(error).splitlines()
        raise UsageError(
            f"{path} is not a {kind.__name__.lower()}: {' '.join(where[:3])}",
            next_step="`hansa admin round N --documents DIR` fetches a round's documents",
        ) from None
