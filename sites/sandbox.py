"""What a tenant's code may see: the command line that confines a run with bubblewrap. Pure, but for `Bubblewrap.check`.

A confined run has namespaces of its own (users, mounts, processes, IPC, host name, network), no capability, and
a root made of what is listed here: the system's programs and the ranks' interpreter read-only, its own folders
writable, a small private /tmp. Paths are the same inside and outside, so nothing needs translation. Its one way out
is the gateway's Unix socket, which stands in a folder of its own. Limits on memory, processes and disk are
the warden's (`sites.drivers.warden`), the forbidden system calls are in `sites.seccomp`.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sites import seccomp
from sites.errors import SandboxError

PROGRAM: Final = "bwrap"
# Nobody of the host: inside, files of the site's user look like this user's.
INNER_USER: Final = 1000
# In the private /tmp of ranks; what HANSA_SECRETS says.
SECRETS_FOLDER: Final = "/tmp/hansa-secrets"  # noqa: S108  the sandbox's own
TMP_BYTES: Final = 256 * 1024 * 1024
_CHECK_TIMEOUT_S: Final = 20.0
_SECCOMP_FD: Final = 9
# What programs look up in /etc; the rest of the host's /etc stays outside.
_ETC: Final = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime", "mime.types")
_MERGED: Final = ("bin", "sbin", "lib", "lib32", "lib64")
# The device files of an NVIDIA driver that belong to no single GPU.
_NVIDIA_SHARED: Final = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset")
_HOSTS: Final = "127.0.0.1 localhost sandbox\n::1 localhost\n"
_PASSWD: Final = f"tenant:x:{INNER_USER}:{INNER_USER}:tenant:/nonexistent:/bin/sh\n"
_GROUP: Final = f"tenant:x:{INNER_USER}:\n"


@dataclass(frozen=True, slots=True)
class View:
    """What one run may reach beyond the system's programs: paths that it may change, paths that it may read.

    `gpu_ids` are the GPUs of its lease, by the driver's number; `network` leaves it the host's network. `secrets`
    become files of its private /tmp, copied from the open files of these numbers. `shown` are paths that it may read
    at other places than they lie.
    """

    writable: tuple[Path, ...]
    readable: tuple[Path, ...] = ()
    gpu_ids: tuple[str, ...] = ()
    network: bool = False
    secrets: Mapping[str, int] = field(default_factory=dict)
    shown: Mapping[Path, Path] = field(default_factory=dict)


class Bubblewrap:
    """Confines commands on this host for one ranks' interpreter."""

    def __init__(self, python: str, folder: Path, readable: tuple[Path, ...] = ()) -> None:
        """Let runs use the interpreter `python` and read `readable`; `folder` keeps the few files they find in /etc."""
        self._python = python
        self._folder = folder
        self._readable = readable

    def argv(self, command: tuple[str, ...], view: View, cwd: Path) -> tuple[str, ...]:
        """Return the command that runs `command` confined to `view`, in `cwd`. Raises SandboxError."""
        confined = [*self._program(), *_namespaces(view), *_system(), *self._etc()]
        for path in (*self._interpreter, *self._readable):
            confined += ["--ro-bind", str(path), str(path)]
        for path in view.readable:
            confined += ["--ro-bind-try", str(path), str(path)]
        for place, path in sorted(view.shown.items()):
            confined += ["--ro-bind", str(path), str(place)]
        for path in view.writable:
            confined += ["--bind", str(path), str(path)]
        confined += _gpus(view.gpu_ids)
        confined += _secrets(view.secrets)
        return (*confined, "--chdir", str(cwd), "--", *command)

    def check(self) -> None:
        """Run a program confined. Raises SandboxError, which says what the host lacks."""
        probe = self.argv(("/bin/sh", "-c", "test ! -e /etc/shadow"), View(writable=()), Path("/"))
        try:
            done = subprocess.run(
                probe, capture_output=True, text=True, check=False, timeout=_CHECK_TIMEOUT_S, env={"PATH": os.defpath}
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise SandboxError(f"bubblewrap cannot be started ({error}); reinstall it") from error
        if done.returncode != 0:
            reason = " ".join(done.stderr.split())[-300:] or f"exit code {done.returncode}"
            raise SandboxError(
                f"bubblewrap cannot make a sandbox here ({reason}); an unprivileged agent needs user namespaces "
                "(sysctl kernel.unprivileged_userns_clone=1; on Ubuntu also kernel.apparmor_restrict_unprivileged_userns=0)"
            )

    def _program(self) -> list[str]:
        program = shutil.which(PROGRAM)
        if program is None:
            raise SandboxError(
                "bubblewrap is not installed, so strangers' code would not be confined; install it (Debian: apt-get "
                "install bubblewrap), or set sandbox: plain and i_trust_all_tenants: true"
            )
        rules = seccomp.program()
        if rules is None:
            return [program]
        path = self._kept("seccomp.bpf", rules)
        # bubblewrap takes its rules from an open file; the shell opens it and becomes bubblewrap.
        opening = f'exec {_SECCOMP_FD}<"$0" && exec "$@"'
        return ["/bin/sh", "-c", opening, str(path), program, "--seccomp", str(_SECCOMP_FD)]

    def _etc(self) -> list[str]:
        found = []
        for name, content in (("passwd", _PASSWD), ("group", _GROUP), ("hosts", _HOSTS)):
            found += ["--ro-bind", str(self._kept(name, content.encode())), f"/etc/{name}"]
        return found

    def _kept(self, name: str, content: bytes) -> Path:
        path = self._folder / name
        if not path.is_file() or path.read_bytes() != content:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial = path.with_name(f"{name}.partial")
            partial.write_bytes(content)
            partial.replace(path)
        return path

    @functools.cached_property
    def _interpreter(self) -> tuple[Path, ...]:
        """Where the ranks' interpreter and this very package lie, outermost folders alone."""
        asking = "import json, sys; print(json.dumps([sys.prefix, sys.base_prefix, sys.exec_prefix]))"
        try:
            told = subprocess.run(
                [self._python, "-I", "-c", asking],
                capture_output=True,
                check=True,
                timeout=_CHECK_TIMEOUT_S,
                env={"PATH": os.defpath},
            )
            prefixes = [Path(path) for path in json.loads(told.stdout)]
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise SandboxError(f"the interpreter {self._python} does not answer ({error}); mend `python`") from error
        origin = Path(__file__).parents[1]
        roots = {*prefixes, Path(self._python).parent.resolve(), origin / "training", origin / "sites"}
        seen = [path for path in sorted(roots) if not path.is_relative_to("/usr")]
        return tuple(path for path in seen if not any(path != other and path.is_relative_to(other) for other in seen))


def _namespaces(view: View) -> list[str]:
    return [
        *("--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-cgroup-try"),
        *(() if view.network else ("--unshare-net",)),
        *("--disable-userns", "--uid", str(INNER_USER), "--gid", str(INNER_USER), "--hostname", "sandbox"),
        *("--cap-drop", "ALL", "--die-with-parent", "--new-session"),
    ]


def _system() -> list[str]:
    """Return the programs and libraries of the host, read-only, and the file systems that the kernel fills."""
    found = ["--ro-bind", "/usr", "/usr"]
    for name in _MERGED:
        path = Path("/", name)
        if path.is_symlink():
            found += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            found += ["--ro-bind", str(path), str(path)]
    for name in _ETC:
        found += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    return [*found, "--proc", "/proc", "--dev", "/dev", "--size", str(TMP_BYTES), "--tmpfs", "/tmp"]  # noqa: S108  its own


def _secrets(secrets: Mapping[str, int]) -> list[str]:
    """Return the files of secrets, in memory that goes with the sandbox; nothing of the host leads there."""
    if not secrets:
        return []
    found = ["--perms", "0700", "--dir", SECRETS_FOLDER]
    for name, number in sorted(secrets.items()):
        found += ["--perms", "0400", "--file", str(number), f"{SECRETS_FOLDER}/{name}"]
    return found


def _gpus(gpu_ids: tuple[str, ...]) -> list[str]:
    """Return the devices of the lease's GPUs and what the driver's library reads; other GPUs do not exist inside."""
    if not gpu_ids:
        return []
    found = ["--ro-bind-try", "/sys", "/sys"]
    for name in (*_NVIDIA_SHARED, *(f"nvidia{number}" for number in gpu_ids)):
        found += ["--dev-bind-try", f"/dev/{name}", f"/dev/{name}"]
    return found
