"""site.yaml: what an operator decides. Faults are reported with their line and key, all at once.

site_id: hamburg
folder: ./hamburg                 # relative to this file; created with mode 700
pools:
  - {gpu_type: cpu-slot, gpus: 2, ask: 0.20}          # credits per GPU-hour; or a curve, the last GPUs dearer:
  - {gpu_type: A100, gpus: 16, ask: [{gpus: 8, price: 1.10}, {gpus: 8, price: 1.60}], gpus_max_per_job: 8,
     reserved: [{from: 2030-01-05T08:00Z, to: 2030-01-05T18:00Z, gpus: 4}]}
region: eu-north                  # with continent, for data that may not leave them
data_egress: {region: 0, continent: 0.02, beyond: 0.08}   # credits per GB of data whose home is here
drain_at: 2030-02-01T00:00Z       # nothing is for sale from then on
links:
  - {target: bremen, bandwidth: 200 Mbit/s, delay_ms: 20, egress_price: 0.01}   # credits per GB
listen: {host: 203.0.113.7, ports: 7600-7699}         # leave out to dial out only
policy: {tenants_refused: [], gpus_max_per_lease: 8}
remote: {asks: {A100: {least: 1.00, most: 2.50}}, drain: true}   # what the portal may set; without it, nothing
driver: process                   # or slurm, with: slurm: {partition: main, account: market, gpus_per_node: 8, gres: gpu,
                                  #   fabric: none, gateway_host: 10.0.0.5, extra_args: ["--time=24:00:00"]}
sandbox: bubblewrap               # or plain, with i_trust_all_tenants: true: their code runs as your own user
limits: {memory_gb: 48, disk_gb: 100}             # of a whole lease; more below
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pricing.errors import PricingError
from pricing.money import parse_credits
from sites.errors import SettingsError
from sites.protocol import (
    ASK_STEPS_MAX,
    GPUS_PER_POOL_MAX,
    POOLS_PER_SITE_MAX,
    RESERVATIONS_MAX,
    GpuId,
    Micros,
    PlaceName,
)
from training.catalogue import GPU_TYPES
from training.spec import SiteId

SETTINGS_BYTES_MAX: Final = 64 * 1024
# A Unix socket's path has room for 107 bytes; attempts put theirs some 60 below the site's folder.
_UNITS: Final = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BANDWIDTH: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kKMGT]?)(?:bit/s|bps|b/s)")
_PORTS: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_PORT_MAX: Final = 65_535


def _credits(value: object) -> int:
    try:
        return parse_credits(str(value))
    except PricingError as error:
        raise ValueError(str(error)) from None


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


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


SlurmWord = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,-]{1,200}$")]


Credits = Annotated[Micros, BeforeValidator(_credits)]
"""Credits as a person writes them, kept as micro-credits."""


class AskPart(_Section):
    """A part of an ask curve: so many GPUs, cheapest first, at this price."""

    gpus: int = Field(ge=1, le=GPUS_PER_POOL_MAX)
    price: Credits


class ReservedSettings(_Section):
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
    """Return a flat ask as a curve of one part, whose GPUs are counted later."""
    return value if isinstance(value, list | tuple) else _credits(value)


class PoolSettings(_Section):
    """One GPU type. `gpus` is a number, or the names of the devices as the driver knows them."""

    gpu_type: str
    gpus: Annotated[int, Field(ge=1, le=GPUS_PER_POOL_MAX)] | tuple[GpuId, ...]
    ask: Annotated[
        Annotated[tuple[AskPart, ...], Field(min_length=1, max_length=ASK_STEPS_MAX + 1)] | Micros,
        BeforeValidator(_curve),
    ] = Field(description="credits per GPU-hour, or a curve")
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
        prices = [part.price for part in self.ask_curve]
        if any(later <= earlier for earlier, later in itertools.pairwise(prices)):
            message = "ask: each part of a curve must cost more than the one before; the cheapest GPUs are sold first"
            raise ValueError(message)
        if sum(part.gpus for part in self.ask_curve) != len(self.gpu_ids):
            message = f"ask: the parts of the curve must add up to the pool's {len(self.gpu_ids)} GPUs"
            raise ValueError(message)
        return self

    @property
    def ask_curve(self) -> tuple[AskPart, ...]:
        """The ask as a curve, cheapest first; a flat one has one part."""
        if isinstance(self.ask, tuple):
            return self.ask
        return (AskPart.model_construct(gpus=len(self.gpu_ids), price=self.ask),)

    @property
    def gpu_ids(self) -> tuple[str, ...]:
        """The devices by name; numbered from 0 where only their count is given."""
        return tuple(str(n) for n in range(self.gpus)) if isinstance(self.gpus, int) else self.gpus


class LinkSettings(_Section):
    """What this site may send to another, and what it asks for that."""

    target: SiteId
    bandwidth: Annotated[float, BeforeValidator(_bandwidth), Field(gt=0)]
    delay_ms: float = Field(default=0, ge=0, le=60_000)
    egress_price: Credits = Field(default=0, description="credits per GB")


class DataEgressSettings(_Section):
    """What it costs, in credits per GB, when data whose home is this site is read elsewhere."""

    region: Credits = 0
    continent: Credits = 0
    beyond: Credits = 0


class ListenSettings(_Section):
    """Where other sites' gateways reach this one's; `bind` differs from `host` behind a NAT."""

    host: str = Field(pattern=r"^[A-Za-z0-9.:\[\]-]{1,255}$")
    ports: Annotated[
        tuple[int, int] | None, BeforeValidator(lambda value: None if value is None else _ports(value))
    ] = None
    bind: str | None = None


class Policy(_Section):
    """Which leases the operator refuses."""

    tenants_refused: tuple[str, ...] = Field(default=(), max_length=10_000)
    gpus_max_per_lease: int = Field(default=GPUS_PER_POOL_MAX, ge=1)
    setup_allowed: bool = True


class AskRange(_Section):
    """Between which prices, in credits per GPU-hour, an ask may be set from the market's portal."""

    least: Credits
    most: Credits

    @model_validator(mode="after")
    def _forwards(self) -> AskRange:
        if self.most < self.least:
            message = "most must not be below least"
            raise ValueError(message)
        return self


class RemoteSettings(_Section):
    """What the site's operator may change from the market's portal, in place of this file. By default nothing."""

    asks: dict[str, AskRange] = Field(default_factory=dict, max_length=POOLS_PER_SITE_MAX)
    drain: bool = False

    @property
    def allows_any(self) -> bool:
        """Whether anything may be changed from there."""
        return bool(self.asks) or self.drain


class LimitSettings(_Section):
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


class SlurmSettings(_Section):
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


class SiteSettings(_Section):
    """The whole file."""

    site_id: SiteId
    folder: Path
    pools: tuple[PoolSettings, ...] = Field(min_length=1, max_length=POOLS_PER_SITE_MAX)
    links: tuple[LinkSettings, ...] = Field(default=(), max_length=1000)
    listen: ListenSettings | None = None
    region: PlaceName | None = None
    continent: PlaceName | None = None
    data_egress: DataEgressSettings = DataEgressSettings()
    drain_at: AwareDatetime | None = None
    policy: Policy = Policy()
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
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read ({error}); write a site.yaml there") from None
    if len(text) > SETTINGS_BYTES_MAX:
        raise SettingsError(f"{path} is larger than {SETTINGS_BYTES_MAX // 1024} KiB; that is no site.yaml")
    lines: dict[tuple[str | int, ...], int] = {}
    try:
        document = _document(text, lines)
        settings = SiteSettings.model_validate(document)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise SettingsError("\n".join(_sentence(path, fault, lines) for fault in error.errors())) from None
    return settings.model_copy(update={"folder": (path.parent / settings.folder).resolve()})


def _document(text: str, lines: dict[tuple[str | int, ...], int]) -> Any:  # noqa: ANN401  any YAML value
    loader = yaml.SafeLoader(text)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            # An alias of an alias of an alias … is a few hundred bytes here and gigabytes when walked.
            if isinstance(event, yaml.AliasEvent):
                raise yaml.YAMLError(f"line {_line(event)}: aliases (*name) are not allowed")
        node = loader.get_single_node()
        if node is None:
            return {}
        _note_lines(node, (), lines)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _line(place: yaml.Node | yaml.Event) -> int:
    return 1 + (place.start_mark.line if place.start_mark else 0)


def _note_lines(node: yaml.Node, place: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int]) -> None:
    lines[place] = _line(node)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _note_lines(value, (*place, str(key.value)), lines)
            lines[(*place, str(key.value))] = _line(key)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _note_lines(value, (*place, index), lines)


def _sentence(path: Path, fault: Any, lines: dict[tuple[str | int, ...], int]) -> str:  # noqa: ANN401  pydantic's ErrorDetails
    place = tuple(fault["loc"])
    known = place
    while known and known not in lines:
        known = known[:-1]
    key = ".".join(str(part) for part in place) or "the file"
    return f"{path}, line {lines.get(known, 1)}, {key}: {fault['msg'].removeprefix('Value error, ')}"
