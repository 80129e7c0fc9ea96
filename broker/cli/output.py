"""How commands print: one JSON document for programs, plain tables for people.

JSON output is the API's own document, so it is as stable as the API. Tables are drawn by rich, which is loaded
only when there is one.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Final

import typer

from pricing.money import MICROS_PER_CREDIT

JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON document instead of text")]

WIDTH_PIPED: Final = 200
_KIB: Final = 1024
# unit, its length, and from where on the next one reads better
_DURATIONS: Final = (("s", 1, 60), ("min", 60, 3600), ("h", 3600, 48 * 3600))


def print_json(document: object) -> None:
    """Print `document` as one indented JSON document."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", empty: str = "") -> None:
    """Print a table; a column whose name starts with > is set to the right. `empty` is said where there is no row."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    body = [[Text(str(cell)) for cell in row] for row in rows]
    if not body:
        typer.echo(empty or "nothing to show")
        return
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    for row in body:
        table.add_row(*row)
    console = Console()
    # A pipe has no width of its own; cells must not be cut in it.
    (console if console.is_terminal else Console(width=WIDTH_PIPED)).print(table)


def credits_text(micros: int | None, digits: int = 6) -> str:
    """Return micro-credits as credits, a dash where there is no amount."""
    if micros is None:
        return "-"
    text = f"{micros / MICROS_PER_CREDIT:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def time_text(milliseconds: int | None) -> str:
    """Return a UTC time to the second, a dash where there is none."""
    if milliseconds is None:
        return "-"
    return dt.datetime.fromtimestamp(milliseconds / 1000, dt.UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def duration_text(seconds: float) -> str:
    """Return a duration for people."""
    for unit, length_s, length_next_s in _DURATIONS:
        if seconds < length_next_s:
            return f"{seconds:.0f} s" if unit == "s" else f"{seconds / length_s:.1f} {unit}"
    return f"{seconds / 86_400:.1f} d"


def bytes_text(size: float) -> str:
    """Return a size in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < _KIB:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= _KIB
    return f"{size:.1f} TiB"
