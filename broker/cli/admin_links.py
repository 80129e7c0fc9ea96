"""`hansa admin links`: the links between sites as declared, as measured, and as the market counts with them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import typer

from broker.cli import config
from broker.cli.output import JsonOption, duration_text, print_json, print_table

if TYPE_CHECKING:
    from broker.cli.client import BrokerClient

LINKS_MAX: Final = 10_000
_UNITS: Final = ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s"))


def register(app: typer.Typer) -> None:
    """Add the command to `hansa admin`."""
    app.command()(links)


def links(as_json: JsonOption = False) -> None:
    """List the links between sites: declared, measured, with the age of the newest probe and how sure it is."""
    with _client() as client:
        rows = client.admin_list("/links", LINKS_MAX)
    if as_json:
        print_json({"items": rows})
        return
    print_table(
        ("pair", ">declared", ">measured", ">counted", ">delay", ">loss", ">age", ">confidence"),
        [_cells(row) for row in rows],
        empty="no site declares a link yet: `links:` in its site.yaml",
    )
    for row in rows:
        if row["trouble"]:
            typer.echo(f"{row['source']} -> {row['target']}: {row['trouble']}")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    measured, counted = row["measured"], row["counted"]
    return (
        f"{row['source']} -> {row['target']}",
        _bits(row["declared"]["bandwidth_bits_per_s"]),
        "-" if measured is None else _bits(measured["bandwidth_bits_per_s"]),
        _bits(counted["bandwidth_bits_per_s"]),
        f"{counted['delay_s'] * 1000:.1f} ms",
        "-" if measured is None or measured["loss"] is None else f"{measured['loss'] * 100:.2f} %",
        "-" if row["age_s"] is None else duration_text(row["age_s"]),
        "-" if measured is None else f"{measured['confidence']:.2f}",
    )


def _bits(rate: float) -> str:
    for factor, unit in _UNITS:
        if rate >= factor:
            return f"{rate / factor:.1f} {unit}"
    return f"{rate:.0f} bit/s"


def _client() -> BrokerClient:
    from broker.cli.client import BrokerClient

    return BrokerClient(config.load(os.environ))
