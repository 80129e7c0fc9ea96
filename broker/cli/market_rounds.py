"""`hansa market`: draw a market, clear it, check the clearing, explain a job; all from files, without a broker.

A market is a snapshot: JSON (`.json`, `.json.gz`) or columns (`.npz`), told apart by content when
read and by suffix when written. `schema` prints what their fields mean, with units.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from broker.cli.errors import CliError, MissingError, UsageError
from broker.cli.market_certificates import certificate as show_certificate
from broker.cli.market_certificates import check_certificate
from broker.cli.market_files import (
    read_document,
    read_snapshot,
    read_tables,
    writable,
    write_document,
    write_tables,
)
from broker.cli.output import JsonOption, credits_text, duration_text, print_json, print_table

if TYPE_CHECKING:
    from broker.allocation.clearing import Clearing, Placement
    from broker.allocation.solver import Outcome

SnapshotFile = Annotated[
    Path, typer.Argument(help="a round's snapshot: .json, .json.gz or .npz", metavar="SNAPSHOT", show_default=False)
]
ClearingFile = Annotated[
    Path, typer.Argument(help="its clearing: .json or .json.gz", metavar="CLEARING", show_default=False)
]
Output = Annotated[Path, typer.Option("-o", "--output", help="where to write; the suffix chooses the form")]

# A market of this many jobs clears in seconds without compiled loops.
INTERPRETED_JOBS_MAX = 60

market_app = typer.Typer(
    help="Draw, clear, check or explain a round from its documents, without a broker.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


market_app.command("certificate")(show_certificate)


class _Phases:
    """What a command is doing now, on a terminal, and how long each part took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show `name` while the body runs, and keep its time."""
        from rich.console import Console

        began = time.perf_counter()
        console = Console(stderr=True)
        if console.is_terminal:
            with console.status(name):
                yield
        else:
            yield
        self.seconds[name] = time.perf_counter() - began

    def took(self, outcome: Outcome) -> None:
        """Keep the times of a solved round's own phases."""
        self.seconds.update({f"solve: {name}": seconds for name, seconds in outcome.seconds.items()})

    def text(self) -> str:
        """Return all phases in a line."""
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())

    def document(self) -> dict[str, float]:
        """Return seconds by phase."""
        return {name: round(seconds, 4) for name, seconds in self.seconds.items()}


@market_app.command()
def generate(  # noqa: PLR0917  typer's parameters are options, named by whoever calls
    output: Output,
    family: Annotated[str, typer.Option(help="A: loose; B: fragmented, with thin links")] = "A",
    jobs: Annotated[int, typer.Option(help="how many jobs")] = 500,
    sites: Annotated[int, typer.Option(help="how many sites")] = 20,
    seed: Annotated[int, typer.Option(help="the same seed draws the same market")] = 0,
    feature: Annotated[
        list[str] | None, typer.Option(help="ask_curves, mixed_types, slots, budgets, …; may be repeated; or: all")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw a market by seed and write it."""
    from broker.allocation.generate import GenerateError
    from broker.allocation.generate import generate as drawn
    from broker.allocation.generate_features import FEATURES

    writable(output)
    phases = _Phases()
    try:
        with phases.phase("draw"):
            wanted = FEATURES if "all" in (feature or ()) else tuple(feature or ())
            tables = drawn(family, jobs, sites, seed, wanted)  # type: ignore[arg-type]  # checked by generate
    except GenerateError as error:
        raise UsageError(str(error), next_step="`hansa market generate --help` lists the options") from None
    with phases.phase("write"):
        write_tables(tables, output)
    counts = {group: tables.rows(group) for group in ("jobs", "sites", "pools", "links", "tenants", "incumbents")}
    if as_json:
        print_json({"output": str(output), "digest": tables.digest(), **counts, "phases_s": phases.document()})
        return
    typer.echo(", ".join(f"{count} {group}" for group, count in counts.items() if count) + f"; {output}")
    typer.echo(f"digest {tables.digest()}; {phases.text()}")


@market_app.command()
def solve(
    snapshot: SnapshotFile,
    output: Output,
    engine: Annotated[
        str, typer.Option(help="what solves the LP: highs, or clp where the extra clp is installed")
    ] = "highs",
    as_json: JsonOption = False,
) -> None:
    """Clear a snapshot and write the clearing; the same snapshot gives the same bytes."""
    from broker.allocation.errors import AllocationError

    writable(output, (".json", ".json.gz"))
    phases = _Phases()
    with phases.phase("read"):
        tables = read_tables(snapshot)
    _compile_if_large(tables.rows("jobs"))
    from broker.allocation.solve import clear_tables

    try:
        with phases.phase("solve"):
            cleared = clear_tables(tables, engine=engine, tick=time.perf_counter, watch=phases.took)
    except AllocationError as error:
        raise CliError(str(error), code=error.code) from None
    with phases.phase("write"):
        write_document(cleared, output)
    certificate = cleared.certificate
    if as_json:
        print_json(
            {
                "output": str(output),
                "status": cleared.status,
                "placed": len(cleared.placements),
                "unplaced": len(cleared.unplaced),
                **certificate.model_dump(mode="json"),
                "phases_s": phases.document(),
            }
        )
        return
    typer.echo(
        f"{len(cleared.placements)} placed, {len(cleared.unplaced)} not; welfare "
        f"{credits_text(certificate.welfare_micros_per_hour)} credits/h, at most "
        f"{credits_text(certificate.gap_micros_per_hour)} below the best; {output}"
    )
    typer.echo(phases.text())


def _compile_if_large(jobs: int) -> None:
    """Decide, before the solver is loaded, whether its loops are worth compiling; say so where it takes minutes."""
    import os

    if jobs > INTERPRETED_JOBS_MAX and "HANSA_COMPILE" not in os.environ:
        os.environ["HANSA_COMPILE"] = "1"
        from broker.allocation.compiled import is_complete

        if not is_complete():
            typer.echo("compiling the market's loops, once for this machine; this takes minutes", err=True)


@market_app.command(name="compile")
def compile_loops() -> None:
    """Compile the solver's loops for this machine, once: without it, only small markets are quick."""
    import os

    os.environ["HANSA_COMPILE"] = "1"
    from broker.allocation.compiled import is_complete, mark_complete
    from broker.allocation.generate import generate as drawn
    from broker.allocation.generate_features import FEATURES
    from broker.allocation.solve import clear_tables

    if is_complete():
        typer.echo("the market's loops are compiled already")
        return
    phases = _Phases()
    # Everything that a snapshot can say, so that every loop is met with every type that it takes.
    for name, family, features in (("plain", "A", ()), ("every feature", "B", FEATURES)):
        with phases.phase(name):
            clear_tables(drawn(family, 60, 12, 0, features))  # type: ignore[arg-type]  # both families exist
    mark_complete()
    typer.echo(f"compiled; {phases.text()}")


@market_app.command()
def fairness(snapshot: SnapshotFile, clearing: ClearingFile, as_json: JsonOption = False) -> None:
    """Compare what sites and coalitions of sites get at a round's prices with what they could do alone."""
    from broker.allocation.clearing import Clearing

    phases = _Phases()
    with phases.phase("read"):
        tables, cleared = read_tables(snapshot), read_document(clearing, Clearing)
    _compile_if_large(tables.rows("jobs"))
    from broker.allocation.coalitions import standing
    from broker.allocation.compile import compile_market
    from broker.allocation.won import Market

    if cleared.snapshot_digest != tables.digest():
        raise UsageError(f"{clearing} was made from another snapshot than {snapshot}")
    with phases.phase("coalitions"):
        market = Market(tables, compile_market(tables))
        found = standing(market, cleared)
    sites = [market.names.sites[gain.sites[0]] for gain in found.alone]
    shapley: tuple[int | None, ...] = found.shapley or (None,) * len(sites)
    slack = found.core_slack_micros_per_hour
    if as_json:
        rows = [
            {
                "site_id": site,
                "federated_micros_per_hour": gain.federated_micros_per_hour,
                "alone_micros_per_hour": gain.alone_micros_per_hour,
                "shapley_micros_per_hour": value,
            }
            for site, gain, value in zip(sites, found.alone, shapley, strict=True)
        ]
        document = {"sites": rows, "coalitions": len(found.gains), "complete": found.complete}
        print_json({**document, "core_slack_micros_per_hour": slack, "phases_s": phases.document()})
        return
    print_table(
        ("site", ">in the federation", ">alone", ">Shapley"),
        [
            (
                site,
                credits_text(gain.federated_micros_per_hour),
                credits_text(gain.alone_micros_per_hour),
                "-" if value is None else credits_text(value),
            )
            for site, gain, value in zip(sites, found.alone, shapley, strict=True)
        ],
    )
    tried = "all" if found.complete else "a sample of"
    typer.echo(f"{tried} {len(found.gains)} coalitions: the worst one gains {credits_text(slack)} credits/h by staying")


@market_app.command()
def verify(
    snapshot: SnapshotFile,
    clearing: ClearingFile,
    certificate: Annotated[
        Path | None, typer.Option(help="the round's signed certificate, checked too; needs --ca", exists=True)
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(help="the market's certificate authority", envvar="HANSA_CA", exists=True)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a clearing against its snapshot, by other code than made it; exit 1 where anything is wrong."""
    from broker.allocation.clearing import Clearing
    from broker.allocation.verify import verify as check

    phases = _Phases()
    with phases.phase("read"):
        market, cleared = read_snapshot(snapshot), read_document(clearing, Clearing)
    if certificate is not None:
        with phases.phase("certificate"):
            check_certificate(certificate, ca, cleared)
    with phases.phase("verify"):
        findings = check(market, cleared)
    if as_json:
        rows = [{"code": row.code, "subject": row.subject, "sentence": row.sentence} for row in findings]
        print_json({"findings": rows, "phases_s": phases.document()})
    else:
        for row in findings:
            typer.echo(f"{row.code}  {row.subject}: {row.sentence}")
    if findings:
        raise CliError(f"{len(findings)} things are wrong with {clearing}", code="market.unsound")
    if not as_json:
        typer.echo("sound: placements possible, money balanced, nobody above a bid or below an ask, certificate true")


@market_app.command()
def explain(
    job: Annotated[str, typer.Argument(help="the job's id", metavar="JOB", show_default=False)],
    clearing: ClearingFile,
    as_json: JsonOption = False,
) -> None:
    """Say why a job stands where it stands in a clearing, and what would change it."""
    from broker.allocation.clearing import Clearing

    cleared = read_document(clearing, Clearing)
    placed = next((row for row in cleared.placements if row.job_id == job), None)
    left_out = next((row for row in cleared.unplaced if row.job_id == job), None)
    row = placed or left_out
    if row is None:
        raise _unknown(job, cleared)
    if as_json:
        print_json({"placed": placed is not None, **row.model_dump(mode="json")})
    elif placed is not None:
        _explain_placed(placed)
    elif left_out is not None:
        typer.echo(f"{job} is not placed ({left_out.code}): {left_out.sentence}")
        if left_out.bid_needed_micros_per_million_samples is not None:
            needed = credits_text(left_out.bid_needed_micros_per_million_samples)
            typer.echo(f"bid needed  {needed} credits per million samples")


def _explain_placed(placed: Placement) -> None:
    typer.echo(f"{placed.job_id} is placed ({placed.action}): {placed.why}")
    typer.echo(f"speed  {placed.samples_per_s:,.1f} samples/s, price locked for {duration_text(placed.term_s)}")
    typer.echo(f"pays   {credits_text(placed.charge_micros_per_hour)} credits/h")
    print_table(
        ("pool", ">GPUs", ">price/GPU-h", ">site gets/GPU-h"),
        [
            (
                row.pool_id,
                row.gpus,
                credits_text(row.price_micros_per_gpu_hour),
                credits_text(row.payout_micros_per_gpu_hour),
            )
            for row in placed.pools
        ],
    )
    if placed.links:
        print_table(
            ("from", "to", ">share", ">rent/h"),
            [
                (row.from_site, row.to_site, f"{row.shares / 100:.2f} %", credits_text(row.rent_micros_per_hour))
                for row in placed.links
            ],
        )


def _unknown(job: str, cleared: Clearing) -> MissingError:
    known = [row.job_id for row in cleared.placements] + [row.job_id for row in cleared.unplaced]
    near = difflib.get_close_matches(job, known, n=3)
    return MissingError(
        f"round {cleared.round_number} has no job {job!r}",
        next_step=f"did you mean {' or '.join(near)}?" if near else f"it has {len(known)} jobs, such as {known[:1]}",
    )


@market_app.command()
def schema(
    what: Annotated[
        Literal["snapshot", "clearing", "tables"], typer.Argument(help="snapshot and clearing are JSON, tables .npz")
    ] = "snapshot",
) -> None:
    """Print what a document's fields are, with units and bounds, as JSON Schema."""
    from broker.allocation.clearing import Clearing
    from broker.allocation.snapshot import Snapshot

    if what == "tables":
        print_json(_tables_schema())
    else:
        print_json((Snapshot if what == "snapshot" else Clearing).model_json_schema())


def _tables_schema() -> dict[str, Any]:
    """Return the columns of a `.npz` with their types, bounds and references."""
    from broker.allocation.tables import ROWS_MAX, SCHEMA, TABLES_VERSION

    groups = {
        group: {
            "rows_max": ROWS_MAX[group],
            "columns": {
                name: {
                    "dtype": column.dtype,
                    "minimum": column.low,
                    "maximum": column.high,
                    **({"refers_to": column.refers} if column.refers else {}),
                    **({"absent": "NaN"} if column.optional else {"absent": -1} if column.low < 0 else {}),
                }
                for name, column in columns.items()
            },
        }
        for group, columns in SCHEMA.items()
    }
    return {
        "title": "Snapshot in columns",
        "description": "A .npz with one array per `group.column`; names and units are those of the snapshot's fields.",
        "version": TABLES_VERSION,
        "groups": groups,
    }


@market_app.command()
def show(snapshot: SnapshotFile, as_json: JsonOption = False) -> None:
    """Say what a market holds: its size, its digest, and demand against supply by GPU type."""
    tables = read_tables(snapshot)
    counts = {group: tables.rows(group) for group in ("jobs", "sites", "pools", "links", "tenants", "incumbents")}
    types: dict[str, dict[str, int]] = {}
    for column, name, reference in (
        ("supply_gpus", "pools.capacity_gpus", "pools.gpu_type"),
        ("wanted_gpus", "accelerators.count_max", "accelerators.gpu_type"),
    ):
        for kind, gpus in zip(tables.names(reference), tables[name].tolist(), strict=True):
            row = types.setdefault(kind, {"supply_gpus": 0, "wanted_gpus": 0})
            row[column] += gpus
    if as_json:
        print_json({"digest": tables.digest(), **counts, "gpu_types": types})
        return
    typer.echo(", ".join(f"{count} {group}" for group, count in counts.items() if count))
    typer.echo(f"digest {tables.digest()}")
    print_table(
        ("GPU type", ">for sale", ">wanted at most"),
        [(kind, row["supply_gpus"], row["wanted_gpus"]) for kind, row in sorted(types.items())],
        empty="no pools and no jobs",
    )
