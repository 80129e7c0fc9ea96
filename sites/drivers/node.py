"""Become the warden of one node of a Slurm job: `python -I -S node.py FOLDER`. Standard library only.

srun starts this once per node. What the agent could not know when it wrote FOLDER/run.json is known here: which of the
nodes this is, which GPUs Slurm gave it, where node 0 is. It is put into the command, the result is written as
the run of FOLDER/node-N, and this process becomes that run's warden (warden.py).

    FOLDER/claim          the number of the job that runs here: of two, sent because an answer was lost, one goes
    FOLDER/master.json    where node 0 awaits the other nodes' ranks
    FOLDER/node-N/        as a run of the process driver; the liveness is FOLDER's
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# In words of the command: this node's number, node 0's address and port, and one of the GPUs that Slurm gave.
NODE, ADDRESS, PORT, GPU = "{hansa-node}", "{hansa-address}", "{hansa-port}", "{hansa-gpu}"
LOOPBACK = "127.0.0.1"
# Nodes of a job start within a second of each other; a prolog may take its time.
MASTER_WAIT_S = 60.0
SIOCGIFADDR = 0x8915  # <linux/sockios.h>


def main(folder: Path) -> None:
    """Make this node's run and become its warden."""
    number = int(os.environ["SLURM_NODEID"])
    if (folder / "ended.json").exists() or not _claimed(folder, os.environ["SLURM_JOB_ID"]):
        return  # the agent gave it up, or another job of this run was first
    plan: dict[str, Any] = json.loads((folder / "run.json").read_text())
    own = folder / f"node-{number}"
    exits = folder / "exits" / f"node-{number}"
    try:
        own.mkdir()
    except FileExistsError:
        return  # slurmctld came back with an older state and started the job once more; one warden was here already
    exits.mkdir(parents=True, exist_ok=True)
    is_elsewhere = plan["era"] != Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    if is_elsewhere and plan["socket"] and not plan["relay"]:
        _refuse(
            own,
            f"{socket.gethostname()} is not the agent's host, and the job's gateway listens there; "
            "name the agent's address on the cluster's network as slurm.gateway_host in site.yaml",
        )
        return
    address, port = _master(folder, number, plan["nodes"])
    if port is None:
        _refuse(own, f"node 0 did not say within {MASTER_WAIT_S:.0f} s where it is; look at slurm.log in {folder}")
        return
    gpus = _gpus()
    words = {NODE: str(number), ADDRESS: address, PORT: str(port)}
    argv = expanded(plan["argv"], words, gpus)
    environment = plan["environment"] | _devices(plan["argv"], gpus) | _network(address, plan["nodes"])
    run = plan | {
        "argv": argv,
        "environment": environment,
        "liveness": str(folder / "liveness"),
        "exits": str(exits),
        "log_path": plan["log_path"] if number == 0 else str(own / "output.log"),
        "groups": [],
    }
    _write(own / "run.json", run)
    if plan["relay"]:
        # Here already: a sandbox shows the folder to the ranks, and the relay opens its socket in it at any time.
        Path(plan["ranks_socket"]).parent.mkdir(mode=0o700, exist_ok=True)
        subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("relay.py")), "node", plan["relay"]],
            stdin=subprocess.DEVNULL,
        )
    os.execv(  # noqa: S606 - the warden takes this process's place, so that Slurm's signals reach it
        sys.executable, [sys.executable, "-I", "-S", str(Path(__file__).with_name("warden.py")), str(own)]
    )


def expanded(argv: list[str], words: dict[str, str], gpus: list[str]) -> list[str]:
    """Return `argv` with this node's words in place; an option with two arguments about a GPU is repeated for each."""
    found: list[str] = []
    index = 0
    while index < len(argv):
        if index + 1 < len(argv) and GPU in argv[index + 1]:
            for gpu in gpus:
                found += [word.replace(GPU, gpu) for word in argv[index : index + 3]]
            index += 3
            continue
        word = argv[index]
        for mark, value in words.items():
            word = word.replace(mark, value)
        found.append(word)
        index += 1
    return found


def _claimed(folder: Path, job_id: str) -> bool:
    """Return whether this job is the one that runs here: the first to link its name, with its number already in it."""
    mine = folder / f"claim.{job_id}.{os.environ['SLURM_NODEID']}"
    mine.write_text(job_id)
    try:
        os.link(mine, folder / "claim")
    except FileExistsError:
        pass
    finally:
        mine.unlink(missing_ok=True)
    return (folder / "claim").read_text() == job_id


def _master(folder: Path, number: int, nodes: int) -> tuple[str, int | None]:
    """Return the address and port of node 0; it chooses the port, the others wait to hear."""
    address = LOOPBACK if nodes == 1 else os.environ.get("SLURM_LAUNCH_NODE_IPADDR", LOOPBACK)
    path = folder / "master.json"
    if number == 0:
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = int(probe.getsockname()[1])
        _write(path, {"address": address, "port": port})
        return address, port
    give_up_s = time.monotonic() + MASTER_WAIT_S
    while time.monotonic() < give_up_s:
        try:
            told = json.loads(path.read_text())
            return str(told["address"]), int(told["port"])
        except (OSError, ValueError):
            time.sleep(0.05)
    return address, None


def _gpus() -> list[str]:
    """Return the numbers of the GPUs that Slurm gave this node, as the driver counts them."""
    told = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS") or ""
    return [word for word in told.split(",") if word.isdigit()]


def _devices(argv: list[str], gpus: list[str]) -> dict[str, str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return {}
    # In a sandbox there are no other GPUs, and CUDA counts those that it finds from nought.
    is_confined = any(GPU in word for word in argv)
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(len(gpus)))) if is_confined else visible}


def _network(address: str, nodes: int) -> dict[str, str]:
    """Return the variables by which ranks on several hosts find the interface that leads to node 0."""
    if nodes == 1 or address.startswith("127."):
        return {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing; the kernel chooses the way
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24])
            except OSError:
                continue  # it has no address
            if found == own:
                return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return {}


def _refuse(own: Path, detail: str) -> None:
    now_ms = time.time_ns() // 1_000_000
    status = {"cause": "not_started", "exit_code": None, "detail": detail, "limit": None, "running_s": 0.0}
    _write(own / "status.json", status | {"asked": False, "ended_ms": now_ms})


def _write(path: Path, document: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.touch(mode=0o600)
    partial.write_text(json.dumps(document))
    partial.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
