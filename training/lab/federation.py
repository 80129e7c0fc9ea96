"""A federation on this machine: real gateways with mutual TLS, on loopback or an emulated network, and a job's ranks, several for a site if asked.

What the broker does for a job, here done once at the start: an authority, a certificate for each site, one signed view. Between
the sites everything is as in the market; there is no market.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Final, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from training.attempt import ATTEMPT_ENVIRONMENT, AttemptContext, GatewayConfig
from training.lab.authority import Authority
from training.lab.errors import LabError
from training.lab.run_record import START, Fault, RunRecord, SiteEnd
from training.lab.wan import Wan
from training.roundlog.control import GatewayControl, GatewayControlError
from training.roundlog.credentials import new_attempt_key, peer_uri
from training.roundlog.signing import SignedDocument, public_hex
from training.roundlog.view import GENESIS_HASH, Member, View, ViewReport, sign_view
from training.spec import SITES_PER_JOB_MAX, JobSpec, SyncPlan, split_run

JOB_ID: Final = "lab"
# Of one site, all on this machine.
RANKS_MAX: Final = 16
_READY_S: Final = 30.0
_END_S: Final = 10.0
# Every site of an emulated network has all ports to itself.
_WAN_PORT: Final = 7600
_LOG_TAIL_BYTES: Final = 2000
_CONTRIBUTION_ROOM_BYTES: Final = 1 << 20
_METRICS_LINE_MAX: Final = 100_000
# Of the contributions that a record keeps, in all.
RECORD_BYTES_MAX: Final = 4 << 30


@dataclass(slots=True)
class Site:
    """One site of the laboratory: its folder, its gateway and its ranks."""

    site_id: str
    folder: Path
    key: Ed25519PrivateKey
    address: str
    gateway: subprocess.Popen[bytes] | None = None
    ranks: list[subprocess.Popen[bytes]] = field(default_factory=list)
    is_lost: bool = False

    @property
    def metrics(self) -> Path:
        """What its first rank reported, one JSON object a line."""
        return self.folder / "metrics.jsonl"

    @property
    def control(self) -> GatewayControl:
        """The gateway's door for its agent, which here is the laboratory."""
        return GatewayControl(str(self.folder / "agent.sock"))

    def log_tail(self) -> str:
        """Return the end of what its ranks and its gateway printed."""
        parts = []
        for name in (*(_rank_log(rank) for rank in range(len(self.ranks))), "gateway.log"):
            path = self.folder / name
            text = path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace") if path.exists() else ""
            if text.strip():
                parts.append(f"{name}: {text.strip()}")
        return "\n".join(parts)


@dataclass(slots=True)
class Federation:
    """The sites of one job. Use it as a context manager: its processes and its folder end with it."""

    spec: JobSpec
    plan: SyncPlan
    workdir: Path
    seed: int
    wan: Wan | None = None
    ranks: int = 1
    connections: int | None = None
    record: Path | None = None
    record_bytes_max: int = RECORD_BYTES_MAX
    sites: list[Site] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    _authority: Authority = field(default_factory=Authority)
    _view_number: int = 1
    _folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="hansa-lab-")))
    _pause: Event = field(default_factory=Event)

    @classmethod
    def of(
        cls,
        spec: JobSpec,
        plan: SyncPlan,
        workdir: Path,
        *,
        sites: int,
        seed: int,
        wan: Wan | None = None,
        ranks: int = 1,
        connections: int | None = None,
        record: Path | None = None,
        record_bytes_max: int = RECORD_BYTES_MAX,
    ) -> Self:
        """Prepare `sites` sites of `ranks` ranks each, named as `site_names` says, with folders and credentials.

        They speak over loopback, or over `wan`, which has sites of those names; a gateway moves a blob over so many
        `connections`, else over as many as in the market. Their round log is kept in the folder `record`, if one is named, with
        at most `record_bytes_max` of contributions.
        """
        assert 1 <= sites <= SITES_PER_JOB_MAX, sites
        assert 1 <= ranks <= RANKS_MAX, ranks
        federation = cls(spec, plan, workdir, seed, wan, ranks, connections, record, record_bytes_max)
        for site_id in site_names(sites):
            federation.sites.append(federation._site(site_id))
        federation.write_record()
        return federation

    @property
    def living(self) -> list[Site]:
        """The sites that have not been killed."""
        return [site for site in self.sites if not site.is_lost]

    def __enter__(self) -> Self:
        """Start the gateways, give them their view, and start the ranks. Raises LabError."""
        try:
            self.start_gateways()
            self.start_ranks()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End every process and remove the folder."""
        self.close()

    def start_gateways(self) -> None:
        """Start the gateways alone and give them their view; `close` ends them. Raises LabError."""
        for site in self.sites:
            site.gateway = self._process(
                site, "gateway.log", "-m", "training.roundlog.gateway", str(site.folder / "gateway.json")
            )
        view = sign_view(self._view(), self._authority.views)
        for site in self.sites:
            self._install_view(site, view)

    def start_ranks(self) -> None:
        """Start the script at every site; the gateways run."""
        script = split_run(self.spec.run)
        for site in self.sites:
            seats = self._seats()
            for rank, seat in enumerate(seats):
                log = _rank_log(rank)
                site.ranks.append(self._process(site, log, "-P", "-m", "training.launch", *script, seat=seat))

    def _seats(self) -> list[dict[str, str]]:
        """Return what torchrun would tell each rank of one site."""
        if self.ranks == 1:
            return [{}]
        # In an emulated network each site has a loopback of its own.
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(self.ranks)}
        group["GLOO_SOCKET_IFNAME"] = "lo"
        return [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(self.ranks)]

    def close(self) -> None:
        """End every process and remove the folder."""
        running = [each for site in self.sites for each in (*site.ranks, site.gateway) if each is not None]
        for process in running:
            if process.poll() is None:
                process.terminate()
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            if process.poll() is None:
                process.kill()
                process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def running(self) -> bool:
        """Return whether a rank still runs. Raises LabError where one, or a gateway that is needed, failed."""
        alive = False
        for site in self.living:
            assert site.ranks
            assert site.gateway is not None
            codes = [rank.poll() for rank in site.ranks]
            alive = alive or None in codes
            failed = [code for code in codes if code]
            if failed:
                raise LabError(f"the script of {site.site_id} ended with exit code {failed[0]}\n{site.log_tail()}")
            if None in codes and site.gateway.poll() is not None:
                raise LabError(f"the gateway of {site.site_id} ended before its job did\n{site.log_tail()}")
        return alive

    def wait(self, seconds: float) -> None:
        """Let the sites work for a while."""
        self._pause.wait(seconds)

    def samples_done(self) -> int:
        """Return the samples that the first living site has seen sealed."""
        rows = read_rows(self.living[0].metrics)
        return int(rows[-1].get("samples_done") or 0) if rows else 0

    def kill(self, site_id: str, *, after_round: int) -> None:
        """Kill all processes of a site at once, and open a view without it, as the broker does when its lease has ended.

        If it was the hub, the first of the others is from then on. Raises LabError where no other site is left.
        """
        lost = next(site for site in self.living if site.site_id == site_id)
        lost.is_lost = True
        if not self.living:
            raise LabError(f"{site_id} is the last site of the run; a killed run has nothing to go on with")
        for process in (*lost.ranks, lost.gateway):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        self._view_number += 1
        reports = [(site.control.promise(self._view_number), site) for site in self.living]
        base = max(reports, key=lambda report: report[0].sealed_round)
        view = sign_view(self._view(base), self._authority.views)
        for site in self.living:
            site.control.install_view(view)
        self.faults.append(Fault(site_id=site_id, after_round=after_round, view_number=self._view_number))
        self.write_record()

    def write_record(self, *, ended: bool = False) -> None:
        """Write the run's document beside its log, where one is kept; with its end, where every living site has `ended`."""
        if self.record is None:
            return
        ends = {}
        for site in self.living if ended else ():
            told = json.loads((site.folder / "output/summary.json").read_text())
            ends[site.site_id] = SiteEnd(round_number=told["rounds"], outer_hash=told["outer_hash"])
        RunRecord(
            job=self.spec.name,
            job_id=JOB_ID,
            seed=self.seed,
            sites=tuple(site.site_id for site in self.sites),
            plan=self.plan,
            samples=self.spec.market.workload.samples,
            authority_key=public_hex(self._authority.views),
            contribution_bytes_max=self._contribution_bytes_max,
            record_bytes_max=self.record_bytes_max,
            faults=tuple(self.faults),
            ends=ends,
        ).write(self.record)

    @property
    def _contribution_bytes_max(self) -> int:
        return 4 * self.spec.market.workload.parameters + _CONTRIBUTION_ROOM_BYTES

    def _site(self, site_id: str) -> Site:
        authority = self._authority
        folder = self._folder / site_id
        for name in ("checkpoint", "output", "state"):
            (folder / name).mkdir(parents=True)
        site = Site(site_id, folder, new_attempt_key(), self._address(site_id))
        pem = site.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _write_private(folder / "key.pem", pem)
        (folder / "certificate.pem").write_bytes(authority.issued(site.key, peer_uri(JOB_ID, 1, site_id)))
        (folder / "ca.pem").write_bytes(authority.pem)
        workload = self.spec.market.workload
        context = AttemptContext(
            job_id=JOB_ID,
            site_id=site_id,
            epoch=1,
            gpus=self.ranks,
            seed=self.seed,
            workload=workload,
            sync=self.plan,
            ranks_socket=str(folder / "ranks.sock"),
            checkpoint_dir=str(folder / "checkpoint"),
            output_dir=str(folder / "output"),
            # All sites start from equal parameters, which their first contributions prove: one of them writes them down.
            record_dir=str(self.record / START) if self.record is not None and not self.sites else None,
        )
        gateway = GatewayConfig(
            job_id=JOB_ID,
            site_id=site_id,
            epoch=1,
            authority_key=public_hex(authority.views),
            key_path=str(folder / "key.pem"),
            certificate_path=str(folder / "certificate.pem"),
            ca_path=str(folder / "ca.pem"),
            listen=site.address,
            ranks_socket=context.ranks_socket,
            agent_socket=str(folder / "agent.sock"),
            state_dir=str(folder / "state"),
            metrics_path=str(site.metrics),
            contribution_bytes_max=self._contribution_bytes_max,
            record_dir=None if self.record is None else str(self.record),
            record_bytes_max=self.record_bytes_max,
            patience_s=self.plan.patience_s,
        )
        if self.connections is not None:
            gateway = gateway.model_copy(update={"connections": self.connections})
        (folder / "attempt.json").write_text(context.model_dump_json())
        (folder / "gateway.json").write_text(gateway.model_dump_json())
        return site

    def _address(self, site_id: str) -> str:
        return f"127.0.0.1:{_free_port()}" if self.wan is None else f"{self.wan.address(site_id)}:{_WAN_PORT}"

    def _view(self, base: tuple[ViewReport, Site] | None = None) -> View:
        """Return the view of the living sites, which goes on after the `base` that one of them reported."""
        workload = self.spec.market.workload
        members = tuple(
            Member(
                site_id=site.site_id,
                epoch=1,
                gpus=self.ranks,
                attempt_key=public_hex(site.key),
                address=site.address,
                weight_max=self.plan.period_steps * workload.batch_per_gpu * self.ranks,
            )
            for site in self.living
        )
        return View(
            job_id=JOB_ID,
            number=self._view_number,
            members=members,
            hub=members[0].site_id,
            standby=None,
            base_round=base[0].sealed_round if base else 0,
            base_hash=base[0].chain_hash if base else GENESIS_HASH,
            base_reporter=base[1].site_id if base else None,
            quorum=self.plan.quorum_of(len(members)),
            grace_s=self.plan.grace_s if self.plan.strategy == "quorum" else 0.0,
            issued_ms=0,
        )

    def _install_view(self, site: Site, document: SignedDocument) -> None:
        for _ in range(int(_READY_S / 0.05)):
            assert site.gateway is not None
            if site.gateway.poll() is not None:
                break
            try:
                site.control.install_view(document)
            except GatewayControlError:
                self._pause.wait(0.05)
            else:
                return
        raise LabError(f"the gateway of {site.site_id} did not start\n{site.log_tail()}")

    def _process(
        self, site: Site, log: str, *arguments: str, seat: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        roots = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
        environment = {
            **os.environ,
            **self.spec.envs,
            "PYTHONPATH": roots,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            ATTEMPT_ENVIRONMENT: str(site.folder / "attempt.json"),
            **(seat or {}),
        }
        command = (sys.executable, *arguments)
        with (site.folder / log).open("wb") as output:
            return subprocess.Popen(
                command if self.wan is None else self.wan.argv(site.site_id, command),
                cwd=self.workdir,
                env=environment,
                stdout=output,
                stderr=output,
            )


def _rank_log(rank: int) -> str:
    return f"rank-{rank}.log" if rank else "rank.log"


def site_names(count: int) -> list[str]:
    """Return the names of so many sites."""
    return [f"site-{number}" for number in range(1, count + 1)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file so far; a last line that is still being written is left out."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n") and len(line) < _METRICS_LINE_MAX]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_private(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
