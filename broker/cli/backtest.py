"""`hansa backtest`: replay a trace of jobs through the market and other schedulers, and write what a federation is worth."""

from __future__ import annotations

import datetime as dt
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Final, Self

import typer

from broker.cli.errors import UsageError

DEFAULT_POLICIES: Final = "alone,fcfs,cheapest,race,gavel,sia,market-alone,market"
NEVER: Final = "none"

app = typer.Typer(rich_markup_mode=None)


@app.command()
def backtest(
    *,
    trace: Annotated[Path, typer.Option(help="jobs: timestamp,duration,num_gpus,cluster (CSV, may be gzipped)")],
    sites: Annotated[Path, typer.Option(help="which clusters are sites: GPU type, ask, capacity (YAML)")],
    report: Annotated[Path, typer.Option(help="where to write the page (HTML)")],
    policy: Annotated[str, typer.Option(help="policies to compare, joined by commas")] = DEFAULT_POLICIES,
    throughput: Annotated[
        Path | None,
        typer.Option(help="measured steps/s by model, GPU type and count (CSV); without it all GPUs are equal"),
    ] = None,
    bids: Annotated[str, typer.Option(help="how bids are drawn: lognormal, per-user or flat")] = "lognormal",
    seed: Annotated[int, typer.Option(min=0, help="of bids, models and samples")] = 0,
    bid_draws: Annotated[int, typer.Option(min=1, max=100, help="draws of bids that the interval is over")] = 1,
    patience: Annotated[
        str, typer.Option(help="a job withdraws an hour plus so many of its durations after arrival; `none`: never")
    ] = "2",
    round_minutes: Annotated[
        float, typer.Option(min=0.1, max=1440, help="least time between the market's rounds")
    ] = 10.0,
    moments: Annotated[
        int, typer.Option(min=0, max=1000, help="rounds at which coalitions and misreports are tried")
    ] = 12,
    agents: Annotated[int, typer.Option(min=0, max=1000, help="buyers tried at each of them; 0: no misreports")] = 12,
    start: Annotated[str | None, typer.Option("--from", help="first day of arrivals, such as 2017-10-02")] = None,
    end: Annotated[str | None, typer.Option("--to", help="day before which arrivals end")] = None,
    json: Annotated[Path | None, typer.Option(help="where to write the figures as JSON")] = None,
    solver: Annotated[str, typer.Option(help="what clears the rounds: product, or a small reference")] = "product",
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars")] = False,
) -> None:
    """Replay a trace of jobs and report what a federation would have been worth.

    Deterministic: the same files and options give the same figures, but for the times measured.
    """
    from broker.backtest.bids import BidRule
    from broker.backtest.policies import policies
    from broker.backtest.replay import Settings, Solver, replay
    from broker.backtest.report import as_json, html
    from broker.backtest.sites import federation, read_sites
    from broker.backtest.throughput import read_throughput, uniform
    from broker.backtest.trace import read_trace

    if bids not in set(BidRule):
        raise UsageError(f"--bids {bids[:40]!r} is none of {', '.join(BidRule)}")
    if solver not in set(Solver):
        raise UsageError(f"--solver {solver[:40]!r} is none of {', '.join(Solver)}")
    settings = Settings(
        policies=tuple(policies(policy)),
        bids=BidRule(bids),
        seed=seed,
        bid_draws=bid_draws,
        patience=_patience(patience),
        round_s=round_minutes * 60,
        moments=moments,
        agents=agents,
        solver=Solver(solver),
    )
    first, last = _day(start, "--from"), _day(end, "--to")
    if first is not None and last is not None and first >= last:
        raise UsageError("--from must be before --to")
    for path in (report, json):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"the folder {path.parent} does not exist; make it first")
    jobs = read_trace(trace)
    places = federation(read_sites(sites), jobs)
    table = uniform(places.gpu_types) if throughput is None else read_throughput(throughput)
    with _bars(quiet=quiet) as bars:
        results = replay(jobs, places, table, settings, start=first, end=last, progress=bars.progress)
    report.write_text(html(results), encoding="utf-8")
    if json is not None:
        json.write_text(as_json(results), encoding="utf-8")
    for each in results.runs:
        typer.echo(
            f"{each.run.policy:13} welfare {each.run.welfare.sum():12,.0f} credits  finished {each.run.finished.sum():7,}  "
            f"{each.events_per_minute:12,.0f} events/min"
        )
    for name, ratio in results.ratios.items():
        typer.echo(f"welfare, market over {name}: {ratio.estimate:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]")
    typer.echo(f"{report}")


def _patience(text: str) -> float | None:
    if text == NEVER:
        return None
    try:
        patience = float(text)
    except ValueError:
        patience = -1.0
    if not 0 <= patience < float("inf"):
        raise UsageError(f"--patience {text[:40]!r} must be a number from 0 up, or none")
    return patience


def _day(text: str | None, option: str) -> dt.datetime | None:
    if text is None:
        return None
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{option} {text[:40]!r} is not a date such as 2017-10-02") from None
    return moment.replace(tzinfo=moment.tzinfo or dt.UTC)


class _Bars:
    """A bar for each stage of a backtest, on standard error."""

    def __init__(self, display: Any) -> None:  # noqa: ANN401  rich is loaded by the command alone
        self._display = display
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.__exit__(kind, error, trace)

    def progress(self, stage: str, done: float) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._display.add_task(stage, total=1.0)
        self._display.update(self._tasks[stage], completed=done)


class _NoBars(_Bars):
    def progress(self, stage: str, done: float) -> None:
        """Say nothing."""


def _bars(*, quiet: bool) -> AbstractContextManager[_Bars]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    if quiet:
        return _NoBars(nullcontext())
    columns = (
        TextColumn("{task.description:26}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return _Bars(Progress(*columns, console=Console(stderr=True)))
