"""`hansa throughput`: fit a model of step times to a table, ask it, and score it beside the published form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from broker.cli.errors import UsageError
from broker.cli.output import JsonOption, print_json, print_table

if TYPE_CHECKING:
    from training.steptimes.evaluation import Score
    from training.steptimes.table import StepTable

app = typer.Typer(
    help="Step times: fit a model to measurements, ask it, score it.", no_args_is_help=True, rich_markup_mode=None
)

FIT_PART: Final = "placements"
TEST_PART: Final = "scalability"
SEEN_NODES: Final = 4

TableArgument = Annotated[Path, typer.Argument(help="measured step times (CSV): training/README.md says its columns")]
CoverageOption = Annotated[
    float, typer.Option(min=0.5, max=0.99, help="what share of measurements intervals are to hold")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="no progress")]


@app.command()
def fit(
    table: TableArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="where to write the model (JSON)")],
    part: Annotated[str | None, typer.Option(help="fit only the rows of this part")] = None,
    quiet: QuietOption = False,
) -> None:
    """Fit a model to measured step times and calibrate its intervals.

    Deterministic: the same table gives the same file.
    """
    from training.steptimes.model import dump, fit_model
    from training.steptimes.table import read_table

    rows = _nonempty(read_table(table), part)
    with _progress(quiet=quiet) as tell:
        model = fit_model(rows, tell)
    output.write_text(dump(model), encoding="utf-8")
    typer.echo(
        f"fitted {len(model.fitted.models)} models to {len(rows)} measurements on up to "
        f"{rows.nodes.max():.0f} nodes: {output}"
    )


@app.command()
def predict(
    *,
    model: Annotated[Path, typer.Argument(help="a model that `hansa throughput fit` wrote")],
    name: Annotated[str, typer.Option("--name", help="which of its models")],
    nodes: Annotated[int, typer.Option(min=1, max=1_000_000)],
    gpus: Annotated[int, typer.Option(min=1, max=1_000_000, help="GPUs of all nodes together")],
    batch: Annotated[int, typer.Option(min=1, max=1_000_000, help="samples per GPU and step")],
    node_gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of the fullest node; else spread evenly")] = None,
    coverage: CoverageOption = 0.9,
    as_json: JsonOption = False,
) -> None:
    """Say how long a step would take, and how many samples a second that is, with the interval."""
    from training.steptimes.model import Shape, read_model

    answer = read_model(model).predict(name, [Shape(nodes, gpus, batch, node_gpus)], coverage)[0]
    if as_json:
        print_json({"model": name, "coverage": coverage, **asdict(answer)})
        return
    typer.echo(f"step     {answer.step_s:.4g} s   ({coverage:.0%}: {answer.low_s:.4g} to {answer.high_s:.4g})")
    typer.echo(
        f"samples  {answer.samples_per_s:.4g}/s ({coverage:.0%}: "
        f"{answer.samples_per_s_low:.4g} to {answer.samples_per_s_high:.4g})"
    )


@app.command()
def evaluate(
    table: TableArgument,
    *,
    model: Annotated[
        Path | None, typer.Option(help="score this model on all rows; else fit a part and score the other")
    ] = None,
    fit_part: Annotated[str | None, typer.Option(help=f"rows to fit, if not {FIT_PART}")] = None,
    test_part: Annotated[str | None, typer.Option(help=f"rows to score, if not {TEST_PART}")] = None,
    seen_nodes: Annotated[
        int | None, typer.Option(min=1, help="instead of parts: fit up to so many nodes, score beyond")
    ] = None,
    coverage: CoverageOption = 0.9,
    plot: Annotated[Path | None, typer.Option(help="where to draw predicted against measured (PNG)")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score predictions on measurements that the fit has not seen, beside the published form of Pollux.

    A table with the parts placements and scalability is fitted on the first and scored on the second;
    any other is fitted up to 4 nodes and scored beyond.
    """
    from training.steptimes.evaluation import evaluate as score
    from training.steptimes.model import fit_model, read_model, renamed
    from training.steptimes.pollux import fit_pollux
    from training.steptimes.table import read_table

    whole = read_table(table)
    with _progress(quiet=quiet) as tell:
        if model is not None:
            fitted = read_model(model)
            train, test = renamed(whole, fitted.fitted.models), whole
        else:
            train, test = _split(whole, fit_part, test_part, seen_nodes)
            fitted = fit_model(train, tell)
        tell("fitting the published form")
        result = score(fitted, fit_pollux(_known(train, model)), test, coverage)
    if plot is not None:
        from training.steptimes.plot import draw

        draw(result, plot, f"{table.name}: {result.overall.mean:.1f} % mean error")
    if as_json:
        rows = [asdict(one) for one in (*result.scores, result.overall)]
        print_json({"fitted_rows": len(train), "coverage": coverage, "scores": rows})
        return
    print_table(
        ("model", ">rows", ">mean %", ">median %", ">p95 %", ">bias %", ">inside", ">interval", ">published form %"),
        [_line(one) for one in (*result.scores, result.overall)],
        title=f"Absolute percentage errors on {len(test)} rows; intervals state {coverage:.0%}",
    )
    if model is not None:
        typer.echo("The published form was fitted to the very rows it is scored on: a bound, not a rival.")
    if plot is not None:
        typer.echo(f"drawn: {plot}")


def _line(one: Score) -> tuple[str, ...]:
    return (
        one.name,
        str(one.rows),
        f"{one.mean:.1f}",
        f"{one.median:.1f}",
        f"{one.p95:.1f}",
        f"{one.bias:+.1f}",
        f"{one.covered:.1%}",
        f"+{one.half_width:.0f} %",
        f"{one.reference_mean:.1f}",
    )


def _nonempty(table: StepTable, part: str | None) -> StepTable:
    if part is None:
        return table
    chosen = table.in_part(part)
    if not len(chosen):
        parts = ", ".join(sorted(set(table.part))) or "none"
        raise UsageError(f"no row has the part {part[:40]!r}; the table's are {parts}")
    return chosen


def _split(
    table: StepTable, fit_part: str | None, test_part: str | None, seen_nodes: int | None
) -> tuple[StepTable, StepTable]:
    """Return the rows to fit and the rows to score."""
    named = fit_part is not None or test_part is not None
    if seen_nodes is not None and named:
        raise UsageError("--seen-nodes divides by nodes, --fit-part and --test-part by part; give one of both")
    if seen_nodes is None and (named or {FIT_PART, TEST_PART} <= set(table.part)):
        return _nonempty(table, fit_part or FIT_PART), _nonempty(table, test_part or TEST_PART)
    limit = seen_nodes or SEEN_NODES
    train, test = table.where(table.nodes <= limit), table.where(table.nodes > limit)
    if not len(train) or not len(test):
        raise UsageError(
            f"the table has {len(train)} rows up to {limit} nodes and {len(test)} beyond",
            next_step="divide it with --seen-nodes, or by parts with --fit-part and --test-part",
        )
    return train, test


def _known(table: StepTable, model: Path | None) -> StepTable:
    """Return a table that has rows of each of its models, as the published form is fitted to each."""
    present = sorted({table.models[index] for index in table.model})
    if model is not None and len(present) < len(table.models):
        missing = ", ".join(name for name in table.models if name not in present)
        raise UsageError(f"the table has no row of {missing}, which the model file knows; score a table that has")
    return table


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show the stage that a fit is at, on a terminal's standard error."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _stage: None
        return
    with console.status("reading") as status:
        yield status.update
