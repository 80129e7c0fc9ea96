"""Whether a command line is one that `hansa` takes: parsed by the program's own grammar, and not run."""

from __future__ import annotations

from typing import Any

import typer.main

from broker.cli.main import app


def refusal(words: list[str]) -> str | None:
    """Return why `hansa WORDS` would be refused, None where it would be taken."""
    command: Any = typer.main.get_command(app)
    path = "hansa"
    context = command.context_class(command, info_name=path)
    while hasattr(command, "get_command"):
        if not words:
            return f"{path} alone only lists its commands"
        try:
            _, found, rest = command.resolve_command(context, words)
        except Exception:  # noqa: BLE001  the grammar's own kinds are typer's private matter
            found, rest = None, []
        if found is None:
            return f"{path} has no command {words[0]!r}"
        path, command, words = f"{path} {words[0]}", found, rest
        context = command.context_class(command, info_name=path, parent=context)
    if {"-h", "--help"} & set(words):
        return None
    try:
        values, rest, _ = command.make_parser(context).parse_args(args=list(words))
    except Exception as error:  # noqa: BLE001  the grammar's own kinds are typer's private matter
        return f"{path}: {error}"
    if rest:
        return f"{path}: {rest} are too many words"
    missing = [
        each.name
        for each in command.params
        if each.required and not isinstance(values.get(each.name), str | tuple | list)
    ]
    return f"{path}: {missing} are missing" if missing else None
