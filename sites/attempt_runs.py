"""What an attempt starts: its setup and its ranks, as runs confined to what they may see and take.

Works with `sites.sandbox` for what they see and with the driver for what they take; `sites.attempts` decides when.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sites.attempt_folder import RANKS_SOCKET, AttemptFolder, Surroundings
from sites.client import Broker
from sites.data_store import DataStore
from sites.drivers.interface import Driver, Limits, Placement, Run, secret_files
from sites.drivers.process import ProcessDriver
from sites.environment import memory_bytes, own_environment
from sites.inventory import CPU_SLOT
from sites.journal import AttemptRecord, Journal
from sites.policy import PolicyBook
from sites.sandbox import SECRETS_FOLDER, Bubblewrap, View
from sites.settings import SiteSettings
from training.attempt import ATTEMPT_ENVIRONMENT, DATA_ENVIRONMENT, SECRETS_ENVIRONMENT
from training.clock import Clock
from training.spec import JobSpec, split_run

_GB: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Services:
    """What every attempt of a site works with; without a `sandbox`, tenants' code runs as the agent's own user."""

    settings: SiteSettings
    surroundings: Surroundings
    clock: Clock
    journal: Journal
    broker: Broker
    driver: Driver
    local: ProcessDriver
    threads: Executor
    sandbox: Bubblewrap | None
    data: DataStore
    staging: Executor
    policy: PolicyBook


def setup_run(services: Services, folder: AttemptFolder, record: AttemptRecord) -> Run:
    """Return the run of the job's setup. Raises SandboxError."""
    command = ("/bin/bash", "-euc", _spec(record).setup or "")
    limits = services.settings.limits
    view = _view(services, folder, record, network=services.settings.setup_network)
    return Run(
        folder=folder.run("setup"),
        argv=_confined(services, folder, "setup", command, view),
        cwd=folder.workdir,
        environment=_environment(services, folder, record),
        log_path=folder.rank_log,
        deadline_s=record.deadline_s,
        log_bytes_max=int(limits.log_mb * 1_000_000),
        timeout_s=limits.setup_timeout_s,
        limits=_limits(services, folder, record),
    )


def ranks_run(
    services: Services, folder: AttemptFolder, record: AttemptRecord, name: str, secrets: Mapping[str, bytes]
) -> Run:
    """Return the run of the ranks, which find `secrets` as files. Raises SandboxError."""
    command = services.driver.ranks_argv(len(record.gpu_ids), split_run(_spec(record).run), folder.run(name))
    network = placement(services, folder, record).network
    datasets = {reference.name: services.data.folder_of(reference) for reference in _spec(record).data or ()}
    if services.sandbox is None:
        _link(folder.data, datasets)
    view = _view(services, folder, record, network=network, secrets=secret_files(secrets), datasets=datasets)
    return Run(
        folder=folder.run(name),
        argv=_confined(services, folder, name, command, view),
        cwd=folder.workdir,
        environment=_environment(services, folder, record) | _ranks_environment(services, folder, record),
        log_path=folder.rank_log,
        deadline_s=record.deadline_s,
        log_bytes_max=int(services.settings.limits.log_mb * 1_000_000),
        limits=_limits(services, folder, record),
        gpus=len(record.gpu_ids),
        socket=folder.socket(RANKS_SOCKET),
        secrets=secrets,
    )


def placement(services: Services, folder: AttemptFolder, record: AttemptRecord) -> Placement:
    """Return what the ranks find where the driver runs them."""
    return services.driver.placement(record.gpu_ids, folder.socket(RANKS_SOCKET))


def _confined(
    services: Services, folder: AttemptFolder, name: str, command: tuple[str, ...], view: View
) -> tuple[str, ...]:
    """Return the command as it runs in the sandbox, or as it is where the operator trusts all tenants."""
    if services.sandbox is None:
        return command
    exits = folder.run(name) / "exits"
    exits.mkdir(mode=0o700, parents=True, exist_ok=True)
    seen = View(
        writable=(*view.writable, exits),
        readable=view.readable,
        gpu_ids=view.gpu_ids,
        network=view.network,
        secrets=view.secrets,
        shown=view.shown,
    )
    return services.sandbox.argv(command, seen, folder.workdir)


def _view(
    services: Services,
    folder: AttemptFolder,
    record: AttemptRecord,
    *,
    network: bool,
    secrets: Mapping[str, int] | None = None,
    datasets: Mapping[str, Path] | None = None,
) -> View:
    placed = placement(services, folder, record)
    return View(
        writable=_written(folder),
        readable=(folder.context, folder.resume, placed.ranks_socket.parent),
        gpu_ids=() if record.gpu_type == CPU_SLOT else placed.gpu_ids,
        network=network,
        secrets=secrets or {},
        shown={folder.data / name: path for name, path in (datasets or {}).items()},
    )


def _link(folder: Path, datasets: Mapping[str, Path]) -> None:
    """Lead to the datasets where there is no sandbox to show them."""
    folder.mkdir(mode=0o700, exist_ok=True)
    for name, path in datasets.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(path)


def _limits(services: Services, folder: AttemptFolder, record: AttemptRecord) -> Limits:
    limits = services.settings.limits
    return Limits(
        open_files=limits.open_files,
        file_bytes=int(limits.file_gb * _GB),
        address_space_bytes=None if limits.address_space_gb is None else int(limits.address_space_gb * _GB),
        processes=limits.processes,
        memory_bytes=memory_bytes(services.settings, len(record.gpu_ids)),
        processes_in_all=limits.processes_in_all,
        disk_bytes=int(limits.disk_gb * _GB),
        disk_files=limits.disk_files,
        disk_folders=_written(folder),
    )


def _written(folder: AttemptFolder) -> tuple[Path, ...]:
    """Return the folders that setup and ranks may write to."""
    return tuple(folder.root / name for name in ("workdir", "checkpoint", "output", "home", "tmp"))


def _environment(services: Services, folder: AttemptFolder, record: AttemptRecord) -> dict[str, str]:
    """Return what setup and ranks find: the job's own variables, and none of the agent's."""
    return {
        "OMP_NUM_THREADS": "1",
        **_spec(record).envs,
        **own_environment(services.settings.python),
        "HOME": str(folder.root / "home"),
        "TMPDIR": str(folder.root / "tmp"),
    }


def _ranks_environment(services: Services, folder: AttemptFolder, record: AttemptRecord) -> dict[str, str]:
    # In a sandbox there are no other GPUs, and CUDA counts those that it finds from nought.
    counted = tuple(str(index) for index in range(len(record.gpu_ids)))
    visible = record.gpu_ids if services.sandbox is None else counted
    return {
        ATTEMPT_ENVIRONMENT: str(folder.context),
        "CUDA_VISIBLE_DEVICES": "" if record.gpu_type == CPU_SLOT else ",".join(visible),
        "GLOO_SOCKET_IFNAME": "lo",  # ranks of one host speak over loopback only
        **({SECRETS_ENVIRONMENT: SECRETS_FOLDER} if _spec(record).secrets else {}),
        **({DATA_ENVIRONMENT: str(folder.data)} if _spec(record).data else {}),
    }


def _spec(record: AttemptRecord) -> JobSpec:
    assert record.order is not None, "an attempt that runs has an order"
    return record.order.spec
