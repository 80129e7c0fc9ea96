"""`hansa site doctor`: what would keep this site from working, found before a lease finds it. Each finding has its remedy.

Each check looks at one thing, changes nothing and takes some seconds at most; one that fails does not keep the others from
being made. It asks the broker nothing that needs a signature, so it may run beside the agent.
"""

from __future__ import annotations

import datetime as dt
import enum
import json
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

from sites import identity as identities
from sites.client import greet
from sites.devices import mismatches, read_devices
from sites.drivers import cgroups
from sites.drivers.slurm_outcome import cluster_gpus
from sites.drivers.slurm_queue import run_slurm
from sites.errors import SiteError
from sites.links.prober import newest_probe
from sites.protocol import REQUEST_AGE_MS_MAX
from sites.sandbox import Bubblewrap
from sites.settings import SiteSettings
from training.clock import Clock

_GB: Final = 1_000_000_000
# What an idle site may do with: a bundle, a log and a checkpoint of a small job.
DISK_GB_MIN: Final = 2.0
SKEW_WARNING_S: Final = 2.0
CERTIFICATE_WARNING_H: Final = 4.0
# A link that carries less than this share of what its owner declares is worth a look.
CARRIED_SHARE_MIN: Final = 0.5
INTERPRETER_TIMEOUT_S: Final = 30.0
_TORCH: Final = (
    "import importlib.metadata as m, json\n"
    "found = {}\n"
    "for name in ('torch', 'numpy', 'safetensors', 'aiohttp'):\n"
    "    try: found[name] = m.version(name)\n"
    "    except m.PackageNotFoundError: pass\n"
    "print(json.dumps(found))"
)


class Level(enum.StrEnum):
    """How bad it is: a fault keeps the site from serving leases, a warning from serving them as well as it could."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `remedy` is empty where all is well."""

    check: str
    level: Level
    detail: str
    remedy: str = ""


def examine(settings: SiteSettings, clock: Clock) -> list[Finding]:
    """Return what was found, in the order in which a lease would meet it."""
    found: list[Finding] = []
    for check in (_folder, _identity, _broker, _interpreter, _sandbox, _driver, _ports, _links):
        try:
            found += check(settings, clock)
        except (SiteError, OSError, ValueError, subprocess.SubprocessError) as error:
            name = check.__name__.removeprefix("_")
            found.append(Finding(name, Level.FAULT, f"could not be looked at: {error}", "mend that and look again"))
    return found


def _folder(settings: SiteSettings, _clock: Clock) -> Iterator[Finding]:
    folder = settings.folder
    if not folder.is_dir():
        yield Finding("folder", Level.FAULT, f"{folder} is not there", "hansa site join JOINSTRING makes it")
        return
    entry = folder.stat()
    if entry.st_uid != os.getuid() or not os.access(folder, os.W_OK | os.X_OK):
        yield Finding("folder", Level.FAULT, f"{folder} is not this user's to write", f"sudo chown -R $USER {folder}")
    elif stat.S_IMODE(entry.st_mode) & 0o077:
        yield Finding("folder", Level.FAULT, f"others of this host may look into {folder}", f"chmod 700 {folder}")
    else:
        yield Finding("folder", Level.OK, f"{folder} is this user's alone")
    free_gb = shutil.disk_usage(folder).free / _GB
    wanted_gb = settings.limits.artifact_cache_gb + settings.limits.disk_gb
    if free_gb < DISK_GB_MIN:
        yield Finding("disk", Level.FAULT, f"{free_gb:.1f} GB are free", "make room, or move `folder` to a larger disk")
    elif free_gb < wanted_gb:
        yield Finding(
            "disk",
            Level.WARNING,
            f"{free_gb:.0f} GB are free, one lease may write {settings.limits.disk_gb:.0f} beside a cache of "
            f"{settings.limits.artifact_cache_gb:.0f}",
            "make room, or lower limits.disk_gb and limits.artifact_cache_gb",
        )
    else:
        yield Finding("disk", Level.OK, f"{free_gb:.0f} GB are free")


def _identity(settings: SiteSettings, clock: Clock) -> Iterator[Finding]:
    join = "ask the market's admin for a join string, then: hansa site join JOINSTRING"
    try:
        identity = identities.Identity(settings.folder, clock)
    except SiteError as error:
        yield Finding("certificate", Level.FAULT, str(error), join)
        return
    if identity.site_id != settings.site_id:
        detail = f"the folder belongs to site {identity.site_id}, the settings to {settings.site_id}"
        yield Finding("certificate", Level.FAULT, detail, "give each site a folder of its own")
        return
    try:
        identity.check_certificate()
    except SiteError as error:
        yield Finding("certificate", Level.FAULT, str(error), join)
        return
    key = settings.folder / "identity" / "key.pem"
    if stat.S_IMODE(key.stat().st_mode) & 0o077:
        yield Finding("key", Level.FAULT, f"others of this host may read {key}", f"chmod 600 {key}")
    left_h = (identity.certificate.not_valid_after_utc.timestamp() - clock.now_ms() / 1000) / 3600
    until = f"{identity.certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    if left_h <= 0:
        yield Finding("certificate", Level.FAULT, f"it ended at {until}", join)
    elif left_h < CERTIFICATE_WARNING_H:
        yield Finding("certificate", Level.WARNING, f"it ends at {until}", "start the agent: its heartbeats renew it")
    else:
        yield Finding("certificate", Level.OK, f"site {identity.site_id}, until {until}")


def _broker(settings: SiteSettings, clock: Clock) -> Iterator[Finding]:
    try:
        identity = identities.Identity(settings.folder, clock)
    except SiteError:
        return  # told already
    try:
        status, date = greet(identity.url, identity.ca_pem)
    except SiteError as error:
        remedy = (
            f"see whether a firewall or proxy stands between this host and {identity.url}, and whether the broker runs"
        )
        yield Finding("broker", Level.FAULT, str(error), remedy)
        return
    yield Finding("broker", Level.OK, f"{identity.url} answers ({status})")
    if date is None:
        return
    skew_s = clock.now_ms() / 1000 - parsedate_to_datetime(date).replace(tzinfo=dt.UTC).timestamp() - 0.5
    side, remedy = "ahead of" if skew_s > 0 else "behind", "set it by NTP: timedatectl set-ntp true"
    detail = f"this host's clock is {abs(skew_s):.0f} s {side} the broker's"
    if abs(skew_s) * 1000 > REQUEST_AGE_MS_MAX:
        yield Finding("clock", Level.FAULT, f"{detail}, which refuses requests that far off", remedy)
    elif abs(skew_s) > SKEW_WARNING_S:
        yield Finding("clock", Level.WARNING, detail, remedy)
    else:
        yield Finding("clock", Level.OK, "this host's clock and the broker's agree")


def _interpreter(settings: SiteSettings, _clock: Clock) -> Iterator[Finding]:
    remedy = f"{settings.python} -m pip install 'hansa[train]', or name another interpreter as `python` in site.yaml"
    try:
        told = subprocess.run(
            [settings.python, "-I", "-c", _TORCH],
            capture_output=True,
            check=True,
            timeout=INTERPRETER_TIMEOUT_S,
            env={"PATH": os.defpath},
        )
        found = dict(json.loads(told.stdout))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        yield Finding("interpreter", Level.FAULT, f"{settings.python} does not run ({error})", remedy)
        return
    missing = [name for name in ("torch", "numpy", "safetensors", "aiohttp") if name not in found]
    if missing:
        yield Finding("interpreter", Level.FAULT, f"{settings.python} has no {', '.join(missing)}", remedy)
    else:
        yield Finding("interpreter", Level.OK, f"{settings.python} has torch {found['torch']}")


def _sandbox(settings: SiteSettings, _clock: Clock) -> Iterator[Finding]:
    if settings.sandbox == "plain":
        detail = "none: tenants' code runs as this very user and sees what it sees"
        yield Finding(
            "sandbox", Level.WARNING, detail, "sandbox: bubblewrap in site.yaml, unless you trust all tenants"
        )
        return
    try:
        Bubblewrap(settings.python, settings.folder / "sandbox", settings.sandbox_readable).check()
    except SiteError as error:
        detail, _, remedy = str(error).partition("; ")
        yield Finding("sandbox", Level.FAULT, detail, remedy or "see sites/README.md")
        return
    yield Finding("sandbox", Level.OK, "bubblewrap confines a program here")
    held = {controller.name for controller in cgroups.controllers()}
    missing = sorted({"memory", "pids"} - held)
    if missing and settings.slurm is None:
        yield Finding(
            "limits",
            Level.WARNING,
            f"no control group can be made for {' and '.join(missing)}: a job's processes are limited one by one only",
            "delegate a group to the agent (systemd: Delegate=yes in its unit), or run it as root",
        )


def _driver(settings: SiteSettings, _clock: Clock) -> Iterator[Finding]:
    slurm = settings.slurm
    if slurm is None:
        yield Finding("driver", Level.OK, "process: runs are processes of this host")
        yield from _devices(settings)
        return
    options = ["--noheader", "--Node", "--format=%N|%G|%T"]
    try:
        told = run_slurm(["sinfo", *options, *([f"--partition={slurm.partition}"] if slurm.partition else [])])
    except SiteError as error:
        detail, _, remedy = str(error).rpartition("; ")
        yield Finding("driver", Level.FAULT, detail or str(error), remedy)
        return
    rows = [line.rpartition("|") for line in told.splitlines()]
    nodes = {name: count for name, count in cluster_gpus("\n".join(sorted({row[0] for row in rows}))).items() if name}
    away = sorted({row[0].partition("|")[0] for row in rows if row[2].startswith(("down", "drain", "fail", "unknown"))})
    if not nodes:
        where = f"partition {slurm.partition!r}" if slurm.partition else "the cluster"
        yield Finding("driver", Level.FAULT, f"{where} has no nodes", "set slurm.partition to one that `sinfo` shows")
        return
    yield Finding(
        "driver", Level.OK, f"slurm: {len(nodes)} nodes answer for {slurm.partition or 'the default partition'}"
    )
    if away:
        yield Finding("nodes", Level.WARNING, f"{', '.join(away[:5])} take no jobs", "scontrol show node says why")
    if slurm.gres:
        yield from _gres(settings, slurm.gpus_per_node, nodes)
    if slurm.fabric == "trusted":
        yield Finding(
            "fabric",
            Level.WARNING,
            "ranks of jobs on several nodes have the cluster's network, not only their gateway",
            "let the nodes' firewall pass traffic among them alone, or set slurm.fabric: none",
        )
    if slurm.gateway_host is None:
        yield Finding(
            "gateway",
            Level.WARNING,
            "nodes that are other hosts do not reach the gateways of this one",
            "set slurm.gateway_host to this host's address on the cluster's network",
        )


def _devices(settings: SiteSettings) -> Iterator[Finding]:
    """Hold what site.yaml promises against what NVML finds on this host."""
    devices = read_devices()
    faults = list(mismatches(settings, devices))
    for fault in faults:
        remedy = "mend the driver or the card, or lower the pool in site.yaml to what is there"
        yield Finding("gpus", Level.FAULT, fault, remedy)
    if faults:
        return
    if devices.absence:
        yield Finding("gpus", Level.OK, f"none promised, none seen: {devices.absence}")
    else:
        names = ", ".join(f"{device.name} ({device.power_w or 0:.0f} W)" for device in devices.found[:8])
        yield Finding("gpus", Level.OK, f"driver {devices.driver}: {names or 'no GPUs'}")


def _gres(settings: SiteSettings, gpus_per_node: int, nodes: dict[str, int]) -> Iterator[Finding]:
    """Hold what site.yaml promises against what Slurm has."""
    promised, have = sum(len(pool.gpu_ids) for pool in settings.pools), sum(nodes.values())
    small = sorted(name for name, count in nodes.items() if count < gpus_per_node)
    if promised > have:
        remedy = f"lower the pools to {have} GPUs, or name the partition that has them as slurm.partition"
        yield Finding("gpus", Level.FAULT, f"site.yaml promises {promised} GPUs, Slurm's nodes have {have}", remedy)
    else:
        yield Finding("gpus", Level.OK, f"site.yaml promises {promised} of the {have} GPUs that Slurm's nodes have")
    if small:
        detail = f"slurm.gpus_per_node is {gpus_per_node}, but {', '.join(small[:5])} have fewer"
        remedy = f"set slurm.gpus_per_node to {min(nodes.values())}, or name a partition of equal nodes"
        yield Finding("gpus", Level.WARNING if len(small) < len(nodes) else Level.FAULT, detail, remedy)


def _ports(settings: SiteSettings, _clock: Clock) -> Iterator[Finding]:
    listen = settings.listen
    if listen is None:
        yield Finding("ports", Level.OK, "none needed: this site dials out only, so it cannot be a hub")
        return
    bind = (listen.bind or listen.host).strip("[]")
    first, last = listen.ports or (0, 0)
    free, reason = 0, ""
    for port in range(first, last + 1):
        with socket.socket(socket.AF_INET6 if ":" in bind else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((bind, port))
                free += 1
            except OSError as error:
                reason = str(error)
    ports = "any port" if listen.ports is None else f"{first}-{last}"
    if not free:
        yield Finding(
            "ports",
            Level.FAULT,
            f"no gateway can listen at {bind}, {ports} ({reason})",
            "set listen.bind to an address of this host and listen.ports to free ports, open in its firewall",
        )
    else:
        yield Finding("ports", Level.OK, f"gateways can listen at {bind}, {ports}")


def _links(settings: SiteSettings, clock: Clock) -> Iterator[Finding]:
    """Tell what the newest probe of a link saw; the market counts with the lower of that and what site.yaml declares."""
    if not settings.links:
        return
    if not settings.probes.allowed:
        yield Finding("links", Level.OK, "declared only: the owner allows no probes (probes.allowed)")
        return
    newest = newest_probe(settings.folder)
    if newest is None:
        yield Finding("links", Level.OK, "declared only: the market has not asked for a probe yet")
        return
    ago_h = (clock.now_ms() - newest.ended_ms) / 3_600_000
    when = f"the probe with {newest.peer} {ago_h:.1f} h ago"
    report = newest.report
    if report.failed or report.sent is None or report.received is None:
        remedy = f"see whether firewalls let the sites reach each other's listen.ports; {newest.peer} must be up too"
        yield Finding("links", Level.WARNING, f"{when}: {report.failed or 'nothing passed'}", remedy)
        return
    carried = f"{report.sent.bits_per_s / 1e6:.1f} Mbit/s out, {report.received.bits_per_s / 1e6:.1f} in"
    trip = "" if report.round_trip_s is None else f", {report.round_trip_s * 1000:.1f} ms there and back"
    declared = {link.target: link.bandwidth for link in settings.links}.get(newest.peer)
    if declared is not None and report.sent.bits_per_s < CARRIED_SHARE_MIN * declared:
        remedy = f"find out what slows the way to {newest.peer}, or declare less as its bandwidth in site.yaml"
        detail = f"{when}: {carried}{trip}; site.yaml declares {declared / 1e6:.1f} out"
        yield Finding("links", Level.WARNING, detail, remedy)
    else:
        yield Finding("links", Level.OK, f"{when}: {carried}{trip}")


def worst(findings: list[Finding]) -> Level:
    """Return the worst level among findings."""
    order = list(Level)
    return max((finding.level for finding in findings), key=order.index, default=Level.OK)


def table(findings: list[Finding]) -> str:
    """Return the findings for people: one line each, the remedy below."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level.value:<8} {finding.check:<12} {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<8} {'':<12} -> {finding.remedy}")
    return "\n".join(lines)
