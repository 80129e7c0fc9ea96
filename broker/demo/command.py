"""`hansa demo`: the command, and what happens whichever way it ends.

Ends of all kinds leave no process, no port and no folder behind (a demo killed with SIGKILL leaves its folder to the
next one); only a failure keeps the folder, because the logs in it say why.
"""

from __future__ import annotations

import shutil
import signal
import traceback
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from broker.demo.display import Display
    from broker.demo.journey import Journey
    from broker.demo.processes import Places

app = typer.Typer(
    help="Run a whole market on this machine and train real jobs in it.", rich_markup_mode=None, add_completion=False
)

FAILED: Final = 1
INTERRUPTED: Final = 130
INTRODUCTION: Final = (
    "A market of three datacenters on this machine. CPU slots stand in for GPUs; the broker, the sites, the training "
    "and the books are the real ones."
)


@app.callback(invoke_without_command=True)
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="leave it running and print the portal's address")] = False,
) -> None:
    """Run a whole market on this machine, train real jobs in it, and show what they cost; under three minutes."""
    from broker.demo.display import display_for, make_console

    console = make_console()
    console.print(INTRODUCTION, soft_wrap=True)
    with _OneInterrupt():
        code = _run(console, display_for(console), keep=keep)
    raise typer.Exit(code)


class _OneInterrupt:
    """Lets the first Ctrl-C end the demo and ignores further ones, so that none can cut the ending short."""

    def __init__(self) -> None:
        self._taken = False
        self._former: signal._HANDLER = signal.SIG_DFL

    def __enter__(self) -> None:
        self._former = signal.signal(signal.SIGINT, self._take)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._former)

    def _take(self, _number: int, _frame: FrameType | None) -> None:
        if not self._taken:
            self._taken = True
            raise KeyboardInterrupt


def _run(console: Console, display: Display, *, keep: bool) -> int:
    places: Places | None = None
    try:
        with display:
            # Loading the broker's stack takes a second or two; something must be seen before that.
            display.stage("loading the broker")
            from broker.demo.folders import held
            from broker.demo.processes import clear_environment, make_places

            clear_environment()
            places = make_places()
            with held(places.home):
                _hold_market(places, console, display, keep=keep)
    except KeyboardInterrupt:
        return _ended(console, places, "interrupted", INTERRUPTED)
    except SystemExit as end:  # how the supervisor passes on SIGTERM and SIGHUP
        return _ended(console, places, "told to end", int(end.code or 0))
    except Exception as error:  # noqa: BLE001  whatever it was, all is stopped and the folder must say why
        return _failed(console, places, error)
    return _ended(console, places, "", 0)


def _hold_market(places: Places, console: Console, display: Display, *, keep: bool) -> None:
    from broker.cli.errors import CliError
    from broker.demo.errors import DemoError
    from broker.demo.journey import Journey
    from broker.demo.report import make_report, print_report
    from broker.supervise.processes import Supervisor

    with Supervisor(places.logs, end_together=True) as supervisor, Journey(places, supervisor, display) as journey:
        try:
            environment = journey.start_market()
            journey.let_sites_join()
            journey.submit_jobs()
            journey.start_rounds(environment)
            observation = journey.follow()
            display.stage("reading the books")
            report = make_report(journey.admin, observation)
            display.close()
            print_report(console, report)
            if keep:
                _print_credentials(console, places, journey)
                journey.stay()
        except KeyboardInterrupt:
            display.stage("ending all processes")
            raise
        except CliError:
            supervisor.check()  # where a process has died, that is the news, and not that it does not answer
            raise
    if failures := report.failures():
        raise DemoError("it ended, but not as it should: " + "; ".join(failures))


def _print_credentials(console: Console, places: Places, journey: Journey) -> None:
    console.print()
    console.print(f"The market stays up until Ctrl-C. Portal: {places.url}/", markup=False)
    console.print(f"(its certificate is signed by {places.ca})", markup=False)
    for login, (role, password) in journey.open_portal_accounts().items():
        console.print(f"  sign in as {login} ({role}) with password {password}", markup=False)
    console.print("In another shell, as a tenant:", markup=False)
    tenant_id, token = next(iter(journey.tokens.items()))
    console.print(
        f"  HANSA_URL={places.url} HANSA_CA={places.ca} HANSA_TOKEN={token} hansa status   # {tenant_id}",
        markup=False,
        soft_wrap=True,
    )


def _ended(console: Console, places: Places | None, word: str, code: int) -> int:
    if places is not None:
        shutil.rmtree(places.home, ignore_errors=True)
    if word:
        console.print(f"The demo was {word}; nothing of it is left running.")
    return code


def _failed(console: Console, places: Places | None, error: Exception) -> int:
    console.print(f"The demo failed: {error}", markup=False, soft_wrap=True)
    if places is not None:
        from broker.demo.folders import keep

        keep(places.home)
        places.logs.mkdir(exist_ok=True)
        (places.logs / "demo.log").write_text("".join(traceback.format_exception(error)))
        console.print(f"Everything has been stopped; the logs are in {places.logs}", markup=False, soft_wrap=True)
    return FAILED
