"""An emulated wide-area network: each site a network namespace of its own, joined by a router.

    site 1  --veth (HTB: its bandwidth)--  router (NFQUEUE: delay and loss)  --veth (HTB)--  site 2

Bandwidth holds per site, at both ends of its cable, as an uplink does; delay and loss hold per directed pair.
TCP's windows are raised, or they would bound a long link. Needs root, or a user namespace in which one is
(`unshare -Urnm`), and Debian's iproute2 and iptables. Everything is removed at the end, whatever happens.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from training.errors import TrainingError
from training.lab import delay
from training.lab.link import LinkSpec

SITES_MAX: Final = 16
WINDOW_BYTES: Final = 64 * 1024 * 1024
_NETWORK: Final = "10.77"
_COMMAND_TIMEOUT_S: Final = 30.0
_NUMBERS: Final = itertools.count()


class WanError(TrainingError):
    """The network cannot be made here; the message names what is missing."""

    code = "lab.wan"


class Wan:
    """Some sites and the links between them, for as long as the `with` block lasts."""

    def __init__(self, sites: Sequence[str], link: LinkSpec, *, seed: int = 0) -> None:
        """Describe a network in which every directed pair of `sites` is a `link`; nothing is made yet."""
        if not 0 < len(set(sites)) == len(sites) <= SITES_MAX:
            raise WanError(f"a laboratory has 1 to {SITES_MAX} sites, each with a name of its own")
        self._sites = tuple(sites)
        self._link = link
        self._seed = seed
        self._mark = f"hw{os.getpid()}-{next(_NUMBERS)}"
        self._delays: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        """Make the network. Raises WanError."""
        missing = [name for name in ("ip", "tc", "iptables", "nsenter") if shutil.which(name, path=_path()) is None]
        if missing:
            raise WanError(f"{', '.join(missing)} not found; on Debian: apt-get install iproute2 iptables util-linux")
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the network; programs that still run in it keep their namespace and lose all links."""
        self._remove()

    def address(self, site: str) -> str:
        """Return the address of a site on the emulated network."""
        return f"{_NETWORK}.{self._index(site)}.2"

    def argv(self, site: str, command: Sequence[str]) -> tuple[str, ...]:
        """Return `command` as it runs at a site: on the site's network, in every other respect as here."""
        # nsenter changes the network alone; `ip netns exec` would also hide /sys.
        return (_tool("nsenter"), f"--net=/run/netns/{self._namespace(site)}", *command)

    def start(
        self,
        site: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        output: IO[bytes] | None,
    ) -> subprocess.Popen[bytes]:
        """Start a program at a site; what it prints goes to `output`."""
        return subprocess.Popen(
            self.argv(site, command),
            stdin=subprocess.DEVNULL,
            stdout=output or subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            env=None if environment is None else dict(environment),
        )

    def part(self, one: str, other: str) -> None:
        """Cut the link between two sites, both ways."""
        for source, target in ((one, other), (other, one)):
            self._in_router(*self._rule("-I", source, target), "-j", "DROP")

    def join(self, one: str, other: str) -> None:
        """Mend a link that was cut."""
        for source, target in ((one, other), (other, one)):
            self._in_router(*self._rule("-D", source, target), "-j", "DROP")

    def sent_bytes(self, site: str) -> int:
        """Return the bytes on a site's cable so far, headers, acknowledgements and repetitions counted."""
        return self._counted(site, "tx")

    def received_bytes(self, site: str) -> int:
        """Return the bytes that came in over a site's cable so far, counted as `sent_bytes` counts them."""
        return self._counted(site, "rx")

    def cable(self, site: str) -> str:
        """Return the name of a site's network interface, for programs that must be told it."""
        return f"v{self._index(site)}"

    def congestion_control(self) -> str:
        """Return the name of TCP's congestion control at the sites: it decides what loss costs."""
        return self._sysctl(self._namespace(self._sites[0]), "net.ipv4.tcp_congestion_control")

    def use_congestion_control(self, name: str) -> None:
        """Let TCP at all sites use another congestion control. Raises WanError where the kernel has it not."""
        for site in self._sites:
            self._set(self._namespace(site), "net.ipv4.tcp_congestion_control", name)

    # -- making and removing -------------------------------------------------------------------

    def _make(self) -> None:
        router = self._router
        _run(_tool("ip"), "netns", "add", router)
        self._set(router, "net.ipv4.ip_forward", "1")
        for site in self._sites:
            self._make_site(site)
        queues = []
        for number, (source, target) in enumerate(itertools.permutations(self._sites, 2), start=1):
            self._in_router(
                *("-t", "mangle", "-A", "FORWARD"),
                *("-i", self._port(source), "-o", self._port(target), "-j", "NFQUEUE", "--queue-num", str(number)),
            )
            seed = zlib.crc32(f"{self._seed} {source} {target}".encode())
            queues.append(f"{number}:{self._link.delay_s!r}:{self._link.loss!r}:{seed}")
        if queues:
            self._start_delays(queues)

    def _make_site(self, site: str) -> None:
        namespace, router = self._namespace(site), self._router
        index, cable, port = self._index(site), self.cable(site), self._port(site)
        ip = _tool("ip")
        _run(ip, "netns", "add", namespace)
        _run(ip, "link", "add", cable, "netns", namespace, "type", "veth", "peer", "name", port, "netns", router)
        _run(ip, "-n", namespace, "addr", "add", f"{_NETWORK}.{index}.2/24", "dev", cable)
        _run(ip, "-n", router, "addr", "add", f"{_NETWORK}.{index}.1/24", "dev", port)
        for place, device in ((namespace, "lo"), (namespace, cable), (router, port)):
            _run(ip, "-n", place, "link", "set", device, "up")
        # Single packets from the start: large segments would count their headers once and be shaped in lumps.
        _run(ip, "-n", namespace, "link", "set", cable, "gso_max_segs", "1")
        _run(ip, "-n", namespace, "route", "add", "default", "via", f"{_NETWORK}.{index}.1")
        rate = f"{round(self._link.bandwidth_bits_per_s)}bit"
        tc = _tool("tc")
        for place, device in ((namespace, cable), (router, port)):
            _run(tc, "-n", place, "qdisc", "add", "dev", device, "root", "handle", "1:", "htb", "default", "10")
            _run(
                *(tc, "-n", place, "class", "add", "dev", device, "parent", "1:", "classid", "1:10", "htb"),
                *("rate", rate, "ceil", rate, "burst", "64k", "cburst", "64k", "quantum", "60000"),
            )
        for which in ("wmem", "rmem"):
            self._set(namespace, f"net.ipv4.tcp_{which}", f"4096 131072 {WINDOW_BYTES}")

    def _start_delays(self, queues: Sequence[str]) -> None:
        command = (sys.executable, "-I", "-S", delay.__file__, *queues)
        self._delays = subprocess.Popen(
            (_tool("nsenter"), f"--net=/run/netns/{self._router}", *command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._delays.stdout is not None
        assert self._delays.stderr is not None
        if self._delays.stdout.readline().strip() != "ready":
            raise WanError(f"this kernel does not queue packets (NFQUEUE): {self._delays.stderr.read().strip()[-300:]}")

    def _remove(self) -> None:
        if self._delays is not None:
            self._delays.kill()
            self._delays.communicate()
            self._delays = None
        for namespace in (*(self._namespace(site) for site in self._sites), self._router):
            if Path("/run/netns", namespace).exists():
                subprocess.run((_tool("ip"), "netns", "del", namespace), check=False, capture_output=True)

    # -- names and tools -----------------------------------------------------------------------

    @property
    def _router(self) -> str:
        return f"{self._mark}-r"

    def _index(self, site: str) -> int:
        return self._sites.index(site) + 1

    def _namespace(self, site: str) -> str:
        return f"{self._mark}-{self._index(site)}"

    def _port(self, site: str) -> str:
        return f"r{self._index(site)}"

    def _rule(self, act: str, source: str, target: str) -> tuple[str, ...]:
        return (act, "FORWARD", "-i", self._port(source), "-o", self._port(target))

    def _counted(self, site: str, direction: str) -> int:
        told = _run(_tool("ip"), "-n", self._namespace(site), "-s", "-j", "link", "show", "dev", self.cable(site))
        return int(json.loads(told)[0]["stats64"][direction]["bytes"])

    def _in_router(self, *words: str) -> None:
        _run(_tool("nsenter"), f"--net=/run/netns/{self._router}", _tool("iptables"), "-w", *words)

    def _set(self, namespace: str, name: str, value: str) -> None:
        _run(_tool("nsenter"), f"--net=/run/netns/{namespace}", _tool("sysctl"), "-qw", f"{name}={value}")

    def _sysctl(self, namespace: str, name: str) -> str:
        return _run(_tool("nsenter"), f"--net=/run/netns/{namespace}", _tool("sysctl"), "-n", name).strip()


def _path() -> str:
    # An ordinary user's path often lacks the administrator's tools.
    return os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def _tool(name: str) -> str:
    return shutil.which(name, path=_path()) or name


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_COMMAND_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise WanError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        reason = " ".join(done.stderr.split())[-300:]
        raise WanError(
            f"`{' '.join(command)}` failed ({reason}); the laboratory needs root, or a user namespace: "
            "unshare -Urnm sh -c 'mount -t tmpfs none /run && mkdir /run/netns && hansa lab run …'"
        )
    return done.stdout
