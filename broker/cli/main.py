"""The command `hansa`: assembles the subcommands and turns every expected failure into a sentence and an exit code.

`broker.cli.errors` lists the exit codes. Anything slow to import is loaded by the command that needs it, so that
`hansa --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import ClassVar, Final, NoReturn

import typer

from broker.cli import config_commands, data_commands, jobs, market_commands, profiling, secret_commands, token_commands
from broker.cli.errors import CliError, UsageError
from broker.cli.lazy import LazyGroup

# Set it to see the traceback of an error that would be reported in a sentence.
DEBUG_VARIABLE: Final = "HANSA_DEBUG"
OWN_PACKAGES: Final = frozenset({"broker", "sites", "pricing", "training"})


class _Root(LazyGroup):
    LAZY: ClassVar = {
        "admin": ("broker.cli.admin", "For the market's admins: tenants, sites, rounds, audit."),
        "site": ("sites.site_cli", "For operators of a datacenter: join, run and look after a site."),
        "broker": ("broker.cli.processes", "The processes of a broker, each in the foreground."),
        "throughput": ("broker.cli.throughput", "Step times: fit a model to measurements, ask it, score it."),
        "backtest": ("broker.cli.backtest", "Replay a trace of jobs: what a federation would have been worth."),
        "lab": ("broker.cli.lab", "Compare synchronisation strategies on this machine, without a market."),
        "demo": ("broker.demo.command", "Run a whole market on this machine and train real jobs in it."),
    }


app = typer.Typer(
    cls=_Root,
    help=(
        "Hansa: a federated market for GPU datacenters.\n\n"
        "Tenants: quote, submit, watch. Operators: site. Admins: admin. See it all at work: demo.\n\n"
        "Exit codes: 0 done, 1 refused, 2 wrong usage or file, 3 no broker there, 4 not found, 5 no right, "
        "6 a watched job did not finish, 130 interrupted."
    ),
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
jobs.register(app)
market_commands.register(app)
app.command()(profiling.profile)
app.add_typer(config_commands.app, name="config")
app.add_typer(token_commands.app, name="token")
app.add_typer(data_commands.app, name="data")
app.add_typer(secret_commands.app, name="secret")


def main() -> NoReturn:
    """Run the command line; the exit code says how it went."""
    wants_json = "--json" in sys.argv
    try:
        app()
    except CliError as error:
        report(error, as_json=wants_json)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of a pipe (`hansa status | head`) has left; Python's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        failure = _expected(error)
        if failure is None or os.environ.get(DEBUG_VARIABLE):
            raise
        report(failure, as_json=wants_json)
        sys.exit(failure.exit_code)
    sys.exit(0)


def report(error: CliError, *, as_json: bool) -> None:
    """Say on standard error what happened and what to do next."""
    if as_json:
        typer.echo(error.as_json(), err=True)
        return
    typer.echo(f"hansa: {error.detail}", err=True)
    if error.next_step:
        typer.echo(f"       {error.next_step}", err=True)


def _expected(error: Exception) -> CliError | None:
    """Return the report for an error of the package's own trees and of the system, None for a defect."""
    code = getattr(error, "code", None)
    if isinstance(code, str) and type(error).__module__.split(".")[0] in OWN_PACKAGES:
        return CliError(str(error), code=code)
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] not in OWN_PACKAGES:
        return UsageError(
            f"this command needs {error.name}, which is not installed here",
            next_step="install hansa[broker] for a broker, hansa[site] for a site, hansa[train] for training",
        )
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return CliError(f"{where}{error.strerror}", code="cli.system")
    return None


if __name__ == "__main__":
    main()
