"""A job as a person writes it: YAML with SkyPilot's outer keys and one `market` block, made into a `JobSpec`.

    name: my-job
    workdir: .                          # relative to this file
    resources: {accelerators: "H100:2..8"}   # or a list of such; any one of them will do
    setup: pip install -r requirements.txt
    run: python train.py --width 64
    envs: {SEED: "7"}
    secrets: [HF_TOKEN]                 # stored by `hansa secret set`; a file in $HANSA_SECRETS, never a variable
    data: [{name: corpus, sha256: 9f86d0…, size_gb: 12, source: https://data.example.org/corpus, sites: [hamburg], egress_ok: true}]
    market:
      budget: 20                        # credits; never exceeded
      bid: 1.5                          # credits per million samples; left out, the budget over all samples
      deadline: 2030-01-31T12:00:00Z
      start: now                        # at the last prices at once, for a few GPUs; left out, the next round places it
      sites_max: 2
      mixed_types: true                 # two sites may give GPUs of different types
      data: {home_site: hamburg, residency: region, bytes_per_sample: 4096}
      bid_steps: [{above_samples_per_s: 500, bid: 0.5}]   # what is faster than that is worth less
      workload: {samples: 19200, batch_per_gpu: 16, parameters: 136960, flops_per_sample: 5.3e7}
      profile: [{gpu_type: T4, batch_per_gpu: 16, steps: 240, step_s: 0.021}]   # as `hansa profile` writes it
      sync: auto                        # or a block: {strategy: streaming, fragments: 4, …}

Reading is strict, since a misspelt key would otherwise cost money: unknown keys, doubled keys, aliases and tags are
refused, each with its line. `budget` and `bid` are credits here and micro-credits on the wire.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ValidationError

from training.errors import SpecError
from training.spec import BUDGET_MICROS_MAX, JobSpec, ProfileTerms

JOB_FILE_BYTES_MAX: Final = 256 * 1024
DEPTH_MAX: Final = 12
MICROS_PER_CREDIT: Final = 1_000_000
JOB_KEYS: Final = ("name", "workdir", "resources", "setup", "run", "envs", "secrets", "data", "market")
MARKET_KEYS: Final = (
    *("budget", "bid", "bid_steps", "deadline", "sites_max", "sites_allowed", "mixed_types", "data", "start"),
    *("workload", "profile", "sync"),
)
# How the file's names stand on the wire, so that a fault found there is reported where the person wrote it.
WRITTEN_AS: Final[dict[str, str]] = {
    "/market/budget_micros": "/market/budget",
    "/market/bid_micros_per_million_samples": "/market/bid",
    "/market/deadline_ms": "/market/deadline",
}
_ACCELERATOR: Final = re.compile(r"([A-Za-z][A-Za-z0-9-]{0,30})(?::([0-9]{1,9})(?:\.\.([0-9]{1,9}))?)?")
_PLAIN_TAGS: Final = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")
)
_TIMESTAMP: Final = "tag:yaml.org,2002:timestamp"

Problems = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class JobFile:
    """A job file as read: the wire's document but for the workdir's digest, and the workdir as it was written."""

    document: Mapping[str, Any]
    workdir: str
    lines: Mapping[str, int]

    def spec(self, workdir_digest: str) -> JobSpec:
        """Return the whole specification. Raises SpecError with the line of each fault."""
        try:
            return JobSpec.model_validate({**self.document, "workdir_digest": workdir_digest})
        except ValidationError as error:
            raise SpecError([_problem(row) for row in error.errors()], _known_lines(error, self.lines)) from None


def with_profile(text: str, rows: Sequence[ProfileTerms]) -> str:
    """Return a job file's text with these rows in its `market.profile`, everything else as it was written.

    Rows of GPU types that `rows` does not name stay. Raises SpecError where the file cannot be read, or where its
    market block stands on one line.
    """
    file = read_job_file(text)
    below = sorted(line for place, line in file.lines.items() if place.startswith("/market/"))
    if not below or below[0] <= file.lines["/market"]:
        problem = ("/market", "write the block with one key a line, so that a profile can be put into it")
        raise SpecError([problem], dict(file.lines))
    lines = text.splitlines(keepends=True)
    first = lines[below[0] - 1]
    indent = first[: len(first) - len(first.lstrip())]
    measured = {row.gpu_type for row in rows}
    stated = [row for row in file.document["market"].get("profile") or () if row.get("gpu_type") not in measured]
    entries = [*stated, *(row.model_dump() for row in rows)]
    flow = (", ".join(f"{name}: {value}" for name, value in entry.items()) for entry in entries)
    block = [f"{indent}profile:\n", *(f"{indent}  - {{{entry}}}\n" for entry in flow)]
    start = file.lines.get("/market/profile", below[0]) - 1
    end = start
    if "/market/profile" in file.lines:
        end += 1
        while end < len(lines) and (not lines[end].strip() or lines[end].startswith((f"{indent} ", f"{indent}-"))):
            end += 1
    return "".join([*lines[:start], *block, *lines[end:]])


def load_job_file(path: Path) -> JobFile:
    """Read the job file at `path`. Raises OSError where it cannot be opened, SpecError for its content."""
    with path.open("rb") as stream:
        return read_job_file(stream.read(JOB_FILE_BYTES_MAX + 1))


def read_job_file(text: str | bytes) -> JobFile:
    """Read a job file's text. Raises SpecError listing its faults, each with its line."""
    content = text.encode() if isinstance(text, str) else text
    if len(content) > JOB_FILE_BYTES_MAX:
        raise SpecError([("", f"it is larger than {JOB_FILE_BYTES_MAX // 1024} KiB; data belongs in the workdir")])
    document, lines = _parsed(content)
    problems: Problems = []
    job = _table(document, "", JOB_KEYS, problems)
    market = _table(job.get("market", {}), "/market", MARKET_KEYS, problems)
    workdir = job.pop("workdir", ".")
    if not isinstance(workdir, str):
        problems.append(("/workdir", "must be the path of a folder"))
    if "market" in job:
        job["market"] = _market(market, problems)
    if "resources" in job:
        job["resources"] = _resources(job["resources"], problems)
    if isinstance(job.get("envs"), dict):
        job["envs"] = {name: _environment_value(name, value, problems) for name, value in job["envs"].items()}
    if problems:
        raise SpecError(problems, lines)
    return JobFile(job, str(workdir), lines)


def _parsed(content: bytes) -> tuple[object, dict[str, int]]:
    lines: dict[str, int] = {}
    loader = None
    try:
        loader = yaml.SafeLoader(content)
        _refuse_aliases(content)
        node = loader.get_single_node()
        if node is None:
            raise SpecError([("", "the file is empty; it needs at least name, resources, run and market")])
        return _value(loader, node, "", lines, 0), lines
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        what = f"this is not YAML: {getattr(error, 'problem', None) or error}"
        raise SpecError([("", what)], {"": mark.line + 1} if mark else None) from None
    finally:
        if loader is not None:
            loader.dispose()


def _refuse_aliases(content: bytes) -> None:
    """Look through the events first: composing an alias of aliases is what a bomb waits for."""
    depth = 0
    for event in yaml.parse(content, Loader=yaml.SafeLoader):
        line = 0 if event.start_mark is None else event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise SpecError([("", "aliases (*name) are not allowed; write the value out")], {"": line})
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH_MAX:
            raise SpecError([("", f"it is nested more than {DEPTH_MAX} deep")], {"": line})


def _value(loader: yaml.SafeLoader, node: yaml.Node, place: str, lines: dict[str, int], depth: int) -> object:
    lines.setdefault(place, node.start_mark.line + 1)
    if node.tag not in _PLAIN_TAGS | {_TIMESTAMP}:
        raise SpecError([(place, f"the tag {node.tag} is not allowed; write a plain value")], lines)
    if isinstance(node, yaml.MappingNode):
        found: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            below = f"{place}/{key}"
            if key in found:
                raise SpecError([(below, "stands twice")], {below: key_node.start_mark.line + 1})
            lines[below] = key_node.start_mark.line + 1
            found[key] = _value(loader, value_node, below, lines, depth + 1)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, each, f"{place}/{index}", lines, depth + 1) for index, each in enumerate(node.value)]
    if node.tag == _TIMESTAMP:
        return node.value  # kept as written: a time without its zone must be seen as such
    return loader.construct_object(node)


def _table(value: object, place: str, known: tuple[str, ...], problems: Problems) -> dict[str, Any]:
    if not isinstance(value, dict):
        problems.append((place, f"must have the keys {', '.join(known)}"))
        return {}
    problems += [
        (f"{place}/{key}", f"unknown key {key!r}; known here: {', '.join(known)}") for key in value if key not in known
    ]
    return {key: each for key, each in value.items() if key in known}


def _market(market: dict[str, Any], problems: Problems) -> dict[str, Any]:
    """Return the block with its amounts and its time as the wire has them."""
    renamed: dict[str, tuple[str, Callable[[object], int]]] = {
        "budget": ("budget_micros", _micros),
        "bid": ("bid_micros_per_million_samples", _micros),
        "deadline": ("deadline_ms", _milliseconds),
    }
    found: dict[str, Any] = {}
    for key, value in market.items():
        if key not in renamed or value is None:
            found[key] = value
            continue
        name, convert = renamed[key]
        try:
            found[name] = convert(value)
        except ValueError as error:
            problems.append((f"/market/{key}", str(error)))
    if isinstance(found.get("sync"), str):  # `sync: streaming` is the whole block with its defaults
        found["sync"] = {"strategy": found["sync"]}
    if isinstance(found.get("bid_steps"), list):
        found["bid_steps"] = [_bid_step(index, step, problems) for index, step in enumerate(found["bid_steps"])]
    for block in ("workload", "sync", "data"):
        if isinstance(found.get(block), dict):
            found[block] = {key: _number(value) for key, value in found[block].items()}
    return found


def _bid_step(index: int, step: object, problems: Problems) -> object:
    place = f"/market/bid_steps/{index}"
    table = _table(step, place, ("above_samples_per_s", "bid"), problems)
    try:
        return {
            "above_samples_per_s": _number(table.get("above_samples_per_s")),
            "bid_micros_per_million_samples": _micros(table.get("bid")),
        }
    except ValueError as error:
        problems.append((f"{place}/bid", str(error)))
        return step


def _micros(value: object) -> int:
    try:
        amount = Decimal(str(value)) if not isinstance(value, bool) else Decimal("NaN")
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or amount <= 0:
        raise ValueError(f"{value!r} is not an amount of credits above nought")
    micros = amount * MICROS_PER_CREDIT
    if micros > BUDGET_MICROS_MAX:
        raise ValueError(f"{value} credits are more than a job may hold")
    if micros != micros.to_integral_value():
        raise ValueError(f"{value} has more than six decimals; a micro-credit is the least amount")
    return int(micros)


def _milliseconds(value: object) -> int:
    try:
        moment = dt.datetime.fromisoformat(str(value))
    except ValueError:
        raise ValueError(f"{value!r} is not a time; write it as 2030-01-31T12:00:00Z") from None
    if moment.tzinfo is None:
        raise ValueError(f"{value} has no time zone; write it as 2030-01-31T12:00:00Z")
    return round(moment.timestamp() * 1000)


def _number(value: object) -> object:
    """Return 5.3e7 as a number: YAML 1.1 takes it for a string, as it has no sign in its exponent."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+", value):
        return float(value)
    return value


def _resources(value: object, problems: Problems) -> dict[str, Any]:
    place = "/resources/accelerators"
    accelerators = _table(value, "/resources", ("accelerators",), problems).get("accelerators")
    if isinstance(accelerators, dict):
        accelerators = [f"{gpu_type}:{count}" for gpu_type, count in accelerators.items()]
    if isinstance(accelerators, str):
        accelerators = [accelerators]
    if not isinstance(accelerators, list) or not accelerators:
        problems.append((place, 'say which GPUs will do, such as "H100:8", "H100:2..8" or a list of such'))
        return {}
    return {"accelerators": [_accelerator(each, place, problems) for each in accelerators]}


def _accelerator(value: object, place: str, problems: Problems) -> dict[str, Any]:
    match = _ACCELERATOR.fullmatch(str(value).strip())
    if match is None:
        problems.append((place, f"{value!r} is no GPU request; write TYPE:COUNT or TYPE:LEAST..MOST"))
        return {}
    least = int(match[2] or 1)
    return {"gpu_type": match[1], "count_min": least, "count_max": int(match[3] or least)}


def _environment_value(name: str, value: object, problems: Problems) -> object:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        problems.append((f"/envs/{name}", 'must be text; put it in quotes, such as "true"'))
    return str(value)


def _problem(row: Mapping[str, Any]) -> tuple[str, str]:
    return _written(row), str(row["msg"]).removeprefix("Value error, ")


def _written(row: Mapping[str, Any]) -> str:
    place = "".join(f"/{part}" for part in row["loc"])
    return WRITTEN_AS.get(place, place)


def _known_lines(error: ValidationError, lines: Mapping[str, int]) -> dict[str, int]:
    """Return a line for each fault: its own, or that of the nearest block around it which was written."""
    found: dict[str, int] = {}
    for row in error.errors():
        place = around = _written(row)
        while around and around not in lines:
            around = around.rpartition("/")[0]
        if around in lines:
            found[place] = lines[around]
    return found
