"""`hansa submit`, `quote`, `status`, `logs`, `watch`, `cancel`, `explain`, `invoice`, `fetch`: what a tenant does."""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from broker.cli import config
from broker.cli.errors import CliError, MissingError, UsageError
from broker.cli.output import (
    JsonOption,
    bytes_text,
    credits_text,
    duration_text,
    print_json,
    print_table,
    time_text,
)
from pricing.money import MILLISECONDS_PER_HOUR

if TYPE_CHECKING:
    from broker.cli.client import BrokerClient

JOBS_SHOWN: Final = 50
EVENTS_SHOWN: Final = 200
SHARE: Final = 100

JobFile = Annotated[Path, typer.Argument(help="the job as YAML", metavar="JOB.yaml")]
JobId = Annotated[str, typer.Argument(help="the job's id, as `hansa status` shows it", metavar="JOB")]


def register(app: typer.Typer) -> None:
    """Add the commands to the root."""
    for command in (submit, quote, status, logs, watch, cancel, explain, invoice, fetch):
        app.command()(command)
    # What people type elsewhere for the same things.
    for name, command in (("ls", status), ("show", status), ("cp", fetch)):
        app.command(name, hidden=True)(command)


def submit(
    job_file: JobFile,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what it could get, and submit nothing")] = False,
    key: Annotated[str | None, typer.Option(help="idempotency key: the same key never makes a second job")] = None,
    as_json: JsonOption = False,
) -> None:
    """Upload the workdir, show what the job could get, ask, and submit it."""
    if dry_run:
        quote(job_file, goal=None, as_json=as_json)
        return
    with _client() as client:
        spec = _spec(client, job_file)
        if not as_json:
            _print_quote(client.quote(spec))
        if not yes:
            if as_json or not sys.stdin.isatty():
                raise UsageError("nobody is there to ask", next_step="add --yes to submit without a question")
            budget = credits_text(spec["market"]["budget_micros"])
            typer.confirm(f"Submit {spec['name']}? {budget} credits are held until it ends", abort=True)
        job = client.submit(spec, key or uuid.uuid4().hex)
    if as_json:
        print_json(job)
    else:
        typer.echo(f"{job['job_id']} is {job['state']}; follow it with: hansa watch {job['job_id']}")


def quote(
    job_file: JobFile,
    goal: Annotated[
        str | None, typer.Option(help="also say what to ask for: deadline (in time, cheapest), budget (fastest), value")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a job could get at the last prices, without any effect: its workdir stays here."""
    from broker.cli.job_document import read_job
    from training.goals import Goal

    if goal is not None and goal not in set(Goal):
        raise UsageError(f"no goal is called {goal[:40]!r}", next_step=f"known are {', '.join(Goal)}")
    spec = read_job(job_file).spec
    with _client() as client:
        document = client.quote(spec, goal)
    if as_json:
        print_json(document)
        return
    _print_quote(document)
    if goal is not None:
        _print_advice(goal, document["advice"])


def status(
    job_id: Annotated[str | None, typer.Argument(help="one job; left out, all of yours", metavar="JOB")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="jobs to list")] = JOBS_SHOWN,
    as_json: JsonOption = False,
) -> None:
    """Show your jobs, or one of them with its placement and why it stands where it does."""
    with _client() as client:
        if job_id is None:
            jobs = client.jobs(limit)
            if as_json:
                print_json({"items": jobs})
            else:
                _print_jobs(jobs)
            return
        job = client.job(job_id)
        if as_json:
            print_json(job)
            return
        _print_job(job)
        print_table(
            ("when", "what", "detail"),
            [
                (time_text(row["created_ms"]), _event_text(row), row["detail"])
                for row in client.events(job_id, EVENTS_SHOWN)
            ],
        )


def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until the job has ended")] = False,
    site: Annotated[str | None, typer.Option(help="of this site only")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print what the job's script printed, with the site in front where there are several."""
    from broker.cli.following import follow_log

    with _client() as client:
        raise typer.Exit(follow_log(client, job_id, site, follow=follow, as_json=as_json))


def watch(job_id: JobId, as_json: JsonOption = False) -> None:
    """Watch a job live (state, progress, loss, cost) until it ends; exit 6 where it does not finish."""
    from broker.cli.following import watch_job

    with _client() as client:
        raise typer.Exit(watch_job(client, job_id, as_json=as_json))


def cancel(job_id: JobId, as_json: JsonOption = False) -> None:
    """End a job; what was delivered so far stays charged, the rest of its hold is released."""
    with _client() as client:
        job = client.cancel(job_id)
    if as_json:
        print_json(job)
    else:
        typer.echo(f"{job['job_id']} is {job['state']}")


def explain(job_id: JobId, as_json: JsonOption = False) -> None:
    """Say why a job stands where it does and what would change it, each change tried on the last round."""
    with _client() as client:
        document = client.explanation(job_id)
    if as_json:
        print_json(document)
        return
    typer.echo(f"{job_id} is {document['state']} ({document['code']}): {document['sentence']}")
    for row in document["changes"]:
        typer.echo(f"- {row['sentence']}")
    if document["changes"]:
        typer.echo(f"(each tried on round {document['round_number']}; the next one may differ)")
    elif document["checked"]:
        typer.echo("no single change of bid, budget, GPU type, sites or count would have placed it in the last round")


def invoice(job_id: JobId, as_json: JsonOption = False) -> None:
    """Show what a job has cost, line by line."""
    with _client() as client:
        document = client.invoice(job_id)
    if as_json:
        print_json(document)
        return
    print_invoice(document)


def fetch(
    job_id: JobId,
    name: Annotated[str | None, typer.Argument(help="one artifact; left out, all outputs")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="folder to write to")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Fetch what a job has left: its outputs and checkpoints."""
    with _client() as client:
        held = client.artifacts(job_id)
        wanted = [row for row in held if (row["name"] == name if name else row["kind"] == "output")]
        if not wanted:
            names = ", ".join(sorted(row["name"] for row in held)) or "nothing yet"
            raise MissingError(f"job {job_id} has no {name or 'output'}", next_step=f"it has: {names}")
        output.mkdir(parents=True, exist_ok=True)
        fetched = []
        for row in wanted:
            target = output / _file_name(row["name"])
            size = client.download(row["path"], target, row["digest"])
            fetched.append({"name": row["name"], "path": str(target), "size_bytes": size, "digest": row["digest"]})
    if as_json:
        print_json({"items": fetched})
        return
    for row in fetched:
        typer.echo(f"{row['path']}  {bytes_text(row['size_bytes'])}")


def _client() -> BrokerClient:
    from broker.cli.client import BrokerClient

    return BrokerClient(config.load(os.environ))


def _spec(client: BrokerClient, path: Path) -> dict[str, Any]:
    """Read a job file, bring its workdir to the broker, and return the spec as the wire has it."""
    from broker.cli.job_document import read_job

    document = read_job(path)
    client.upload_workdir(document.packed)
    return document.spec


def _print_quote(document: dict[str, Any]) -> None:
    rows = document["items"]
    staged = any(row["staging_bytes"] for row in rows)
    print_table(
        (
            "where",
            ">GPUs",
            ">samples/s",
            ">90 % of runs",
            ">done in",
            ">credits/h",
            ">credits in all",
            ">in time",
            ">bid/million",
            "could win",
            *(["data brought first"] if staged else []),
        ),
        [
            (
                where_text(row["configuration"]),
                sum(part["gpus"] for part in row["configuration"]["parts"]),
                f"{row['samples_per_s']:.0f}",
                f"{row['samples_per_s_low']:.0f} to {row['samples_per_s_high']:.0f}",
                duration_text(row["hours_to_finish"] * 3600 + row["staging_s"]),
                credits_text(row["price_micros_per_hour"], 4),
                credits_text(row["total_micros"], 4),
                "-" if row["deadline_probability"] is None else f"{row['deadline_probability']:.0%}",
                credits_text(row["recommended_bid_micros_per_million_samples"], 4),
                "yes" if row["reason"] is None else f"no: {row['reason']}",
                *([_data_text(row)] if staged else []),
            )
            for row in rows
        ],
        title="At the last prices",
        empty="no site could run this job now",
    )


def _data_text(row: dict[str, Any]) -> str:
    if not row["staging_bytes"]:
        return "is there"
    cost = f", egress {credits_text(row['staging_egress_micros'], 4)}" if row["staging_egress_micros"] else ""
    return f"{row['staging_bytes'] / 1e9:.3g} GB in {duration_text(row['staging_s'])}{cost}"


def _print_advice(goal: str, advice: dict[str, Any] | None) -> None:
    if advice is None:
        typer.echo(f"for {goal}: no site could run this job now")
        return
    sold = advice["row"]["configuration"]
    counts: dict[str, int] = {}
    for part in sold["parts"]:
        counts[part["gpu_type"]] = counts.get(part["gpu_type"], 0) + part["gpus"]
    typer.echo(f"for {goal}, of {advice['candidates']}: {advice['why']}")
    noise = (
        "no noise scale was reported" if advice["noise_batch"] is None else f"noise scale {advice['noise_batch']:.0f}"
    )
    typer.echo(f"{advice['counts']:.0%} of its samples count ({noise})")
    asked = ", ".join(f"{gpu_type}:{count}" for gpu_type, count in counts.items())
    typer.echo(
        f"to ask for just that: accelerators {asked}, batch_per_gpu {advice['batch_per_gpu']}, sites_max {len(sold['parts'])}"
    )
    if len(sold["parts"]) > 1:
        plan = advice["sync"]
        typer.echo(
            f"  sync: {{strategy: {plan['strategy']}, codec: {plan['codec']}, period_steps: {plan['period_steps']}}}"
        )


def _print_jobs(jobs: list[dict[str, Any]]) -> None:
    print_table(
        ("job", "name", "state", ">done", "submitted", "why"),
        [
            (
                job["job_id"],
                job["name"],
                job["state"],
                _done_text(job),
                time_text(job["submitted_ms"]),
                job["reason"],
            )
            for job in jobs
        ],
        empty="no jobs yet; submit one with: hansa submit job.yaml",
    )


def _print_job(job: dict[str, Any]) -> None:
    typer.echo(f"{job['job_id']}  {job['name']}")
    typer.echo(f"state    {job['state']}" + (f": {job['reason']}" if job["reason"] else ""))
    typer.echo(f"done     {_done_text(job)}")
    placement = job["placement"]
    if placement:
        typer.echo(f"placed   {where_text(placement)} in round {placement['round_number']}, {placement['state']}")
        typer.echo(f"why      {placement['why']}")
        typer.echo(f"price    {credits_text(placement['charge_micros_per_hour'])} credits/h")
        measured = placement["samples_per_s_measured"]
        typer.echo(
            f"speed    {'-' if measured is None else f'{measured:.1f}'} samples/s measured, "
            f"{placement['samples_per_s_predicted']:.1f} predicted{_expected_text(placement)}"
        )
    typer.echo(
        f"cost     {credits_text(job['cost_micros'])} credits so far, {credits_text(job['held_micros'])} still held "
        f"of {credits_text(job['budget_micros'])}"
    )


def _expected_text(placement: dict[str, Any]) -> str:
    """Return what the family's measurements say of a placement's speed, nothing before the first of them."""
    if placement["samples_per_s_expected"] is None:
        return ""
    low, high = placement["samples_per_s_low"], placement["samples_per_s_high"]
    return f", {placement['samples_per_s_expected']:.1f} expected by now ({low:.1f} to {high:.1f})"


def print_invoice(document: dict[str, Any]) -> None:
    """Print an invoice as a table."""
    print_table(
        ("site", "GPUs", ">round", ">credits/GPU-h", ">GPU-hours", ">GPUs", ">links", ">discount", ">charge"),
        [
            (
                row["site_id"],
                f"{row['gpus']}x{row['gpu_type']}",
                "-" if row["round_number"] is None else row["round_number"],
                credits_text(row["price_micros_per_gpu_hour"]),
                f"{row['gpu_milliseconds'] / MILLISECONDS_PER_HOUR:.4f}",
                credits_text(row["gpu_micros"]),
                credits_text(row["rent_micros"] + row["egress_micros"]),
                credits_text(row["discount_micros"] + row["cut_micros"]),
                credits_text(row["charge_micros"]),
            )
            for row in document["lines"]
        ],
        title=f"Invoice of {document['job_id']} ({document['name']}){'' if document['final'] else ', not final yet'}",
        empty=f"nothing was charged for {document['job_id']}",
    )
    typer.echo(
        f"held {credits_text(document['hold_micros'])}, charged {credits_text(document['posted_micros'])}, "
        f"returned {credits_text(document['voided_micros'])} credits"
    )
    for row in document["amends"]:
        kind = "refunded" if row["kind"] == "refund" else "compensated"
        typer.echo(f"{kind} {credits_text(row['amount_micros'])} credits: {row['reason']}")


def where_text(placement: dict[str, Any]) -> str:
    """Return where a placement (or a quoted configuration, whose rows are `parts`) is, for people."""
    rows = placement.get("pools") or placement["parts"]
    return " + ".join(
        f"{row['pool_id'].partition('/')[0]} {row['gpus']}x{row['pool_id'].partition('/')[2]}" for row in rows
    )


def _done_text(job: dict[str, Any]) -> str:
    return f"{job['samples_done']} of {job['samples']} ({SHARE * job['progress']:.0f} %)"


def _event_text(row: dict[str, Any]) -> str:
    where = f" at {row['site_id']}" if row["site_id"] else ""
    change = f"{row['before']} → {row['after']}" if row["before"] else row["after"]
    return f"{row['kind']} {change}{where}"


def _file_name(name: str) -> str:
    """Return one file's name for an artifact's, which a site chose: it must not lead elsewhere.

    SITE/summary.json becomes SITE-summary.json, so that no site's file overwrites another's.
    """
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    if not parts or not name.isprintable():
        raise CliError(f"{name!r} is not a name that a file may have here", code="cli.name")
    return "-".join(parts)
