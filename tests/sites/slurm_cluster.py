"""A private Slurm cluster for tests: munged, slurmctld and two slurmd of this host, with GPUs that are none.

Slurm takes any character device for a GPU, so terminals stand in. All runs as this user, in a folder of its own, on ports
of its own; a second cluster beside it does no harm.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from sites.drivers.slurm_queue import run_slurm
from sites.errors import DriverError
from tests.sites.waiting import wait_until

NODES: Final = 2
GPUS_PER_NODE: Final = 4
_SBIN: Final = "/usr/sbin:/sbin:/usr/local/sbin"
_NEEDED: Final = ("munged", "slurmctld", "slurmd", "sbatch")

_CONF: Final = """
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_min_interval=1000
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
NodeName={name}-n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=16 RealMemory=64000 Gres=gpu:h100:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 OverSubscribe=NO
PartitionName=spot Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
"""


class Cluster:
    """Two nodes of four GPUs, partitions `main` and, preempted by it, `spot`."""

    def __init__(self, folder: Path) -> None:
        """Write its configuration; nothing is started."""
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self._path = f"{os.defpath}:{_SBIN}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        port = _free_ports(NODES + 1)
        self.name = f"test{port}"
        (folder / "state").mkdir()
        (folder / "munge").mkdir(mode=0o700)
        key = folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        self.conf.write_text(
            _CONF.format(
                name=self.name,
                host=socket.gethostname().partition(".")[0],
                port=port,
                first=port + 1,
                last=port + NODES,
                user=pwd.getpwuid(os.getuid()).pw_name,
                folder=folder,
                nodes=NODES,
                gpus=GPUS_PER_NODE,
            )
        )
        (folder / "gres.conf").write_text(
            f"NodeName={self.name}-n[1-{NODES}] Name=gpu Type=h100 File=/dev/tty[0-{GPUS_PER_NODE - 1}]\n"
        )

    def start(self) -> None:
        """Start all of it and wait until both nodes are idle."""
        munge = self.folder / "munge"
        self._start(
            "munged",
            *("-F", "--force", "--num-threads=2", f"--key-file={munge / 'key'}", f"--pid-file={munge / 'pid'}"),
            *(
                f"--socket={self.folder / 'munge.socket'}",
                f"--log-file={munge / 'log'}",
                f"--seed-file={munge / 'seed'}",
            ),
        )
        wait_until((self.folder / "munge.socket").exists, 10)
        self.start_controller("-c")
        for number in range(1, NODES + 1):
            self.start_node(number)
        wait_until(lambda: self._idle_nodes() == NODES, 20)

    def start_controller(self, *options: str) -> None:
        """Start slurmctld, from what it had saved unless told otherwise."""
        self._start("slurmctld", "-D", "-f", str(self.conf), *options)

    def start_node(self, number: int) -> None:
        """Start the slurmd of one node."""
        self._start(f"slurmd-{number}", "-D", "-N", f"{self.name}-n{number}", "-f", str(self.conf))

    def end(self, name: str) -> None:
        """End one daemon, as an upgrade does: munged, slurmctld, slurmd-1, slurmd-2."""
        self._processes[name].terminate()
        self._processes[name].wait(20)

    def stop(self) -> None:
        """End all jobs, then the daemons."""
        with contextlib.suppress(DriverError, AssertionError):
            run_slurm(["scancel", f"--user={pwd.getpwuid(os.getuid()).pw_name}"])
            wait_until(lambda: not run_slurm(["squeue", "--noheader"]).strip(), 15)
        for process in reversed(self._processes.values()):
            process.kill()
            process.wait()

    def _idle_nodes(self) -> int:
        with contextlib.suppress(DriverError):
            return int(run_slurm(["sinfo", "--noheader", "-t", "idle", "-p", "main", "-o", "%D"]).strip() or 0)
        return 0

    def _start(self, name: str, *arguments: str) -> None:
        program = shutil.which(name.partition("-")[0], path=self._path)
        assert program is not None
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [program, *arguments],
                stdout=log,
                stderr=log,
                env={"PATH": self._path, "SLURM_CONF": str(self.conf)},
                start_new_session=True,
            )


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Yield a running cluster; SLURM_CONF names it to Slurm's commands meanwhile."""
    missing = [name for name in _NEEDED if shutil.which(name, path=f"{os.defpath}:{_SBIN}") is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}; on Debian: sudo apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="hansa-slurm-", dir="/tmp"))
    folder.chmod(0o755)
    cluster = Cluster(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.conf))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
    shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> int:
    """Return the first of `count` ports in a row that nobody uses now."""
    while True:
        first = 20_000 + secrets.randbelow(10_000)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
