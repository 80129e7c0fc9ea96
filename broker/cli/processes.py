"""`hansa broker …`: the processes that make up a broker, each in the foreground, as a supervisor wants them.

    hansa broker serve               the API and the portal: gunicorn with the market's own certificate
    hansa broker worker rounds       the Celery worker that clears rounds, alone
    hansa broker worker upkeep -B    the Celery worker for reconcile and settle, with the beat
    hansa broker economics           what sharing was worth in each round, for its certificate; no round waits for it
    hansa broker wake                the streams that say "look now"

They read their settings from the environment (`HANSA_…`, `broker.settings`).
"""

from __future__ import annotations

import enum
import ipaddress
import os
import shutil
import signal
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import typer

from broker.cli.errors import UsageError

app = typer.Typer(
    help="The processes of a broker, each in the foreground.", no_args_is_help=True, rich_markup_mode=None
)

PORT_DEFAULT: Final = 7400
WAKE_PORT_DEFAULT: Final = 7401
WORKERS_DEFAULT: Final = 2
THREADS_DEFAULT: Final = 8
REQUEST_TIMEOUT_S: Final = 60
GRACEFUL_S: Final = 5
BACKLOG: Final = 512
# One request may carry a chunk of an artifact; gunicorn bounds only what it parses itself.
REQUEST_LINE_BYTES_MAX: Final = 4094
KEEPALIVE_S: Final = 5
# prometheus_client's own name, as in `broker.api.health`, which is imported by the workers alone.
FIGURES_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"


class Queue(enum.StrEnum):
    """Which of Celery's queues a worker takes from."""

    ROUNDS = "rounds"
    UPKEEP = "upkeep"


@app.command()
def serve(
    bind: Annotated[str, typer.Option(help="address to listen on")] = f"127.0.0.1:{PORT_DEFAULT}",
    workers: Annotated[int, typer.Option(min=1, max=64, help="processes")] = WORKERS_DEFAULT,
    threads: Annotated[int, typer.Option(min=1, max=256, help="threads of each")] = THREADS_DEFAULT,
    host: Annotated[list[str] | None, typer.Option(help="a further name of this server for its certificate")] = None,
    plain_http: Annotated[bool, typer.Option("--plain-http", help="without TLS; to loopback only")] = False,
) -> None:
    """Serve the API and the portal with the market's own certificate, until told to stop."""
    from broker.bootstrap import open_market
    from broker.settings import Settings

    if plain_http and not _is_loopback(bind):
        raise UsageError(
            f"--plain-http with {bind} would send tokens readable over the network",
            next_step="bind to 127.0.0.1 and put a TLS proxy before it, or leave --plain-http out",
        )
    settings = Settings()
    # Opened once before the workers start, so that keys and tables are made by one process.
    market = open_market(settings)
    options: dict[str, Any] = {
        "bind": bind,
        "workers": workers,
        "threads": threads,
        "worker_class": "gthread",
        "timeout": REQUEST_TIMEOUT_S,
        "graceful_timeout": GRACEFUL_S,
        "keepalive": KEEPALIVE_S,
        "backlog": BACKLOG,
        "limit_request_line": REQUEST_LINE_BYTES_MAX,
        "proc_name": "hansa-broker",
        "control_socket_disable": True,
        "post_fork": _die_with_master,
    }
    if not plain_http:
        names = [name for name in (urlsplit(settings.public_url).hostname, *(host or ())) if name]
        certificate = market.authority.server_certificate(names)
        options |= {"certfile": str(certificate.certificate_path), "keyfile": str(certificate.key_path)}
    market.database.close()
    _serve_with_gunicorn(options | _shared_figures(settings.home))


@app.command()
def worker(
    queue: Annotated[Queue, typer.Argument(help="rounds or upkeep")],
    beat: Annotated[
        bool, typer.Option("-B", "--beat", help="ring all tasks by the clock too; in one worker only")
    ] = False,
) -> None:
    """Run the Celery worker of one queue until told to stop."""
    from broker.tasks import app as tasks

    _require_redis()
    schedule = ["-B"] if beat else []
    tasks.worker_main(
        ["worker", "-Q", queue.value, "-c", "1", "-P", "solo", "-l", "WARNING", "-n", f"{queue}@%h", *schedule]
    )


@app.command()
def beat() -> None:
    """Run Celery's beat alone, where no worker has it."""
    from broker.tasks import app as tasks

    _require_redis()
    tasks.Beat(loglevel="WARNING").run()


@app.command()
def economics(
    once: Annotated[bool, typer.Option("--once", help="work out what is due, then end")] = False,
) -> None:
    """Work out what sharing was worth in each round and sign it into the round's certificate, until told to stop."""
    import threading

    from broker.bootstrap import open_market
    from broker.rounds.economics import keep_up
    from broker.settings import Settings

    settings = Settings()
    market = open_market(settings)
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: told.set())
    keep_up(market, wait=lambda: once or told.wait(settings.round_s))
    market.database.close()


@app.command()
def wake(
    bind: Annotated[str, typer.Option(help="address to listen on, behind the same proxy as the API")] = (
        f"127.0.0.1:{WAKE_PORT_DEFAULT}"
    ),
) -> None:
    """Serve the streams that tell agents and browsers to look now."""
    from broker.bootstrap import open_market
    from broker.settings import Settings
    from broker.wake import serve as serve_streams

    settings = Settings()
    host, port = _address(bind)
    market = open_market(settings)
    key = market.authority.derive_key("wake")
    market.database.close()
    serve_streams(key, settings.redis_url, host=host, port=port)


@app.command()
def ca(
    output: Annotated[Path | None, typer.Option("-o", "--output", help="file to write; else printed")] = None,
) -> None:
    """Print the certificate authority of this market, for clients to pin with HANSA_CA."""
    from broker.identity.authority import Authority
    from broker.settings import Settings
    from training.clock import SystemClock

    pem = Authority(Settings().home, SystemClock()).ca_pem
    if output is None:
        typer.echo(pem, nl=False)
    else:
        output.write_text(pem)


def _die_with_master(_arbiter: object, worker: Any) -> None:  # noqa: ANN401  gunicorn has no types
    """End a worker with its master: an orphan would hold the port, and answer beside the next master, for seconds."""
    from broker.supervise.deathwatch import die_with_parent

    if not die_with_parent(worker.ppid, signal.SIGKILL):
        os._exit(0)


def _shared_figures(home: Path) -> dict[str, Any]:
    """Give the workers a folder for the figures that they count together, and return gunicorn's option to remove it.

    Set before a worker imports prometheus_client, which looks for it then. It lies in the broker's home: a master that
    is killed leaves it there, for the next one to remove.
    """
    if FIGURES_FOLDER in os.environ:
        return {}
    for left in home.glob("figures-[0-9]*"):
        if not _lives(int(left.name.partition("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
    folder = home.resolve() / f"figures-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)  # of a master that had our number before a reboot
    folder.mkdir(mode=0o700, parents=True)
    os.environ[FIGURES_FOLDER] = str(folder)
    return {"on_exit": lambda _arbiter: shutil.rmtree(folder, ignore_errors=True)}


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _serve_with_gunicorn(options: dict[str, Any]) -> None:
    from gunicorn.app.base import BaseApplication

    class _Application(BaseApplication):  # type: ignore[misc, unused-ignore]  # gunicorn has no types
        def load_config(self) -> None:
            for name, value in options.items():
                if name in self.cfg.settings:
                    self.cfg.set(name, value)

        def load(self) -> object:
            # In each worker by itself: no database connection crosses a fork.
            from broker.api.wsgi import application

            return application()

    _Application().run()


def _require_redis() -> None:
    from broker.settings import Settings

    if not Settings().redis_url:
        raise UsageError(
            "a worker needs Redis or Valkey, and HANSA_REDIS_URL is not set",
            next_step="set HANSA_REDIS_URL=redis://… or unix:///…",
        )


def _address(bind: str) -> tuple[str, int]:
    host, _, port = bind.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"{bind!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def _is_loopback(bind: str) -> bool:
    host, _ = _address(bind)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
