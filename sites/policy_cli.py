"""`hansa site policy check`: read a policy.yaml, and say what it would do with a job."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from sites.errors import PolicyError, SiteError
from sites.policy import Asked, Objection, Policy, load_policy, objections
from training.errors import TrainingError
from training.jobfile import load_job_file
from training.spec import JobSpec

app = typer.Typer(help="The owner's policy: which leases this site refuses.", no_args_is_help=True)
# Who is asked about a job only, not about its workdir, knows no digest.
_UNKNOWN_WORKDIR = "0" * 64


@app.callback()
def policy() -> None:
    """Keep `check` a command of its own."""


@app.command()
def check(
    policy_file: Annotated[Path, typer.Argument(help="the policy.yaml")],
    job_file: Annotated[Path | None, typer.Argument(help="a job.yaml, to be judged by it")] = None,
    *,
    tenant: Annotated[str, typer.Option(help="who sends it")] = "tenant",
    site: Annotated[str, typer.Option(help="this site's id, for data whose home it is")] = "",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the lease")] = 1,
    pool: Annotated[int, typer.Option(min=1, help="GPUs of the pool")] = 8,
    lent: Annotated[int, typer.Option(min=0, help="of them, those that serve other leases")] = 0,
    peer: Annotated[list[str] | None, typer.Option(help="another site of the gang; may be given again")] = None,
    workdir: Annotated[str, typer.Option(help="the digest of its workdir")] = _UNKNOWN_WORKDIR,
    at: Annotated[dt.datetime | None, typer.Option(help="when, in UTC; else now")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for other programs")] = False,
) -> None:
    """Check a policy and, with a job, say whether its lease would be taken. Ends with 1 where it would be refused."""
    moment = dt.datetime.now(dt.UTC) if at is None else at.replace(tzinfo=dt.UTC)
    try:
        rules = load_policy(policy_file)
        spec = None if job_file is None else _job(job_file, workdir)
    except SiteError as error:
        typer.echo(f"hansa site: {error} [{error.code}]", err=True)
        raise typer.Exit(1) from error
    asked = Asked(
        site_id=site, tenant_id=tenant, spec=spec, gpus=gpus, pool_gpus=pool, lent=lent, peers=tuple(peer or ())
    )
    against = [] if spec is None else objections(rules, asked, moment)
    if as_json:
        refusals = [{"code": row.code, "reason": row.reason, "scope": row.scope.value} for row in against]
        typer.echo(json.dumps({"policy": rules.model_dump(mode="json"), "digest": rules.digest, "refusals": refusals}))
    else:
        typer.echo("\n".join([*sentences(rules), *([] if spec is None else _verdict(spec, tenant, against))]))
    if against:
        raise typer.Exit(1)


def sentences(policy: Policy) -> Iterator[str]:
    """Yield what a policy says, a line for each rule."""
    allowed, refused = policy.tenants_allowed, policy.tenants_refused
    yield (
        "tenants   "
        + ("all" if allowed is None else f"only {_listed(allowed)}")
        + (f", not {_listed(refused)}" if refused else "")
    )
    yield "workdirs  " + ("all" if policy.workdirs_allowed is None else f"{len(policy.workdirs_allowed)} known ones")
    yield "setup     " + ("allowed" if policy.setup_allowed else "no setup commands")
    yield "hours     " + ("always" if policy.hours is None else _hours(policy))
    yield f"local     {policy.local_share:.0%} of each pool, rounded up, stays for local users"
    yield f"lease     at most {policy.gpus_max_per_lease} GPUs" + (
        "" if policy.lease_hours_max is None else f" for {policy.lease_hours_max:g} hours"
    )
    stays = "stays here" + (f", or goes to {_listed(policy.data_may_go_to)}" if policy.data_may_go_to else "")
    yield "data      " + (f"of this site {stays}" if policy.data_stays else "as its tenant says")
    yield "peers     all" + (f", not {_listed(policy.peers_refused)}" if policy.peers_refused else "")


def _hours(policy: Policy) -> str:
    assert policy.hours is not None, "asked only where there are hours"
    now = dt.datetime.now(dt.UTC)
    spans = policy.hours.spans(now, now + dt.timedelta(days=1))
    told = ", ".join(f"{begins:%a %H:%M} to {ends:%a %H:%M}" for begins, ends in spans) or "never"
    return f"in the next day, UTC: {told}"


def _verdict(spec: JobSpec, tenant: str, against: list[Objection]) -> Iterator[str]:
    if not against:
        yield f"{spec.name} of {tenant} is welcome"
    for objection in against:
        yield f"{spec.name} of {tenant} is refused: {objection.reason} [{objection.code}]"


def _listed(names: tuple[str, ...]) -> str:
    shown = 5
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "") or "nobody"


def _job(path: Path, workdir: str) -> JobSpec:
    try:
        return load_job_file(path).spec(workdir)
    except (TrainingError, ValueError, OSError) as error:
        raise PolicyError(f"{path} is no job: {error}") from None
