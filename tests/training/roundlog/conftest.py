"""A federation on loopback: a tiny authority, real gateway processes, and ranks as threads."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sites.identity import private_key_pem
from training.attempt import GatewayConfig
from training.exchange import SampleRange, SealedRound
from training.roundlog.client import GatewayClient
from training.roundlog.control import GatewayControl, GatewayControlError
from training.roundlog.credentials import new_attempt_key, peer_uri
from training.roundlog.gateway import Gateway
from training.roundlog.signing import public_hex
from training.roundlog.view import GENESIS_HASH, Member, View, ViewReport, sign_view

JOB = "job-1"
OUTER = hashlib.sha256(b"outer").hexdigest()
LIMIT_S = 20.0


class Authority:
    """A certificate authority (P-256) and the broker's view-signing key, for tests."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.views = Ed25519PrivateKey.generate()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        now = datetime.now(UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=2))
            .not_valid_after(now + timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def issue(self, key: Ed25519PrivateKey, uri: str, *, ends: timedelta = timedelta(hours=1)) -> bytes:
        now = datetime.now(UTC)
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "site")]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + ends)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .sign(self.key, hashes.SHA256())
            .public_bytes(Encoding.PEM)
        )


@dataclass
class Site:
    """One site: its files, its gateway process, and both of its doors."""

    site_id: str
    folder: Path
    key: Ed25519PrivateKey
    config: GatewayConfig
    epoch: int = 1
    process: subprocess.Popen[bytes] | None = None
    task: asyncio.Task[None] | None = None
    loop: asyncio.AbstractEventLoop | None = None
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4))

    @property
    def client(self) -> GatewayClient:
        return GatewayClient(self.config.ranks_socket, self.config.patience_s)

    @property
    def control(self) -> GatewayControl:
        return GatewayControl(self.config.agent_socket)

    def member(self, weight_max: int = 1000) -> Member:
        return Member(
            site_id=self.site_id,
            epoch=self.epoch,
            gpus=1,
            attempt_key=public_hex(self.key),
            address=self.config.listen,
            weight_max=weight_max,
        )

    def start(self, *, process: bool = False) -> None:
        """Start the gateway: in the federation's loop, or as a process that can be killed."""
        if process:
            self._start_process()
        else:
            assert self.loop is not None
            self.task = asyncio.run_coroutine_threadsafe(self._start_task(), self.loop).result(LIMIT_S)
        wait_until(self._answers, f"gateway {self.site_id} to answer")

    async def _start_task(self) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(Gateway(self.config).run())

    def stop(self) -> None:
        """End a gateway of the federation's loop."""
        assert self.loop is not None
        if (task := self.task) is not None:
            self.loop.call_soon_threadsafe(task.cancel)
            wait_until(task.done, f"gateway {self.site_id} to end")
        self.task = None

    def _start_process(self) -> None:
        with (self.folder / "gateway.log").open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "training.roundlog.gateway", str(self.folder / "gateway.json")],
                stdout=output,
                stderr=output,
            )

    def _answers(self) -> bool:
        assert self.process is None or self.process.poll() is None, (self.folder / "gateway.log").read_text()
        assert self.task is None or not self.task.done(), self.task
        try:
            self.control.status()
        except GatewayControlError:
            return False
        return True

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process = None

    def contribute(
        self,
        round_number: int,
        *,
        payloads: tuple[bytes, ...] | None = None,
        samples: tuple[SampleRange, ...] = (),
        outer_hash: str = OUTER,
        weight: int = 8,
    ) -> None:
        payloads = payloads or self.payloads(round_number)
        for fragment, payload in enumerate(payloads):
            self.client.post_fragment(round_number, fragment, payload)
        self.client.commit(round_number, weight=weight, samples=samples, fragments=len(payloads), outer_hash=outer_hash)

    def payloads(self, round_number: int) -> tuple[bytes, ...]:
        seed = hashlib.sha256(f"{self.site_id}/{round_number}".encode()).digest()
        return (seed * 40, seed[:7] * 50_000)

    def apply(self, round_number: int) -> SealedRound:
        """Do what ranks do with a sealed round; the merged bytes stand for the outer state."""
        sealed = self.client.await_sealed(round_number)
        state = hashlib.sha256()
        for entry in sealed.entries:
            for fragment in entry.fragments:
                state.update(self.client.fetch_fragment(round_number, entry.site_id, fragment))
        self.client.applied(round_number, state.hexdigest())
        return sealed


class Federation:
    """Sites of one job under one authority."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "record"
        self.record_bytes_max = 1 << 30
        self.authority = Authority()
        self.sites: dict[str, Site] = {}
        self._views = 0
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def add(self, site_id: str, *, listens: bool = True, epoch: int = 1, patience_s: float = 15.0) -> Site:
        folder = self.folder / f"{site_id}-{epoch}"
        folder.mkdir()
        key = new_attempt_key()
        (folder / "key.pem").write_bytes(private_key_pem(key))
        (folder / "certificate.pem").write_bytes(self.authority.issue(key, peer_uri(JOB, epoch, site_id)))
        (folder / "ca.pem").write_bytes(self.authority.pem)
        config = GatewayConfig(
            job_id=JOB,
            site_id=site_id,
            epoch=epoch,
            authority_key=public_hex(self.authority.views),
            key_path=str(folder / "key.pem"),
            certificate_path=str(folder / "certificate.pem"),
            ca_path=str(folder / "ca.pem"),
            listen=f"127.0.0.1:{free_port()}" if listens else None,
            ranks_socket=str(folder / "ranks.sock"),
            agent_socket=str(folder / "agent.sock"),
            state_dir=str(folder / "state"),
            metrics_path=str(folder / "metrics.jsonl"),
            contribution_bytes_max=80_000_000,
            record_dir=str(self.record),
            record_bytes_max=self.record_bytes_max,
            patience_s=patience_s,
        )
        (folder / "gateway.json").write_text(config.model_dump_json())
        site = self.sites[site_id] = Site(site_id, folder, key, config, epoch, loop=self.loop)
        return site

    def start(self, *site_ids: str, process: bool = False, listens: bool = True) -> list[Site]:
        sites = [self.add(site_id, listens=listens) for site_id in site_ids]
        for site in sites:
            site.start(process=process)
        return sites

    def view(
        self,
        *sites: Site,
        hub: Site,
        base: tuple[Site, ViewReport] | None = None,
        quorum: int | None = None,
        grace_s: float = 0.0,
        weight_max: int = 1000,
    ) -> View:
        self._views += 1
        return View(
            job_id=JOB,
            number=self._views,
            members=tuple(site.member(weight_max) for site in sorted(sites, key=lambda site: site.site_id)),
            hub=hub.site_id,
            standby=None,
            base_round=base[1].sealed_round if base else 0,
            base_hash=base[1].chain_hash if base else GENESIS_HASH,
            base_reporter=base[0].site_id if base else None,
            quorum=quorum or len(sites),
            grace_s=grace_s,
            issued_ms=0,
        )

    def install(self, view: View, *sites: Site) -> None:
        document = sign_view(view, self.authority.views)
        for site in sites or [self.sites[member.site_id] for member in view.members]:
            site.control.install_view(document)

    def open(self, *sites: Site, hub: Site, quorum: int | None = None, grace_s: float = 0.0) -> View:
        """Install the first view."""
        view = self.view(*sites, hub=hub, quorum=quorum, grace_s=grace_s)
        self.install(view)
        return view

    def reopen(self, *sites: Site, hub: Site, promised: tuple[Site, ...] | None = None, **options: int) -> View:
        """Change the view as the broker does: promises, the highest report, the new view."""
        number = self._views + 1
        reports = [(site, site.control.promise(number)) for site in promised or sites]
        base = max(reports, key=lambda report: report[1].sealed_round)
        view = self.view(*sites, hub=hub, base=base, **options)
        self.install(view)
        return view

    def stop(self) -> None:
        for site in self.sites.values():
            if site.process is not None:
                site.kill()
            if site.task is not None:
                site.stop()
            site.pool.shutdown(wait=False, cancel_futures=True)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def run_round(round_number: int, *sites: Site, samples: bool = True) -> list[SealedRound]:
    """Let the ranks of all sites do one round at the same time."""

    def work(index: int, site: Site) -> SealedRound:
        start = (round_number * 10 + index) * 8
        site.contribute(round_number, samples=(SampleRange(start, start + 8),) if samples else ())
        return site.apply(round_number)

    futures = [site.pool.submit(work, index, site) for index, site in enumerate(sites)]
    return [future.result(LIMIT_S) for future in futures]


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """Ask again until `condition` holds."""
    pause = threading.Event()
    for _ in range(int(limit_s / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    pytest.fail(f"waited {limit_s} s in vain for {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    # A Unix socket's path has at most 107 bytes: keep it short.
    folder = Path(os.path.realpath(tmp_path_factory.mktemp("f")))
    made = Federation(folder)
    yield made
    made.stop()
