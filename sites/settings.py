"""site.yaml: what an operator decides. Faults are reported with their line and key, all at once.

site_id: hamburg
folder: ./hamburg                 # relative to this file; created with mode 700
pools:
  - {gpu_type: cpu-slot, gpus: 2, ask: 0.20}          # credits per GPU-hour; or a curve, the last GPUs dearer:
  - {gpu_type: A100, gpus: 16, ask: [{gpus: 8, price: 1.10}, {gpus: 8, price: 1.60}], gpus_max_per_job: 8,
     ask_rules: {schedule: [{days: mon-fri, from: 08:00, to: 20:00, factor: 1.5}]},  # by load and power too: sites/asks.py
     reserved: [{from: 2030-01-05T08:00Z, to: 2030-01-05T18:00Z, gpus: 4}]}
region: eu-north                  # with continent, for data that may not leave them
data_egress: {region: 0, continent: 0.02, beyond: 0.08}   # credits per GB of data whose home is here
data: {datasets: [/mnt/corpus], cache_gb: 200, bandwidth: 1 Gbit/s}   # what jobs may read; who may bring what: policy
drain_at: 2030-02-01T00:00Z       # nothing is for sale from then on
links:
  - {target: bremen, bandwidth: 200 Mbit/s, delay_ms: 20, egress_price: 0.01}   # credits per GB
listen: {host: 203.0.113.7, ports: 7600-7699}         # leave out to dial out only
probes: {allowed: true, gb_per_day: 4, while_syncing: false}   # how the market may measure the links (sites/links)
policy_file: policy.yaml          # which leases the owner refuses (sites/policy.py); or here, as policy: {gpus_max_per_lease: 8}
remote: {asks: {A100: {least: 1.00, most: 2.50}}, drain: true}   # what the portal may set; without it, nothing
driver: process                   # or slurm, with: slurm: {partition: main, account: market, gpus_per_node: 8, gres: gpu,
                                  #   fabric: none, gateway_host: 10.0.0.5, extra_args: ["--time=24:00:00"]}
sandbox: bubblewrap               # or plain, with i_trust_all_tenants: true: their code runs as your own user
limits: {memory_gb: 48, disk_gb: 100}             # of a whole lease; more below
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, BeforeValidator, Field, model_validator

from sites.asks import AskPart, AskRules, Credits, Curve, PricedPool, check_curve, parse_price
from sites.errors import SettingsError
from sites.policy import Policy
from sites.protocol import (
    ASK_STEPS_MAX,
    DATASETS_PER_SITE_MAX,
    GPUS_PER_POOL_MAX,
    POOLS_PER_SITE_MAX,
    RESERVATIONS_MAX,
    GpuId,
    Micros,
    PlaceName,
)
from sites.yaml_file import Section, read_yaml
from training.catalogue import GPU_TYPES
from training.spec import SiteId

# A Unix socket's path has room for 107 bytes; attempts put theirs some 60 below the site's folder.
_UNITS: Final = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BANDWIDTH: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kKMGT]?)(?:bit/s|bps|b/s)")
_PORTS: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_PORT_MAX: Final = 65_535


def _bandwidth(value: object) -> float:
    match = _BANDWIDTH.fullmatch(str(value).strip())
    if match is None:
        message = f"{value!r} is not a bandwidth; write bits a second, such as 200 Mbit/s"
        raise ValueError(message)
    return float(match[1]) * _UNITS[match[2]]


def _ports(value: object) -> tuple[int, int]:
    match = _PORTS.fullmatch(str(value).strip())
    if match is None or not 0 < int(match[1]) <= int(match[2] or match[1]) <= _PORT_MAX:
        message = f"{value!r} is not a range of ports; write it as 7600-7699"
        raise ValueError(message)
    return int(match[1]), int(match[2] or match[1])


SlurmWord = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,-]{1,200}$")]


class ReservedSettings(Section):
    """GPUs kept from the market for a time."""

    begins: AwareDatetime = Field(alias="from")
    ends: AwareDatetime = Field(alias="to")
    gpus: int = Field(ge=1, le=GPUS_PER_POOL_MAX)

    @model_validator(mode="after")
    def _forwards(self) -> ReservedSettings:
        if self.ends <= self.begins:
            message = "a reservation must end after it begins"
            raise ValueError(message)
        return self


def _curve(value: object) -> object:
    """Return a curve as it stands and a flat ask in micro-credits; its GPUs are counted later."""
    return value if isinstance(value, list | tuple) else parse_price(value)


class PoolSettings(Section):
    """One GPU type. `gpus` is a number, or the names of the devices as the driver knows them."""

    gpu_type: str
    gpus: Annotated[int, Field(ge=1, le=GPUS_PER_POOL_MAX)] | tuple[GpuId, ...]
    ask: Annotated[
        Annotated[tuple[AskPart, ...], Field(min_length=1, max_length=ASK_STEPS_MAX + 1)] | Micros,
        BeforeValidator(_curve),
    ] = Field(description="credits per GPU-hour, or a curve")
    ask_rules: AskRules = Field(default=AskRules(), description="when it is another ask: sites/asks.py")
    gpus_max_per_job: int | None = Field(default=None, ge=1, le=GPUS_PER_POOL_MAX)
    reserved: tuple[ReservedSettings, ...] = Field(default=(), max_length=RESERVATIONS_MAX)

    @model_validator(mode="after")
    def _known(self) -> PoolSettings:
        if self.gpu_type not in GPU_TYPES:
            message = f"unknown GPU type {self.gpu_type!r}; the market knows {', '.join(sorted(GPU_TYPES))}"
            raise ValueError(message)
        if len(set(self.gpu_ids)) != len(self.gpu_ids) or not self.gpu_ids:
            message = "gpus must name each device once, and at least one"
            raise ValueError(message)
        check_curve(self.ask_curve, len(self.gpu_ids))
        return self

    @property
    def ask_curve(self) -> Curve:
        """The ask as a curve, cheapest first; a flat one has one part."""
        if isinstance(self.ask, tuple):
            return self.ask
        return (AskPart.model_construct(gpus=len(self.gpu_ids), price=self.ask),)

    @property
    def gpu_ids(self) -> tuple[str, ...]:
        """The devices by name; numbered from 0 where only their count is given."""
        return tuple(str(n) for n in range(self.gpus)) if isinstance(self.gpus, int) else self.gpus


def priced(pool: PoolSettings) -> PricedPool:
    """Return a pool as far as its ask goes."""
    return PricedPool(pool.gpu_type, len(pool.gpu_ids), pool.ask_curve, pool.ask_rules)


class LinkSettings(Section):
    """What this site may send to another, and what it asks for that."""

    target: SiteId
    bandwidth: Annotated[float, BeforeValidator(_bandwidth), Field(gt=0)]
    delay_ms: float = Field(default=0, ge=0, le=60_000)
    egress_price: Credits = Field(default=0, description="credits per GB")


class DataEgressSettings(Section):
    """What it costs, in credits per GB, when data whose home is this site is read elsewhere."""

    region: Credits = 0
    continent: Credits = 0
    beyond: Credits = 0


class DataSettings(Section):
    """Datasets: folders of the host that hold one each, and how much is kept of what jobs bring."""

    datasets: tuple[Path, ...] = Field(
        default=(), max_length=DATASETS_PER_SITE_MAX // 2, description="each with its manifest.json"
    )
    cache_gb: float = Field(default=0, ge=0, le=1e6, description="0: nothing is brought")
    bandwidth: Annotated[float, BeforeValidator(_bandwidth), Field(gt=0)] = Field(
        default=1e8, description="at which data comes, until it was measured"
    )

    @property
    def takes_part(self) -> bool:
        """Whether jobs with datasets may come here at all."""
        return bool(self.datasets) or self.cache_gb > 0


class ListenSettings(Section):
    """Where other sites' gateways reach this one's; `bind` differs from `host` behind a NAT."""

    host: str = Field(pattern=r"^[A-Za-z0-9.:\[\]-]{1,255}$")
    ports: Annotated[
        tuple[int, int] | None, BeforeValidator(lambda value: None if value is None else _ports(value))
    ] = None
    bind: str | None = None


class ProbeSettings(Section):
    """Whether, and how much, the market may measure this site's links; it asks seldom."""

    allowed: bool = True
    gb_per_day: float = Field(default=4, ge=0, le=1e6, description="sent and received together")
    while_syncing: bool = Field(default=False, description="also while a job that spans sites runs here")


class AskRange(Section):
    """Between which prices, in credits per GPU-hour, an ask may be set from the market's portal."""

    least: Credits
    most: Credits

    @model_validator(mode="after")
    def _forwards(self) -> AskRange:
        if self.most < self.least:
            message = "most must not be below least"
            raise ValueError(message)
        return self


class RemoteSettings(Section):
    """What the site's operator may change from the market's portal, in place of this file. By default nothing."""

    asks: dict[str, AskRange] = Field(default_factory=dict, max_length=POOLS_PER_SITE_MAX)
    drain: bool = False

    @property
    def allows_any(self) -> bool:
        """Whether anything may be changed from there."""
        return bool(self.asks) or self.drain


class LimitSettings(Section):
    """Limits of each process of a job, and of a lease as a whole."""

    open_files: int = Field(default=4096, ge=64)
    file_gb: float = Field(default=64, gt=0)
    address_space_gb: float | None = Field(default=None, gt=0)
    processes: int | None = Field(default=None, ge=16, description="of the whole user, as Linux counts them")
    memory_gb: float | None = Field(
        default=None,
        gt=0,
        description="of a lease; by default its GPUs' share of nine tenths of the host's memory (under Slurm, what Slurm gives)",
    )
    processes_in_all: int = Field(default=4096, ge=16, description="of a lease, threads counted, by control groups")
    disk_gb: float = Field(default=64, gt=0, description="of all that a lease's setup and ranks write")
    disk_files: int = Field(default=1_000_000, ge=100)
    log_mb: float = Field(default=16, gt=0, le=1000)
    setup_timeout_s: float = Field(default=900, gt=0)
    output_gb: float = Field(default=16, gt=0)
    artifact_cache_gb: float = Field(default=8, gt=0)


class SlurmSettings(Section):
    """How runs become jobs of a cluster. The site's folder and `python` are at the same paths on all its nodes."""

    partition: SlurmWord | None = None
    account: SlurmWord | None = None
    gpus_per_node: int = Field(ge=1, le=GPUS_PER_POOL_MAX)
    gres: str = Field(
        default="gpu",
        pattern=r"^([A-Za-z0-9_.-]{1,64}(:[A-Za-z0-9_.-]{1,64})?)?$",
        description="what is asked for each GPU, such as gpu or gpu:h100; empty asks for cores",
    )
    extra_args: tuple[Annotated[str, Field(pattern=r"^--[a-z][ -~]{0,500}$")], ...] = Field(
        default=(), max_length=50, description="further options of sbatch, such as --time=24:00:00 or --cpus-per-gpu=8"
    )
    fabric: Literal["none", "trusted"] = Field(
        default="none", description="trusted lets a job span nodes, its ranks on the cluster's own network"
    )
    gateway_host: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9.:-]{1,255}$",
        description="this host's address on the cluster's network, where nodes are other hosts",
    )


class SiteSettings(Section):
    """The whole file."""

    site_id: SiteId
    folder: Path
    pools: tuple[PoolSettings, ...] = Field(min_length=1, max_length=POOLS_PER_SITE_MAX)
    links: tuple[LinkSettings, ...] = Field(default=(), max_length=1000)
    listen: ListenSettings | None = None
    probes: ProbeSettings = ProbeSettings()
    region: PlaceName | None = None
    continent: PlaceName | None = None
    data_egress: DataEgressSettings = DataEgressSettings()
    data: DataSettings = DataSettings()
    drain_at: AwareDatetime | None = None
    policy: Policy = Policy()
    policy_file: Path | None = Field(default=None, description="instead of `policy`; read again whenever it changes")
    remote: RemoteSettings = RemoteSettings()
    limits: LimitSettings = LimitSettings()
    driver: Literal["process", "slurm"] = "process"
    slurm: SlurmSettings | None = None
    sandbox: Literal["bubblewrap", "plain"] = "bubblewrap"
    sandbox_readable: tuple[Path, ...] = Field(
        default=(), max_length=100, description="folders of the host that every job may read, such as data sets"
    )
    setup_network: bool = Field(default=False, description="leave a job's setup the host's network, for pip")
    i_trust_all_tenants: bool = False
    python: str = Field(default=sys.executable, description="the interpreter that holds torch and hansa[train]")
    calibrate: bool = Field(default=True, description="measure a CPU slot's speed once")
    cores: float | None = Field(
        default=None, gt=0, description="this site's share of the host's cores, where several sites share a host"
    )

    @model_validator(mode="after")
    def _consistent(self) -> SiteSettings:
        for what, names in (
            ("pools", [pool.gpu_type for pool in self.pools]),
            ("links", [link.target for link in self.links]),
        ):
            if len(set(names)) != len(names):
                message = f"{what}: each GPU type and each target may stand once"
                raise ValueError(message)
        if unknown := sorted(set(self.remote.asks) - {pool.gpu_type for pool in self.pools}):
            message = f"remote.asks names {', '.join(unknown)}, which no pool of this site offers"
            raise ValueError(message)
        if self.site_id in [link.target for link in self.links]:
            message = "links: a link leads to another site"
            raise ValueError(message)
        if self.policy_file is not None and self.policy != Policy():
            message = "policy and policy_file: the owner's policy stands in one place; write one of them"
            raise ValueError(message)
        if (self.driver == "slurm") != (self.slurm is not None):
            message = "driver: slurm and the section slurm: {gpus_per_node: …} go together; write both or neither"
            raise ValueError(message)
        if self.sandbox == "plain" and not self.i_trust_all_tenants:
            message = (
                "sandbox: plain runs tenants' code as this very user, without isolation; leave bubblewrap, or "
                "set i_trust_all_tenants: true if you accept that"
            )
            raise ValueError(message)
        return self


def load_settings(path: Path) -> SiteSettings:
    """Return the settings in the YAML file at `path`; `folder` is taken relative to it.

    Raises SettingsError listing every fault with its line.
    """
    settings = read_yaml(path, SiteSettings, SettingsError)
    places = {name: getattr(settings, name) for name in ("folder", "policy_file")}
    found = {name: (path.parent / place).resolve() for name, place in places.items() if place is not None}
    datasets = tuple((path.parent / folder).resolve() for folder in settings.data.datasets)
    found_data = settings.data.model_copy(update={"datasets": datasets})
    return settings.model_copy(
        update={**found, "data": found_data, "pools": tuple(_located(pool, path.parent) for pool in settings.pools)}
    )


def _located(pool: PoolSettings, folder: Path) -> PoolSettings:
    """Return a pool whose power file stands with its whole path."""
    power = pool.ask_rules.power
    if power is None:
        return pool
    power = power.model_copy(update={"file": (folder / power.file).resolve()})
    return pool.model_copy(update={"ask_rules": pool.ask_rules.model_copy(update={"power": power})})
