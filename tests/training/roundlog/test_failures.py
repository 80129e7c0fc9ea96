"""Gateways killed at awkward moments: what survivors keep, and how the log goes on."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
import socket
import threading
from pathlib import Path

import pytest

from training.errors import ExchangeError
from training.exchange import SampleRange
from training.roundlog import replica
from training.roundlog.errors import ExchangeRefusedError

from .conftest import LIMIT_S, OUTER, Federation, Site, run_round, wait_until


def samples(round_number: int, index: int) -> tuple[SampleRange, ...]:
    start = (round_number * 10 + index) * 8
    return (SampleRange(start, start + 8),)


def chain_hashes(*sites: Site) -> set[str]:
    return {site.control.status().chain_hash for site in sites}


def test_hub_killed_in_the_middle_of_a_round_costs_the_survivors_nothing(federation: Federation) -> None:
    one, two, three = federation.start("aachen", "bergen", "cadiz", process=True)
    federation.open(one, two, three, hub=one)
    run_round(1, one, two, three)
    two.contribute(2, samples=samples(2, 1))
    three.contribute(2, samples=samples(2, 2))
    wait_until(lambda: two.control.status().waiting_for == ("aachen",), "the hub to wait for its own site only")
    one.kill()
    wait_until(lambda: two.control.status().hub_lost_s is not None, "bergen to report the hub lost")
    federation.reopen(two, three, hub=two)
    sealed = [site.apply(2) for site in (two, three)]
    assert [entry.site_id for entry in sealed[0].entries] == ["bergen", "cadiz"]
    assert sealed[0].entries[1].samples == samples(2, 2)
    assert [seat.site_id for seat in sealed[0].members] == ["bergen", "cadiz"]
    run_round(3, two, three)
    assert len(chain_hashes(two, three)) == 1
    assert two.control.status().samples_done == 8 * (3 + 2 + 2)


def test_round_known_to_one_survivor_is_the_base_and_others_fetch_it(federation: Federation) -> None:
    one, two, three = federation.start("aachen", "bergen", "cadiz", process=True)
    federation.open(one, two, three, hub=one)
    run_round(1, one, two, three)
    # Cadiz hears nothing of the seal of round 2: its gateway is down by then.
    three.contribute(2, samples=samples(2, 2))
    wait_until(lambda: "cadiz" not in one.control.status().waiting_for, "the hub to hold the contribution of cadiz")
    three.kill()
    run_round(2, one, two)
    one.kill()
    three.start(process=True)
    view = federation.reopen(two, three, hub=three)
    assert (view.base_reporter, view.base_round) == ("bergen", 2)
    # The new hub itself lacked the base: bergen brought it the manifest and the blobs.
    sealed = three.apply(2)
    assert {entry.site_id for entry in sealed.entries} == {"aachen", "bergen", "cadiz"}
    assert three.control.status().outer_hash == two.control.status().outer_hash
    run_round(3, two, three)
    assert len(chain_hashes(two, three)) == 1


def test_member_killed_leaves_the_others_a_reduced_view(federation: Federation) -> None:
    one, two, three = federation.start("aachen", "bergen", "cadiz", process=True)
    federation.open(one, two, three, hub=one)
    run_round(1, one, two, three)
    one.contribute(2, samples=samples(2, 0))
    two.contribute(2, samples=samples(2, 1))
    three.kill()
    wait_until(lambda: one.control.status().waiting_for == ("cadiz",), "the hub to wait for cadiz alone")
    federation.reopen(one, two, hub=one)
    assert [entry.site_id for entry in one.apply(2).entries] == ["aachen", "bergen"]
    two.apply(2)
    run_round(3, one, two)
    assert len(chain_hashes(one, two)) == 1


@pytest.mark.parametrize("role", ["hub", "member"])
def test_gateway_killed_and_started_again_resumes_the_open_round(federation: Federation, role: str) -> None:
    one, two = federation.start("aachen", "bergen", process=True)
    federation.open(one, two, hub=one)
    run_round(1, one, two)
    victim, other = (one, two) if role == "hub" else (two, one)
    victim.contribute(2, samples=samples(2, 0))
    waiting = victim.pool.submit(victim.apply, 2)
    victim.kill()
    victim.start(process=True)
    other.contribute(2, samples=samples(2, 1))
    assert len(other.apply(2).entries) == 2
    # The ranks' own call outlived the gateway that it was made to.
    assert len(waiting.result(20).entries) == 2
    assert victim.control.status().samples_done == 2 * 8 * 2
    run_round(3, one, two)
    assert len(chain_hashes(one, two)) == 1


def test_hub_that_restarts_gets_again_what_it_had_not_sealed(federation: Federation) -> None:
    one = federation.add("aachen")
    one.start(process=True)
    (two,) = federation.start("bergen")
    federation.open(one, two, hub=one)
    two.contribute(1, samples=samples(1, 1))
    wait_until(lambda: one.control.status().waiting_for == ("aachen",), "the hub to hold bergen's contribution")
    one.kill()
    one.start(process=True)
    one.contribute(1, samples=samples(1, 0))
    assert len(two.apply(1).entries) == 2


def test_quorum_seals_without_the_late_site_which_sees_its_absence(federation: Federation) -> None:
    one, two = federation.start("aachen", "bergen")
    federation.open(one, two, hub=one, quorum=1, grace_s=0.05)
    one.contribute(1, samples=samples(1, 0))
    assert [entry.site_id for entry in one.apply(1).entries] == ["aachen"]
    assert [entry.site_id for entry in two.apply(1).entries] == ["aachen"]
    two.contribute(1, samples=samples(1, 1))
    two.contribute(2, samples=samples(1, 1))
    assert [entry.site_id for entry in two.apply(2).entries] == ["bergen"]


def test_single_site_seals_its_own_rounds_without_a_listener(federation: Federation) -> None:
    (one,) = federation.start("aachen", listens=False)
    federation.open(one, hub=one)
    for round_number in (1, 2):
        (sealed,) = run_round(round_number, one)
        assert [entry.site_id for entry in sealed.entries] == ["aachen"]
    assert one.control.status().links == {}


def test_joiner_starts_from_a_peers_snapshot_and_the_rounds_after_it(federation: Federation, tmp_path: Path) -> None:
    one, two, three = federation.start("aachen", "bergen", "cadiz")
    federation.open(one, two, hub=one)
    run_round(1, one, two)
    state = tmp_path / "state"
    state.write_bytes(b"outer state after round 1" * 100_000)
    two.client.offer_snapshot(1, str(state))
    run_round(2, one, two)
    federation.reopen(one, two, three, hub=one, promised=(one, two))
    position = three.client.position()
    assert position.needs_snapshot
    assert [part.stop - part.start for part in position.done] == [16, 16]
    fetched = tmp_path / "fetched"
    assert three.client.fetch_snapshot(str(fetched)) == 1
    assert fetched.read_bytes() == state.read_bytes()
    three.apply(2)
    assert three.control.status().outer_hash == one.control.status().outer_hash
    run_round(3, one, two, three)
    assert len(chain_hashes(one, two, three)) == 1


def test_others_seal_on_until_the_joiner_has_its_state(federation: Federation, tmp_path: Path) -> None:
    one, two, three = federation.start("aachen", "bergen", "cadiz")
    federation.open(one, two, hub=one)
    run_round(1, one, two)
    # No snapshot was offered so far: a quorum of all three would wait for cadiz for ever.
    federation.reopen(one, two, three, hub=one, promised=(one, two))
    here, _ = run_round(2, one, two)
    assert "cadiz" in [seat.site_id for seat in here.members]
    state = tmp_path / "state"
    state.write_bytes(b"outer state after round 2")
    one.client.offer_snapshot(2, str(state))
    assert three.client.fetch_snapshot(str(tmp_path / "fetched")) == 2
    assert len(run_round(3, one, two, three)[0].entries) == 3


def test_nobody_waits_for_a_joiner_that_the_hub_has_not_heard(federation: Federation) -> None:
    one, two, three = federation.start("aachen", "bergen", "cadiz")
    federation.open(one, two, three, hub=one)
    run_round(1, one, two, three)
    federation.reopen(one, two, hub=one)
    # Cadiz is in the view again, but what the broker hears its peers may not.
    report, _ = [site.control.promise(3) for site in (one, two)]
    view = federation.view(one, two, three, hub=one, base=(one, report))
    federation.install(view.model_copy(update={"joining": ("cadiz",)}), one, two)
    assert [entry.site_id for entry in run_round(2, one, two)[0].entries] == ["aachen", "bergen"]
    federation.install(view.model_copy(update={"joining": ("cadiz",)}), three)
    three.apply(2)
    assert len(run_round(3, one, two, three)[0].entries) == 3


def test_ranks_that_start_anew_are_sent_for_a_snapshot(federation: Federation, tmp_path: Path) -> None:
    one, two = federation.start("aachen", "bergen")
    federation.open(one, two, hub=one)
    two.control.ranks_started_anew()
    assert not two.client.position().needs_snapshot  # nothing was applied: they start where the first ones did
    run_round(1, one, two)
    state = tmp_path / "state"
    state.write_bytes(b"outer state after round 1")
    two.client.offer_snapshot(1, str(state))
    two.control.ranks_started_anew()
    position = two.client.position()
    assert (position.needs_snapshot, position.base_round) == (True, 1)
    run_round(2, one)
    assert two.client.fetch_snapshot(str(tmp_path / "fetched")) == 1
    two.apply(2)
    wait_until(lambda: "bergen" in one.control.status().waiting_for, "the hub to hear that bergen has its state")
    assert len(run_round(3, one, two)[0].entries) == 2


def test_frozen_hub_is_lost_within_seconds_and_a_member_is_missed_by_its_hub(federation: Federation) -> None:
    one, two, three = federation.start("aachen", "bergen", "cadiz", process=True)
    federation.open(one, two, three, hub=one)
    run_round(1, one, two, three)
    three.kill()
    wait_until(lambda: "cadiz" in one.control.status().members_lost_s, "the hub to miss cadiz")
    assert "bergen" not in one.control.status().members_lost_s
    # Its host went without a word: no connection breaks, and only silence tells.
    assert one.process is not None
    one.process.send_signal(signal.SIGSTOP)
    try:
        wait_until(lambda: (two.control.status().hub_lost_s or 0.0) >= 1.0, "bergen to miss its silent hub")
    finally:
        one.process.send_signal(signal.SIGCONT)
    wait_until(lambda: two.control.status().hub_lost_s is None, "bergen to hear its hub again")


def test_resumed_job_goes_on_from_its_checkpoint(federation: Federation) -> None:
    (one,) = federation.start("aachen", listens=False)
    view = federation.view(one, hub=one)
    federation.install(view.model_copy(update={"base_round": 7, "base_hash": OUTER}))
    position = one.client.position()
    assert (position.base_round, position.base_hash, position.needs_snapshot) == (7, OUTER, False)
    run_round(8, one)
    assert one.control.status().sealed_round == 8


def test_fragments_beyond_the_jobs_limit_are_refused(federation: Federation) -> None:
    (one,) = federation.start("aachen", listens=False)
    federation.open(one, hub=one)
    for fragment, code in ((0, None), (1, "too_large"), (0, None)):
        with contextlib.nullcontext() if code is None else pytest.raises(ExchangeRefusedError, match="exceed"):
            one.client.post_fragment(1, fragment, bytes(50_000_000))


def test_refused_and_broken_bodies_leave_nothing_on_disk(federation: Federation) -> None:
    (one,) = federation.start("aachen", listens=False)
    federation.open(one, hub=one)
    incoming = Path(one.config.state_dir) / "incoming"
    with pytest.raises(ExchangeRefusedError, match="was not posted"):
        one.client.commit(1, weight=1, samples=(), fragments=2, outer_hash=OUTER)
    too_large = one.config.contribution_bytes_max + 1
    _post_raw(one, f"Content-Length: {too_large}", bytes(too_large))
    # The ranks' process dies in the middle of a body.
    _post_raw(one, "Content-Length: 1000000", bytes(1000))
    wait_until(lambda: list(incoming.iterdir()) == [], "what was refused to be removed")
    run_round(1, one)
    assert list(incoming.iterdir()) == []


def _post_raw(site: Site, header: str, body: bytes) -> bytes:
    """Post a fragment over a bare connection that ends after `body`; return how the answer begins."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(LIMIT_S)
        connection.connect(site.config.ranks_socket)
        connection.sendall(f"PUT /rounds/1/fragments/0 HTTP/1.1\r\nHost: gateway\r\n{header}\r\n\r\n".encode())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(body)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            return connection.recv(100)
    return b""


def test_new_hub_that_just_joined_gets_chain_and_snapshot_from_a_member(federation: Federation, tmp_path: Path) -> None:
    one, two, three = federation.start("aachen", "bergen", "cadiz", process=True)
    federation.open(one, two, hub=one)
    run_round(1, one, two)
    state = tmp_path / "state"
    state.write_bytes(b"outer state after round 1")
    two.client.offer_snapshot(1, str(state))
    run_round(2, one, two)
    one.kill()
    federation.reopen(two, three, hub=three, promised=(two,))
    assert three.client.fetch_snapshot(str(tmp_path / "fetched")) == 1
    three.apply(2)
    run_round(3, two, three)
    assert len(chain_hashes(two, three)) == 1


def test_site_that_missed_the_opening_comes_back_by_snapshot(federation: Federation, tmp_path: Path) -> None:
    one, two, three = federation.start("aachen", "bergen", "cadiz")
    federation.open(one, two, three, hub=one, quorum=1, grace_s=1.0)
    run_round(1, one, two, three)
    federation.reopen(two, three, hub=two)
    # Aachen, cut off, seals and applies a round that never counts.
    one.contribute(2, samples=samples(2, 0))
    assert [entry.site_id for entry in one.apply(2).entries] == ["aachen"]
    state = tmp_path / "state"
    state.write_bytes(b"outer state after round 2")
    run_round(2, two, three)
    two.client.offer_snapshot(2, str(state))
    federation.reopen(one, two, three, hub=two, promised=(two, three))
    with pytest.raises(ExchangeRefusedError) as refused:
        one.client.await_sealed(3)
    assert refused.value.reason == "snapshot.needed"
    assert one.client.position().needs_snapshot
    assert one.client.fetch_snapshot(str(tmp_path / "fetched")) == 2
    run_round(3, one, two, three)
    assert len(chain_hashes(one, two, three)) == 1
    assert one.control.status().samples_by_site == two.control.status().samples_by_site


def test_outer_state_that_differs_is_refused_and_reported(federation: Federation) -> None:
    one, two, three = federation.start("aachen", "bergen", "cadiz")
    federation.open(one, two, three, hub=one)
    run_round(1, one, two, three)
    wrong = hashlib.sha256(b"elsewhere").hexdigest()
    one.contribute(2, samples=samples(2, 0))
    two.contribute(2, samples=samples(2, 1), outer_hash=wrong)
    three.contribute(2, samples=samples(2, 2))
    assert [entry.site_id for entry in one.apply(2).entries] == ["aachen", "cadiz"]
    (report,) = one.control.status().equivocations
    assert (report.site_id, report.about, report.expected, report.named) == ("bergen", "outer", OUTER, wrong)


def test_overlapping_samples_of_one_round_count_once(federation: Federation) -> None:
    one, two = federation.start("aachen", "bergen")
    federation.open(one, two, hub=one)
    one.contribute(1, samples=samples(1, 0))
    two.contribute(1, samples=samples(1, 0))
    assert [entry.site_id for entry in two.apply(1).entries] == ["aachen"]
    assert two.control.status().samples_done == 8


def test_bytes_are_counted_as_they_were_sent(federation: Federation) -> None:
    one, two, three = federation.start("aachen", "bergen", "cadiz")
    federation.open(one, two, three, hub=one)
    run_round(1, one, two, three)
    size = sum(len(payload) for payload in one.payloads(1))
    links = {site.site_id: site.control.status().links for site in (one, two, three)}
    for site_id in ("bergen", "cadiz"):
        assert (links[site_id]["aachen"].bytes_sent, links[site_id]["aachen"].bytes_received) == (size, 2 * size)
        assert (links["aachen"][site_id].bytes_sent, links["aachen"][site_id].bytes_received) == (2 * size, size)


class BreakingRelay:
    """A TCP relay that breaks every connection off after some bytes, in the middle of a chunk."""

    def __init__(self, target: str, bytes_before_break: int) -> None:
        self._target, self._bytes = target, bytes_before_break
        self.breaks = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._target.rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        left = self._bytes

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            nonlocal left
            while left > 0 and (piece := await source.read(65536)):
                left -= len(piece)
                sink.write(piece)
                await sink.drain()

        with contextlib.suppress(ConnectionError):
            pumps = [asyncio.ensure_future(pump(reader, far_writer)), asyncio.ensure_future(pump(far_reader, writer))]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump_task in pumps:
                pump_task.cancel()
        self.breaks += left <= 0
        for either in (writer, far_writer):
            either.transport.abort()


def test_transfers_resume_when_connections_break_in_the_middle(federation: Federation) -> None:
    one, two = federation.start("aachen", "bergen")
    assert one.config.listen is not None
    relay = BreakingRelay(one.config.listen, 2_500_000)
    address = asyncio.run_coroutine_threadsafe(relay.start(), federation.loop).result(10)
    view = federation.view(one, two, hub=one)
    hub, member = view.members
    federation.install(view.model_copy(update={"members": (hub.model_copy(update={"address": address}), member)}))
    big = hashlib.sha256(b"big").digest() * 400_000
    one.contribute(1, payloads=(big[::-1],))
    two.contribute(1, payloads=(big,))
    two.client.await_sealed(1)
    assert one.client.fetch_fragment(1, "bergen", 0) == big
    assert two.client.fetch_fragment(1, "aachen", 0) == big[::-1]
    assert relay.breaks >= 5
    asyncio.run_coroutine_threadsafe(relay.stop(), federation.loop).result(10)


def test_ranks_get_an_error_after_patience(federation: Federation) -> None:
    one = federation.add("aachen", patience_s=0.5)
    two = federation.add("bergen")
    one.start(process=True)
    two.start()
    federation.open(one, two, hub=one)
    one.contribute(1)
    with pytest.raises(ExchangeError, match="patience"):
        one.client.await_sealed(1)
    one.kill()
    with pytest.raises(ExchangeError, match="patience"):
        one.client.await_sealed(1)


def test_commit_may_be_repeated_but_not_changed(federation: Federation) -> None:
    one, two = federation.start("aachen", "bergen")
    federation.open(one, two, hub=one)
    one.contribute(1)
    one.contribute(1)
    with pytest.raises(ExchangeRefusedError) as refused:
        one.contribute(1, weight=9)
    assert refused.value.reason == "contribution.changed"
    with pytest.raises(ExchangeRefusedError) as refused:
        one.client.post_fragment(3, 0, b"x")
    assert refused.value.reason == "round.future"


def test_measurements_become_json_lines(federation: Federation) -> None:
    (one,) = federation.start("aachen", listens=False)
    one.client.report({"loss": 2.5, "nan": float("nan")})
    line = Path(one.config.metrics_path).read_text()
    assert line.count("\n") == 1
    assert '"loss":2.5' in line
    assert '"nan":null' in line


def test_a_round_sealed_while_a_commit_is_being_joined_goes_on_without_it(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = federation.start("aachen", "bergen")
    federation.open(one, two, hub=one, quorum=1)
    join = replica._join
    held = threading.Event()

    def join_late(paths: list[Path], joined: Path, bytes_max: int) -> object:
        if "aachen" in str(joined):
            held.set()
            wait_until(lambda: one.control.status().sealed_round == 1, "the round to be sealed by the other site")
            wait_until(lambda: not any(path.exists() for path in paths), "what was posted to be dropped")
        return join(paths, joined, bytes_max)

    monkeypatch.setattr(replica, "_join", join_late)
    late = one.pool.submit(one.contribute, 1)
    assert held.wait(LIMIT_S)
    two.contribute(1)
    late.result(LIMIT_S)
    assert [entry.site_id for entry in one.apply(1).entries] == ["bergen"]
