"""What a site asks now and later: a base price, and the owner's rules for when and why it is another.

    ask: 1.10                       # or a curve; `hansa site ask A100 1.25` sets another base without touching the file
    ask_rules:
      zone: Europe/Berlin
      schedule: [{days: mon-fri, from: 08:00, to: 20:00, factor: 1.5}]     # the first that fits
      utilisation: [{from: 0.5, factor: 1.1}, {from: 0.9, factor: 1.5}]    # the last that is reached
      power: {file: power.csv, kw_per_gpu: 0.7, carbon_price: 0.08}        # credits per kg of CO2
      lowest: 0.80
      highest: 3.00

ask = base x schedule x utilisation + kw_per_gpu x (power price + carbon x carbon price), within lowest and highest.
power.csv has the columns `time,price,carbon`: from that time on, credits per kWh and (may be empty) grams of CO2 per kWh.
"""

from __future__ import annotations

import csv
import datetime as dt
import itertools
import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Final, Generic, TypeVar

import structlog
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, field_validator, model_validator

from pricing.errors import PricingError
from pricing.money import format_credits, parse_credits
from sites.errors import AskError
from sites.hours import Window, check_zone, spans
from sites.identity import write_private
from sites.protocol import ASK_STEPS_MAX, GPUS_PER_POOL_MAX, RATE_MICROS_MAX, Micros
from sites.yaml_file import Section

OVERRIDES_FILE: Final = "asks.json"
POWER_ROWS_MAX: Final = 50_000
POWER_FILE_BYTES_MAX: Final = 4_000_000
# The last figure of a power file holds no longer than this: an old price is no price.
POWER_AGE_MAX: Final = dt.timedelta(hours=24)

T = TypeVar("T")
_log = structlog.get_logger(__name__)


def parse_price(value: object) -> int:
    """Return credits as a person writes them in micro-credits. Raises ValueError."""
    try:
        return parse_credits(str(value))
    except PricingError as error:
        raise ValueError(str(error)) from None


Credits = Annotated[Micros, BeforeValidator(parse_price)]
"""Credits as a person writes them, kept as micro-credits."""


class AskPart(Section):
    """A part of an ask curve: so many GPUs, cheapest first, at this price."""

    gpus: int = Field(ge=1, le=GPUS_PER_POOL_MAX)
    price: Credits


Curve = tuple[AskPart, ...]


class ScheduledFactor(Window):
    """A factor for a part of some days."""

    factor: float = Field(ge=0, le=1000)


class UtilisedFactor(Section):
    """A factor from a share of the pool's GPUs being lent on."""

    reached: float = Field(alias="from", ge=0, le=1)
    factor: float = Field(ge=0, le=1000)


class PowerRule(Section):
    """What a GPU's power costs, from a file of prices and of the grid's carbon."""

    file: Path
    kw_per_gpu: float = Field(gt=0, le=100, description="with its share of the host and of cooling")
    carbon_price: Credits = Field(default=0, description="credits per kg of CO2")


class AskRules(Section):
    """When and why an ask is another than its base."""

    zone: str = Field(default="UTC", max_length=64)
    schedule: tuple[ScheduledFactor, ...] = Field(default=(), max_length=32)
    utilisation: tuple[UtilisedFactor, ...] = Field(default=(), max_length=16)
    power: PowerRule | None = None
    lowest: Credits = 0
    highest: Credits = RATE_MICROS_MAX

    _known_zone = field_validator("zone")(check_zone)

    @model_validator(mode="after")
    def _sound(self) -> AskRules:
        if self.lowest > self.highest:
            message = "lowest must not be above highest"
            raise ValueError(message)
        if any(later.reached <= sooner.reached for sooner, later in itertools.pairwise(self.utilisation)):
            message = "utilisation: the shares must rise from line to line"
            raise ValueError(message)
        return self


@dataclass(frozen=True, slots=True)
class PowerFigures:
    """A power file as read: from `times` on, micro-credits per kWh and grams of CO2 per kWh."""

    times: tuple[dt.datetime, ...]
    micros_per_kwh: tuple[int, ...]
    grams_per_kwh: tuple[float, ...]

    def at(self, moment: dt.datetime) -> tuple[int, float, bool]:
        """Return price and carbon at a moment, and whether the file covers it; else the dearest and dirtiest it has."""
        row = bisect_right(self.times, moment) - 1
        if row < 0 or moment - self.times[row] > POWER_AGE_MAX:
            return max(self.micros_per_kwh), max(self.grams_per_kwh), False
        return self.micros_per_kwh[row], self.grams_per_kwh[row], True


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked at a moment, cheapest GPUs first, and by which rules."""

    curve: Curve
    why: str


def ask_at(base: Curve, rules: AskRules, power: PowerFigures | None, moment: dt.datetime, lent_share: float) -> Ask:
    """Return what is asked for a pool at a moment while a share of it is lent."""
    why = ["base"]
    factor = 1.0
    soon = moment + dt.timedelta(seconds=1)
    scheduled = next((row for row in rules.schedule if any(spans(row, rules.zone, moment, soon))), None)
    if scheduled is not None:
        factor *= scheduled.factor
        why.append(f"x {scheduled.factor:g} by schedule")
    reached = [row for row in rules.utilisation if lent_share >= row.reached]
    if reached:
        factor *= reached[-1].factor
        why.append(f"x {reached[-1].factor:g} at {lent_share:.0%} lent")
    added = 0
    if rules.power is not None and power is not None:
        price, grams, covered = power.at(moment)
        added = round(rules.power.kw_per_gpu * (price + grams * rules.power.carbon_price / 1000))
        why.append(f"+ {format_credits(added)} for power" + ("" if covered else " (no figure: the file's dearest)"))
    prices = [round(part.price * factor) + added for part in base]
    bounded = [min(max(price, rules.lowest), rules.highest, RATE_MICROS_MAX) for price in prices]
    if bounded != prices:
        why.append(f"held at {'lowest' if bounded[0] > prices[0] else 'highest'}")
    return Ask(_joined(zip((part.gpus for part in base), bounded, strict=True)), " ".join(why))


def _joined(parts: zip[tuple[int, int]]) -> Curve:
    """Return a curve whose prices rise strictly, as the market reads them."""
    found: list[AskPart] = []
    for gpus, price in parts:
        if found and found[-1].price == price:
            gpus += found.pop().gpus  # noqa: PLW2901  parts at one price are one part
        found.append(AskPart.model_construct(gpus=gpus, price=price))
    return tuple(found)


def first_gpus(curve: Curve, gpus: int) -> Curve:
    """Return the part of a curve that its first, cheapest GPUs make."""
    found: list[AskPart] = []
    for part in curve:
        taken = min(part.gpus, gpus)
        if taken > 0:
            found.append(AskPart.model_construct(gpus=taken, price=part.price))
        gpus -= taken
    return tuple(found)


def check_curve(curve: Curve, gpus: int) -> None:
    """Raise ValueError where prices do not rise, or the parts are not the pool's GPUs."""
    if any(later.price <= sooner.price for sooner, later in itertools.pairwise(curve)):
        message = "ask: each part of a curve must cost more than the one before; the cheapest GPUs are sold first"
        raise ValueError(message)
    if sum(part.gpus for part in curve) != gpus:
        message = f"ask: the parts of the curve must add up to the pool's {gpus} GPUs"
        raise ValueError(message)


def parse_curve(text: str, gpus: int) -> Curve:
    """Return the curve that an operator typed: one price, or 8:1.10,8:1.60. Raises AskError."""
    try:
        if ":" not in text:
            return (AskPart(gpus=gpus, price=text),)
        parts = [part.partition(":") for part in text.split(",")]
        curve = tuple(AskPart(gpus=int(count), price=price) for count, _, price in parts)
        check_curve(curve, gpus)
    except ValidationError as error:
        raise AskError(f"{text!r} is no ask: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    except ValueError as error:
        raise AskError(f"{text!r} is no ask: {error}; write a price, or parts such as 8:1.10,8:1.60") from None
    if len(curve) > ASK_STEPS_MAX + 1:
        raise AskError(f"{text!r} has more than {ASK_STEPS_MAX + 1} parts; join some of them")
    return curve


def read_power(path: Path) -> PowerFigures:
    """Return the figures of a power file. Raises AskError with the line of its first fault."""
    try:
        if path.stat().st_size > POWER_FILE_BYTES_MAX:
            raise AskError(f"{path} is larger than {POWER_FILE_BYTES_MAX // 1_000_000} MB; cut it to the coming weeks")
        lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AskError(f"{path} cannot be read ({error}); write the columns time,price,carbon there") from None
    times: list[dt.datetime] = []
    prices: list[int] = []
    grams: list[float] = []
    for number, row in enumerate(lines, start=2):
        try:
            time = dt.datetime.fromisoformat(str(row["time"]).strip())
            price, carbon = Decimal(str(row["price"]).strip()), float(row.get("carbon") or 0)
            if time.tzinfo is None:
                raise ValueError("the time needs its zone, as in 2030-01-05T08:00Z")  # noqa: TRY301  told with its line
            if not (0 <= price <= 1_000_000 and 0 <= carbon <= 1_000_000):  # noqa: PLR2004  sane bounds
                raise ValueError("price and carbon must lie between 0 and a million")  # noqa: TRY301
            if times and time <= times[-1]:
                raise ValueError("times must rise from line to line")  # noqa: TRY301
        except (KeyError, ValueError, InvalidOperation) as error:
            reason = f"no column {error}" if isinstance(error, KeyError) else str(error) or "no figure"
            raise AskError(f"{path}, line {number}: {reason}") from None
        times.append(time.astimezone(dt.UTC))
        prices.append(round(price * 1_000_000))
        grams.append(carbon)
    if not times or len(times) > POWER_ROWS_MAX:
        raise AskError(f"{path} must have 1 to {POWER_ROWS_MAX} rows, not {len(times)}")
    return PowerFigures(tuple(times), tuple(prices), tuple(grams))


_OVERRIDES: Final = TypeAdapter(dict[str, tuple[tuple[int, int], ...]])


def read_overrides(folder: Path) -> dict[str, Curve]:
    """Return the bases that `hansa site ask` has set, by GPU type. Raises AskError where the file cannot be read."""
    try:
        kept = _OVERRIDES.validate_json((folder / OVERRIDES_FILE).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        raise AskError(
            f"{folder / OVERRIDES_FILE} cannot be read ({str(error)[:200]}); delete it, and set the asks anew"
        ) from None
    return {kind: tuple(AskPart.model_construct(gpus=n, price=p) for n, p in rows) for kind, rows in kept.items()}


def write_overrides(folder: Path, overrides: Mapping[str, Curve]) -> None:
    """Keep bases for the agent, which reads them with its next heartbeat."""
    document = {kind: [(part.gpus, part.price) for part in curve] for kind, curve in sorted(overrides.items())}
    write_private(folder / OVERRIDES_FILE, json.dumps(document).encode())


@dataclass(frozen=True, slots=True)
class PricedPool:
    """A pool as far as its ask goes."""

    gpu_type: str
    gpus: int
    base: Curve
    rules: AskRules


class AskBook:
    """What a site asks: overrides and power files, each read again when it changes, over what its pools ask."""

    def __init__(self, pools: Sequence[PricedPool], folder: Path) -> None:
        """Read what stands. Raises AskError for a power file that cannot be used."""
        none_set: dict[str, Curve] = {}
        self._overrides = _Kept(folder / OVERRIDES_FILE, lambda path: read_overrides(path.parent), none_set)
        files = {pool.rules.power.file for pool in pools if pool.rules.power is not None}
        self._power = {path: _Kept(path, read_power, read_power(path)) for path in files}

    def asks(
        self, pools: Sequence[PricedPool], moment: dt.datetime, lent_shares: Mapping[str, float]
    ) -> dict[str, Ask]:
        """Return what is asked at a moment, by GPU type. What `hansa site ask` has set goes before a pool's own base."""
        overrides = self._overrides.current()
        found = {}
        for pool in pools:
            base = overrides.get(pool.gpu_type, pool.base)
            if sum(part.gpus for part in base) != pool.gpus:
                base = pool.base  # set for a pool of another size: the file's holds until it is set anew
            rule = pool.rules.power
            power = None if rule is None else self._power[rule.file].current()
            found[pool.gpu_type] = ask_at(base, pool.rules, power, moment, lent_shares.get(pool.gpu_type, 0.0))
        return found


class _Kept(Generic[T]):
    """What was read of a file, read again when the file changes; what cannot be read leaves what stood before."""

    def __init__(self, path: Path, read: Callable[[Path], T], value: T) -> None:
        self._path, self._read, self._value = path, read, value
        self._stamp: tuple[int, int] | None = None

    def current(self) -> T:
        try:
            entry = self._path.stat()
            stamp = entry.st_mtime_ns, entry.st_size
        except OSError:
            stamp = (0, 0)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._value = self._read(self._path)
            except AskError as error:
                _log.error("ask.file_broken", detail=str(error), in_force="what it said before")
        return self._value
