"""`hansa market certificate`: what the market states of a round, checked against its certificate authority."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from broker.cli.errors import CliError, UsageError
from broker.cli.market_files import write
from broker.cli.output import JsonOption, credits_text, print_json

if TYPE_CHECKING:
    from broker.allocation.clearing import Clearing
    from broker.rounds.certificate import Statement


def certificate(
    source: Annotated[
        str, typer.Argument(help="a round's number, asked of the broker, or a file", metavar="ROUND|FILE")
    ],
    ca: Annotated[
        Path | None, typer.Option(help="the market's certificate authority", envvar="HANSA_CA", exists=True)
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="keep the signed document")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what the market states of a round, its signature checked against the market's certificate authority."""
    import os

    from broker.cli import config
    from broker.cli.client import BrokerClient

    if source.isdecimal():
        context = config.load(os.environ)
        ca = ca or context.ca
        with BrokerClient(context) as client:
            document = client.certificate(int(source))
    else:
        document = _certificate_file(Path(source))
    if ca is None:
        raise UsageError("no certificate authority to check it against", next_step="give --ca ca.pem, or set HANSA_CA")
    statement = _opened(document, ca)
    if output is not None:
        write(output, json.dumps(document).encode())
    if as_json:
        print_json(statement.model_dump(mode="json"))
    else:
        _tell(statement)


def _certificate_file(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a round's certificate: {error}") from None
    if not isinstance(document, dict):
        raise UsageError(f"{path} is not a round's certificate: it is no JSON object")
    return document


def _opened(document: dict[str, Any], ca: Path) -> Statement:
    from pydantic import ValidationError

    from broker.rounds.certificate import SignedCertificate, open_certificate

    try:
        signed = SignedCertificate.model_validate({name: document.get(name) for name in ("signed", "key_pem")})
    except ValidationError as error:
        raise UsageError(f"this is not a round's certificate: {error.error_count()} fields are wrong") from None
    return open_certificate(signed, ca.read_text())


def check_certificate(path: Path, ca: Path | None, cleared: Clearing) -> None:
    """Check that a signed certificate is about this clearing, figure by figure."""
    from broker.rounds.certificate import differences

    if ca is None:
        raise UsageError("--certificate needs the market's certificate authority", next_step="give --ca ca.pem")
    wrong = differences(_opened(_certificate_file(path), ca), cleared)
    if wrong:
        raise CliError(f"the certificate is not of this clearing: {'; '.join(wrong)[:500]}", code="market.unsound")


def _tell(statement: Statement) -> None:
    proof, balance, economics = statement.certificate, statement.balance, statement.economics
    seconds = ", ".join(f"{name} {each * 1000:.0f} ms" for name, each in statement.seconds.items())
    typer.echo(
        f"round {statement.round_number} of {statement.market}: {statement.status}, signed by the market; {seconds}"
    )
    lines = [
        ("bound", f"{credits_text(proof.bound_micros_per_hour)} credits/h"),
        (
            "welfare",
            f"{credits_text(proof.welfare_micros_per_hour)} credits/h, {credits_text(proof.gap_micros_per_hour)} below",
        ),
        (
            "identity",
            f"gap = regret {credits_text(proof.regret_sum_micros_per_hour)} + slack {credits_text(proof.slack_sum_micros_per_hour)}",
        ),
        (
            "price support",
            f"{100 * (1 - statement.jobs_unsupported_share):.1f} % of jobs; {100 * statement.regret_and_slack_share:.3f} % of the bound lost",
        ),
        (
            "turnover",
            f"{credits_text(balance.charges_micros_per_hour)} credits/h, uplift {credits_text(balance.uplift_micros_per_hour)}, fees {credits_text(balance.fees_micros_per_hour)}",
        ),
        ("balance", "even" if balance.is_even else "NOT EVEN"),
        ("buyers above value", str(statement.buyers_above_value)),
        ("pools below ask", str(statement.pools_below_ask)),
    ]
    if economics is None:
        lines.append(("sharing", {"pending": "being worked out"}.get(statement.economics_state, "left out")))
    else:
        tried = "all" if economics.complete else "a sample of"
        lines += [
            ("sites better off", f"{economics.sites_better_off} of {economics.sites}"),
            (
                "core slack",
                f"{credits_text(economics.core_slack_micros_per_hour)} credits/h over {tried} {economics.coalitions} coalitions",
            ),
        ]
        if economics.gain_least is not None and economics.gain_median is not None:
            lines.append(("gain over alone", f"least {economics.gain_least:.2f}, median {economics.gain_median:.2f}"))
        if economics.division_distance is not None:
            lines.append(("Owen to Shapley", f"{100 * economics.division_distance:.1f} % of the whole"))
        if economics.threshold is not None:
            gain = credits_text(economics.threshold.shading_gain_micros_per_hour)
            lines.append(
                (
                    "room for shading",
                    f"{gain} credits/h by the Threshold rule, over {economics.threshold.trades} buyers",
                )
            )
    for name, value in lines:
        typer.echo(f"{name:<20}{value}")
