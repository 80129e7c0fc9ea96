"""`hansa site`: join a market, run the agent, look at what runs, drain.

Mounted by the broker's command line, and usable alone as `python -m sites`; it imports nothing of
the broker's, so a host in a datacenter needs `hansa[site]` only.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer

from sites import asks_cli, policy_cli
from sites import doctor as diagnosis
from sites import identity as identities
from sites.agent import DRAINING_FILE, Agent
from sites.client import BrokerClient, enrol
from sites.errors import AskError, JoinStringError, SiteError
from sites.journal import Journal
from sites.settings import SiteSettings, load_settings
from sites.statement import kept_statement, lines
from training.clock import SystemClock

app = typer.Typer(help="Offer a datacenter's GPUs to the market.", no_args_is_help=True)

app.add_typer(policy_cli.app, name="policy")

SettingsOption = Annotated[Path, typer.Option("--settings", help="the site.yaml of this site")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for other programs")]

_log = structlog.get_logger(__name__)


@app.command()
def join(
    join_string: Annotated[str, typer.Argument(help="the word that the market's admin handed over; works once")],
    *,
    settings: SettingsOption = Path("site.yaml"),
    as_json: JsonOption = False,
) -> None:
    """Join a market: make this site's key and exchange the join string for a certificate."""
    with _errors_told():
        site = load_settings(settings)
        invitation = identities.decode_join_string(join_string)
        if invitation.site_id != site.site_id:
            raise JoinStringError(f"the join string is for site {invitation.site_id}, {settings} is for {site.site_id}")
        key = identities.prepare_identity(site.folder)
        csr_pem = identities.certificate_request_pem(key, identities.site_uri(site.site_id))
        identities.store_identity(site.folder, invitation, enrol(invitation, csr_pem))
        certificate = identities.Identity(site.folder, SystemClock()).certificate
        _say(
            {"site_id": site.site_id, "url": invitation.url, "until": certificate.not_valid_after_utc.isoformat()},
            f"{site.site_id} has joined {invitation.url}; start the agent with: hansa site run --settings {settings}",
            as_json=as_json,
        )


@app.command()
def run(
    *,
    settings: SettingsOption = Path("site.yaml"),
    stop_attempts_on_exit: Annotated[
        bool, typer.Option("--stop-attempts-on-exit", help="end what runs when the agent is ended")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="log as JSON")] = False,
) -> None:
    """Run the agent until SIGTERM or Ctrl-C. What runs goes on, and the next agent takes it over."""
    _log_as(as_json=as_json)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    with _errors_told():
        site = load_settings(settings)
        clock = SystemClock()
        identity = identities.Identity(site.folder, clock)
        with BrokerClient(identity) as broker:
            agent = Agent(site, identity, broker, clock)
            _log.info("agent.started", site=site.site_id, broker=identity.url)
            try:
                agent.run(stop)
                if stop_attempts_on_exit:
                    agent.end_attempts()
            finally:
                agent.close()
            _log.info("agent.ended", site=site.site_id)


@app.command()
def status(*, settings: SettingsOption = Path("site.yaml"), as_json: JsonOption = False) -> None:
    """Show what this site has promised and what runs, from its journal."""
    with _errors_told():
        site = load_settings(settings)
        found = _status(site)
        attempts = found["attempts"]
        lines = [
            f"site {site.site_id}, market {found['market'] or 'not joined'}"
            + (", draining" if found["draining"] else ""),
            f"{len(attempts)} attempts, {found['confirmed']} confirmed leases, {found['usage_waiting']} usage rows waiting",
            *(
                f"  {entry['lease_id']} epoch {entry['epoch']}: {entry['phase']}"
                f" on {len(entry['gpu_ids'])} x {entry['gpu_type']} for job {entry['job_id']} {entry['detail']}"
                for entry in attempts
            ),
        ]
        _say(found, "\n".join(lines), as_json=as_json)


@app.command()
def ask(
    gpu_type: Annotated[str | None, typer.Argument(help="the pool whose ask is to be another")] = None,
    price: Annotated[
        str | None, typer.Argument(help="credits per GPU-hour, or a curve, cheapest first: 8:1.10,8:1.60")
    ] = None,
    *,
    settings: SettingsOption = Path("site.yaml"),
    clear: Annotated[bool, typer.Option("--clear", help="take back what was set; site.yaml's ask holds again")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what this site asks now and over the next 24 hours; with a pool and a price, set another base first."""
    with _errors_told():
        site = load_settings(settings)
        if gpu_type is not None and (price is None) == clear:
            asks_cli.change_ask(site, gpu_type, price)
        elif gpu_type is not None or price is not None or clear:
            raise AskError("name a pool with either a price or --clear")
        pools = asks_cli.asks_ahead(site, dt.datetime.fromtimestamp(SystemClock().now_ms() / 1000, dt.UTC))
        _say({"pools": pools}, asks_cli.table(pools), as_json=as_json)


@app.command()
def statement(*, settings: SettingsOption = Path("site.yaml"), as_json: JsonOption = False) -> None:
    """Show what this site earned, what its customers spent, and what it would have been worth alone."""
    with _errors_told():
        found = kept_statement(load_settings(settings).folder)
        _say(found.model_dump(mode="json"), "\n".join(lines(found, SystemClock().now_ms())), as_json=as_json)


@app.command()
def drain(
    *,
    settings: SettingsOption = Path("site.yaml"),
    end: Annotated[bool, typer.Option("--end", help="take new leases again")] = False,
) -> None:
    """Take no new leases; what runs goes on to the end of its lease."""
    with _errors_told():
        mark = load_settings(settings).folder / DRAINING_FILE
        if end:
            mark.unlink(missing_ok=True)
        else:
            mark.touch(mode=0o600)
        typer.echo("the site takes leases again" if end else "the site is draining: it takes no new leases")


@app.command()
def doctor(*, settings: SettingsOption = Path("site.yaml"), as_json: JsonOption = False) -> None:
    """Look for what would keep this site from working; each finding has its remedy. Ends with 1 where there is a fault."""
    with _errors_told():
        findings = diagnosis.examine(load_settings(settings), SystemClock())
        level = diagnosis.worst(findings)
        document = {"level": level.value, "findings": [dataclasses.asdict(finding) for finding in findings]}
        _say(document, diagnosis.table(findings), as_json=as_json)
        if level is diagnosis.Level.FAULT:
            raise typer.Exit(1)


def _status(site: SiteSettings) -> dict[str, Any]:  # a JSON document
    site.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    journal = Journal(site.folder / "journal.sqlite3")
    try:
        return {
            "site_id": site.site_id,
            "market": str(identities.market_document(site.folder).get("url", "")),
            "draining": (site.folder / DRAINING_FILE).exists(),
            "attempts": [
                record.model_dump(mode="json", exclude={"order", "stream_bytes"}) for record in journal.attempts()
            ],
            "confirmed": len(journal.confirmations()),
            "usage_waiting": len(journal.usage()),
        }
    finally:
        journal.close()


@contextmanager
def _errors_told() -> Iterator[None]:
    """Turn a SiteError into a sentence on standard error and exit code 1."""
    try:
        yield
    except SiteError as error:
        typer.echo(f"hansa site: {error} [{error.code}]", err=True)
        raise typer.Exit(1) from error


def _say(document: object, sentence: str, *, as_json: bool) -> None:
    typer.echo(json.dumps(document) if as_json else sentence)


def _log_as(*, as_json: bool) -> None:
    renderer = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[structlog.processors.add_log_level, structlog.processors.TimeStamper("iso", utc=True), renderer]
    )
