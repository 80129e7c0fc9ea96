"""A group of commands that loads a subcommand's module when it is called, and not for the list of commands.

`hansa --help` must answer at once, and an operator's machine has no Flask or SQLAlchemy to load.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

import typer
from typer.core import TyperGroup


class LazyGroup(TyperGroup):
    """Shows `LAZY` rows (name -> (module, help)) as commands; a module's `app` is the command."""

    LAZY: ClassVar[Mapping[str, tuple[str, str]]] = {}

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401  typer keeps the type of a context private
        """Return the commands that are here, then those that are loaded when called."""
        return [*super().list_commands(ctx), *self.LAZY]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401  the same, and a command's
        """Return a command, for one that is not loaded a stand-in with its help."""
        if cmd_name not in self.LAZY:
            return super().get_command(ctx, cmd_name)
        stand_in = typer.Typer(help=self.LAZY[cmd_name][1], rich_markup_mode=None)
        stand_in.callback()(_nothing)
        command = typer.main.get_command(stand_in)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401  the same
        """Return the command to run, its module loaded."""
        if not args or args[0] not in self.LAZY:
            return super().resolve_command(ctx, args)
        name, *rest = args
        module = importlib.import_module(self.LAZY[name][0])
        command = typer.main.get_command(module.app)
        command.name = name
        return name, command, rest


def _nothing() -> None:
    """Do nothing: a stand-in is never run."""
