"""Following a job until it ends: `hansa logs -f` and `hansa watch`, by polling what anyone may poll."""

from __future__ import annotations

import json
import statistics
import time
from typing import Any, Final

import typer

from broker.cli.client import BrokerClient
from broker.cli.errors import UnfinishedError
from broker.cli.jobs import where_text
from broker.cli.output import credits_text, duration_text

POLL_S: Final = 1.0
FINAL_STATES: Final = frozenset({"finished", "failed", "cancelled"})
INTERRUPTED: Final = 130
LOSS_NAMES: Final = ("held_out_loss", "loss")
BAR_WIDTH: Final = 40


def follow_log(client: BrokerClient, job_id: str, site: str | None, *, follow: bool, as_json: bool) -> int:
    """Print the logs of a job's newest attempt, then what is added to them; return the exit code."""
    offsets: dict[str, int] = {}
    try:
        while True:
            # Asked before the log is read: what was written before the end is then certainly read after it.
            ended = client.job(job_id)["state"] in FINAL_STATES
            grown = _print_grown(client, job_id, site, offsets, as_json=as_json)
            if not grown:
                if ended or not follow:
                    return 0
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        return INTERRUPTED


def _print_grown(
    client: BrokerClient, job_id: str, site: str | None, offsets: dict[str, int], *, as_json: bool
) -> bool:
    first = client.stream(job_id, "log", site=site, offset=0) if not offsets else None
    sites = [site] if site else (first or client.stream(job_id, "log"))["sites"]
    grown = False
    for each in sites:
        piece = client.stream(job_id, "log", site=each)
        if piece["lease_id"] is None:
            continue
        offset = offsets.get(piece["lease_id"], 0)
        if offset:
            piece = client.stream(job_id, "log", site=each, epoch=piece["epoch"], offset=offset)
        if piece["next_offset"] == offset:
            continue
        grown = True
        offsets[piece["lease_id"]] = piece["next_offset"]
        if as_json:
            typer.echo(json.dumps(piece, ensure_ascii=False))
            continue
        prefix = f"[{each}] " if len(sites) > 1 else ""
        for line in _printable(piece["text"]).splitlines():
            typer.echo(prefix + line)
    return grown


def watch_job(client: BrokerClient, job_id: str, *, as_json: bool) -> int:
    """Show a job until it ends; return the exit code. Raises UnfinishedError where it failed or was cancelled."""
    job = client.job(job_id)
    seen = Measurements()
    try:
        job = (_watch_as_json if as_json else _watch_live)(client, job, seen)
    except KeyboardInterrupt:
        return INTERRUPTED
    if job["state"] != "finished":
        raise UnfinishedError(f"{job['name']} has {job['state']}: {job['reason']}", next_step=f"hansa logs {job_id}")
    return 0


class Measurements:
    """What a job reported so far, read piece by piece: first and last seen, rounds, speed while it trained."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._since: str | None = None
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.round_last: int | None = None
        self._speeds: dict[str, list[float]] = {}

    def read(self, client: BrokerClient, job_id: str) -> None:
        """Read what was reported since the last time."""
        piece = client.stream(job_id, "metrics", since=self._since)
        self._since = piece["next_since"]
        for row in piece["items"]:
            self.take(row)

    def take(self, row: dict[str, Any]) -> None:
        """Take one row of measurements."""
        for name in LOSS_NAMES:
            value = row.get(name)
            if isinstance(value, int | float):
                self.first.setdefault(name, float(value))
                self.last[name] = float(value)
        speed = row.get("samples_per_s")
        # Every row repeats the last round's speed; the row that closes a round says how many sites it merged.
        if isinstance(speed, int | float) and "sites_merged" in row:
            self._speeds.setdefault(str(row["site_id"]), []).append(float(speed))
        number = row.get("round")
        if isinstance(number, int | float):
            self.round_last = max(int(number), self.round_last or 0)

    @property
    def samples_per_s(self) -> float | None:
        """How fast the job trained in its median round, all sites together; None before the first."""
        if not self._speeds:
            return None
        return sum(statistics.median(speeds) for speeds in self._speeds.values())

    @property
    def text(self) -> str:
        """The held-out loss where there is one, else the training loss."""
        for name in LOSS_NAMES:
            if name in self.first:
                return f"{name.replace('_', ' ')} {self.first[name]:.3f} → {self.last[name]:.3f}"
        return "no loss reported yet"


def _watch_as_json(client: BrokerClient, job: dict[str, Any], seen: Measurements) -> dict[str, Any]:
    """Print one line of JSON for each change of the job."""
    shown = ""
    while True:
        seen.read(client, job["job_id"])
        line = json.dumps({**job, "loss_first": seen.first, "loss_last": seen.last}, ensure_ascii=False)
        if line != shown:
            typer.echo(line)
            shown = line
        if job["state"] in FINAL_STATES:
            return job
        time.sleep(POLL_S)
        job = client.job(job["job_id"])


def _watch_live(client: BrokerClient, job: dict[str, Any], seen: Measurements) -> dict[str, Any]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    console = Console(highlight=False)
    said = ""
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            seen.read(client, job["job_id"])
            lines = _lines(job, seen)
            if console.is_terminal:
                bar = ProgressBar(total=1.0, completed=job["progress"], width=BAR_WIDTH)
                live.update(Group(*(Text(line) for line in lines), bar), refresh=True)
            elif (headline := lines[0]) != said:
                said = headline
                typer.echo(headline)
            if job["state"] in FINAL_STATES:
                break
            time.sleep(POLL_S)
            job = client.job(job["job_id"])
    if not console.is_terminal:
        for line in lines[1:]:
            typer.echo(line)
    return job


def _lines(job: dict[str, Any], seen: Measurements) -> list[str]:
    lines = [f"{job['name']} is {job['state']}: {job['reason']}"]
    placement = job["placement"]
    if placement is not None:
        lines.append(f"{where_text(placement)} at {credits_text(placement['charge_micros_per_hour'])} credits/h")
        measured = placement["samples_per_s_measured"]
        if measured:
            left_s = (job["samples"] - job["samples_done"]) / measured
            predicted = placement["samples_per_s_predicted"]
            lines.append(f"{measured:.1f} samples/s ({predicted:.1f} predicted), {duration_text(left_s)} left")
    lines.append(seen.text)
    lines.append(
        f"{job['samples_done']} of {job['samples']} samples, {credits_text(job['cost_micros'])} credits "
        f"of {credits_text(job['budget_micros'])}"
    )
    return lines


def _printable(text: str) -> str:
    """Return a stranger's output without the control characters that could take over a terminal."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")
