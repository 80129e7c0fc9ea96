"""Draws the demo while it runs: one live picture in a terminal, plain lines in a pipe.

A terminal shows progress in place; nothing scrolls but the few lines that stay (`say`). A pipe gets a line for each
stage, each round that changed a price or a placement, and each job every few seconds.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from broker.cli.output import credits_text
from broker.demo.board import Board, JobRow, PoolRow

REFRESH_PER_S: Final = 8
PLAIN_EVERY_S: Final = 5.0
BAR_WIDTH: Final = 18
PLAIN_WIDTH: Final = 160
STATE_STYLES: Final = {"running": "green", "finished": "bold green", "failed": "bold red", "cancelled": "yellow"}


class Display(Protocol):
    """What the journey may ask for."""

    def __enter__(self) -> Self:
        """Begin to draw."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Draw no more; what was said stays."""

    def stage(self, text: str) -> None:
        """Say what is going on now."""

    def say(self, text: str) -> None:
        """Leave a line that stays."""

    def show(self, board: Board) -> None:
        """Show where everything stands."""

    def close(self) -> None:
        """Take the picture away for good; may be called twice."""


class LiveDisplay:
    """For a terminal."""

    def __init__(self, console: Console) -> None:
        """Draw on `console`."""
        self._console = console
        self._started_s = time.monotonic()
        self._stage = "starting"
        self._board = Board()
        self._spinner = Spinner("dots")
        self._live = Live(
            console=console, refresh_per_second=REFRESH_PER_S, get_renderable=self._picture, transient=True
        )

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Take the picture away; the lines that were said stay."""
        self.close()

    def close(self) -> None:
        """Take the picture away for good."""
        self._live.stop()

    def stage(self, text: str) -> None:
        """Say what is going on now, in the picture's first line."""
        self._stage = text

    def say(self, text: str) -> None:
        """Leave a line above the picture."""
        self._console.print(Text(text))

    def show(self, board: Board) -> None:
        """Show where everything stands; drawn with the next refresh."""
        self._board = board

    def _picture(self) -> RenderableType:
        elapsed_s = time.monotonic() - self._started_s
        self._spinner.update(text=Text(f"{self._stage}  ({elapsed_s:.0f} s)", style="bold"))
        parts: list[RenderableType] = [self._spinner]
        if self._board.pools:
            parts += [Text(), Text(_round_text(self._board)), _pool_table(self._board)]
        if self._board.jobs:
            parts += [Text(), _job_table(self._board.jobs), Text(), _reasons(self._board.jobs)]
        return Group(*parts)


class PlainDisplay:
    """For a pipe, a file or a terminal that cannot move its cursor."""

    def __init__(self, console: Console) -> None:
        """Print on `console`."""
        self._console = console
        self._started_s = time.monotonic()
        self._pools: tuple[tuple[str, int | None, int], ...] = ()
        self._said: dict[str, tuple[str, str]] = {}
        self._progress_s = 0.0
        self._stage = ""

    def __enter__(self) -> Self:
        """Begin to print."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Do nothing: what was printed stays."""

    def close(self) -> None:
        """Do nothing: what was printed stays."""

    def stage(self, text: str) -> None:
        """Print what is going on now, where that is new."""
        if text != self._stage:
            self._stage = text
            self._line(text)

    def say(self, text: str) -> None:
        """Print a line."""
        self._line(text)

    def show(self, board: Board) -> None:
        """Print what changed since the last time, and progress every few seconds."""
        pools = tuple((pool.pool_id, pool.price_micros, pool.leased) for pool in board.pools)
        if pools and pools != self._pools:
            self._pools = pools
            self._line(f"round {board.round_number}: " + ", ".join(_pool_text(pool) for pool in board.pools))
        for job in board.jobs:
            if self._said.get(job.name) != (job.state, job.why):
                self._said[job.name] = (job.state, job.why)
                self._line(f"job {job.name} is {job.state}{' on ' + job.where if job.where else ''}: {job.why}")
        now_s = time.monotonic()
        if now_s - self._progress_s >= PLAIN_EVERY_S:
            self._progress_s = now_s
            for job in board.jobs:
                if job.state == "running":
                    self._line(f"job {job.name}: {_progress_text(job)}")

    def _line(self, text: str) -> None:
        elapsed_s = time.monotonic() - self._started_s
        self._console.print(Text(f"[{elapsed_s:5.1f} s] {text}"), soft_wrap=True)


def display_for(console: Console) -> Display:
    """Return the live picture for a terminal, plain lines for anything else."""
    return LiveDisplay(console) if console.is_terminal and not console.is_dumb_terminal else PlainDisplay(console)


def make_console() -> Console:
    """Return a console on standard output; a pipe has room for whole tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def _round_text(board: Board) -> str:
    solved = "" if board.solve_ms is None else f", solved in {board.solve_ms:.0f} ms"
    gap = board.gap_micros_per_hour
    bound = "" if gap is None else f", at most {credits_text(gap)} credits/h below the best"
    return f"Round {board.round_number}: prices are the LP's duals{solved}{bound}"


def _pool_table(board: Board) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("pool")
    for name in ("slots", "leased", "ask /slot-h", "price /slot-h"):
        table.add_column(name, justify="right")
    for pool in board.pools:
        above = pool.price_micros is not None and pool.price_micros > pool.ask_micros
        table.add_row(
            pool.pool_id,
            str(pool.capacity),
            str(pool.leased),
            credits_text(pool.ask_micros, 3),
            Text(credits_text(pool.price_micros, 3), style="bold yellow" if above else ""),
        )
    return table


def _job_table(jobs: tuple[JobRow, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("job", "state", "on", "progress"):
        table.add_column(name, no_wrap=True)
    for name in ("held-out loss", "sealed", "samples/s (predicted)", "charged"):
        table.add_column(name, justify="right", no_wrap=True)
    for job in jobs:
        table.add_row(
            job.name,
            Text(job.state, style=STATE_STYLES.get(job.state, "dim")),
            job.where or "-",
            ProgressBar(total=max(1, job.samples), completed=job.samples_done, width=BAR_WIDTH),
            loss_text(job),
            "-" if job.sealed_round is None else str(job.sealed_round),
            speed_text(job),
            credits_text(job.charged_micros, 4),
        )
    return table


def _reasons(jobs: tuple[JobRow, ...]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(style="dim")
    for job in jobs:
        table.add_row(job.name, job.why)
    return table


def loss_text(job: JobRow) -> str:
    """Return the held-out loss before and now."""
    if job.loss_first is None:
        return "-"
    return f"{job.loss_first:.2f}" if job.loss_last is None else f"{job.loss_first:.2f} → {job.loss_last:.2f}"


def speed_text(job: JobRow) -> str:
    """Return the speed measured and, behind it, the speed predicted."""
    if job.samples_per_s_predicted is None:
        return "-"
    measured = "…" if job.samples_per_s_measured is None else f"{job.samples_per_s_measured:.0f}"
    return f"{measured} ({job.samples_per_s_predicted:.0f})"


def _pool_text(pool: PoolRow) -> str:
    return (
        f"{pool.pool_id} {credits_text(pool.price_micros)} (ask {credits_text(pool.ask_micros)}, "
        f"{pool.leased} of {pool.capacity} leased)"
    )


def _progress_text(job: JobRow) -> str:
    parts = [f"{job.samples_done} of {job.samples} samples", f"held-out loss {loss_text(job)}"]
    parts += [f"{job.sealed_round} sealed rounds"] if job.sealed_round is not None else []
    return ", ".join(
        [*parts, f"{speed_text(job)} samples/s (predicted)", f"{credits_text(job.charged_micros)} credits"]
    )
