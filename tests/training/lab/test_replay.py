"""A run with a death, a moved hub and a late site, over real gateways, replayed from its record; and records that lie."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.training.recorded_run import start_folder, write_run
from tests.training.roundlog.conftest import Federation, wait_until
from tests.training.small_job import SAMPLES, Site, context, model
from training.lab.errors import LabError, ReplayError
from training.lab.kills import Kill, check
from training.lab.replay import replay
from training.lab.replayed import replay_apart
from training.lab.run_record import Fault, RunRecord, new_record
from training.ranks import Ranks
from training.roundlog.client import GatewayClient
from training.roundlog.manifest import read_manifest
from training.roundlog.record import SiteRecord
from training.session import Session

PLAN = {"strategy": "quorum", "quorum_sites": 2, "codec": "int8"}
LIMIT_S = 90.0
# Eight rounds of three sites.
MANY = 2 * SAMPLES
# Each strategy's plan and how many contributions seal a round of three sites.
PLANS: dict[str, tuple[dict[str, Any], int]] = {
    "every_step": ({"codec": "fp32", "period_steps": 1}, 3),
    "diloco": ({"codec": "int8"}, 3),
    "streaming": ({"codec": "int4", "period_steps": 4, "fragments": 2, "overlap_steps": 1, "mixing": 0.5}, 3),
    "sparse": ({"codec": "topk2", "outer_learning_rate": 1.0, "outer_momentum": 0.0}, 3),
    "neighbour": ({"codec": "int8"}, 3),
    "async": ({"codec": "int8", "nesterov_delay": 4}, 1),
}


@dataclass
class Run:
    """A recorded run, and what its survivors ended with."""

    folder: Path
    survivors: tuple[Site, ...]

    @property
    def outer_hash(self) -> str:
        sessions = [each.session for each in self.survivors if each.session is not None]
        return max(sessions, key=lambda session: session.rounds).outer_hash

    def copied(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.folder, folder / "run"))


def ranks_of(federation: Federation, site_id: str, folder: Path, **plan: object) -> Site:
    gateway = federation.sites[site_id]
    exchange = GatewayClient(gateway.config.ranks_socket, gateway.config.patience_s)
    return Site(context(folder, site_id, **(plan or PLAN)), exchange, Ranks(), model())


def run_with_faults(federation: Federation, folder: Path, quorum: int = 2, samples: int = SAMPLES, **asked: Any) -> Run:
    """Three sites: oslo is late for round 2 where the others do not wait, and ams, the hub, dies after round 4."""
    plan = {**(asked or PLAN), "samples": samples}
    ams, bern, oslo = federation.start("ams", "bern", "oslo")
    federation.open(ams, bern, oslo, hub=ams, quorum=quorum)
    hub = ranks_of(federation, "ams", folder, record_dir=start_folder(federation), **plan)
    early, late = ranks_of(federation, "bern", folder, **plan), ranks_of(federation, "oslo", folder, **plan)
    moved = threading.Event()

    def die(session: Session) -> None:
        if session.rounds >= 4:
            raise RuntimeError("killed")

    def dawdle(session: Session) -> None:
        if session.rounds == 1 and quorum < 3:
            wait_until(lambda: oslo.control.status().sealed_round >= 2, "round 2 to be sealed without oslo")

    def pause(session: Session) -> None:
        if session.rounds >= 4:
            assert moved.wait(LIMIT_S)

    hub.step_hook, late.step_hook, early.step_hook = die, dawdle, pause
    threads = {each.attempt.site_id: threading.Thread(target=each.run, daemon=True) for each in (hub, early, late)}
    for thread in threads.values():
        thread.start()
    threads["ams"].join(LIMIT_S)
    assert str(hub.error) == "killed", hub.error
    ams.stop()
    view = federation.reopen(bern, oslo, hub=bern, quorum=min(quorum, 2))
    moved.set()
    for site_id in ("bern", "oslo"):
        threads[site_id].join(LIMIT_S)
    for each in (early, late):
        assert each.error is None, each.error
    fault = Fault(site_id="ams", after_round=4, view_number=view.number)
    return Run(write_run(federation, early, late, samples=samples, faults=(fault,)), (early, late))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    # A Unix socket's path has at most 107 bytes: keep it short.
    federation = Federation(Path(os.path.realpath(tmp_path_factory.mktemp("f"))))
    yield run_with_faults(federation, tmp_path_factory.mktemp("ranks"))
    federation.stop()


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.unlink()  # the record may share its bytes with a gateway's blob
    path.write_bytes(content)


def test_a_run_with_a_death_a_moved_hub_and_a_late_site_replays_to_its_final_hash(run: Run) -> None:
    found = replay(run.folder)
    assert found.outer_hash == run.outer_hash
    assert found.samples_done == SAMPLES
    assert found.views == 2
    assert found.rounds_without_a_member > 0
    assert found.has_end
    assert found.faults == ("ams killed after round 4, view 2 without it",)


@pytest.mark.soak
@pytest.mark.parametrize("strategy", PLANS)
def test_a_run_whose_hub_died_replays_under_every_strategy(
    federation: Federation, tmp_path: Path, strategy: str
) -> None:
    plan, quorum = PLANS[strategy]
    run = run_with_faults(federation, tmp_path, quorum, MANY, strategy=strategy, **plan)
    found = replay(run.folder)
    assert found.samples_done == MANY
    assert found.views == 2
    assert found.outer_hash in {each.session.outer_hash for each in run.survivors if each.session is not None}


@pytest.mark.soak
def test_the_replay_of_the_command_line_says_the_same_from_a_process_of_its_own(run: Run) -> None:
    assert replay_apart(run.folder) == replay(run.folder)


@pytest.mark.parametrize("number", [1, 3])
def test_one_altered_byte_of_a_contribution_is_named_with_its_round_and_site(
    run: Run, tmp_path: Path, number: int
) -> None:
    folder = run.copied(tmp_path)
    sealed = read_manifest(SiteRecord(folder, "bern").manifest_document(number))
    victim = sealed.contributions[-1].header
    flip(folder / "contributions" / victim.digest)
    with pytest.raises(ReplayError, match=rf"^round {number}: the contribution of {victim.site_id} was altered or cut"):
        replay(folder)


def lost(folder: Path, drop: Callable[[int], bool]) -> None:
    for site_id in ("ams", "bern", "oslo"):
        for path in (folder / site_id / "manifests").iterdir():
            if drop(int(path.stem)):
                path.unlink()


def test_a_log_whose_end_was_cut_is_refused_with_the_first_round_that_it_lacks(run: Run, tmp_path: Path) -> None:
    folder = run.copied(tmp_path)
    last = max(session.rounds for each in run.survivors if (session := each.session) is not None)
    lost(folder, lambda number: number >= last)
    ended = rf"^round {last}: its seal is not in the record, but (bern|oslo) ended after round {last}; "
    with pytest.raises(ReplayError, match=ended):
        replay(folder)


def test_a_log_with_a_gap_or_without_its_beginning_is_refused(run: Run, tmp_path: Path) -> None:
    folder = run.copied(tmp_path)
    lost(folder, lambda number: number == 3)
    with pytest.raises(ReplayError, match=r"^round 3: .*is not in the record"):
        replay(folder)
    lost(folder, lambda number: number < 3)
    with pytest.raises(ReplayError, match=r"^round 1: its seal is not in the record, which starts with round 4"):
        replay(folder)


def test_a_seal_that_was_altered_does_not_have_its_hubs_signature(run: Run, tmp_path: Path) -> None:
    folder = run.copied(tmp_path)
    for site_id in ("bern", "oslo"):
        path = folder / site_id / "manifests" / "0000000002.json"
        path.write_text(path.read_text().replace('"signature":"', '"signature":"AAAA', 1))
    with pytest.raises(ReplayError, match=r"^round 2: hub ams: the signature"):
        replay(folder)


def test_another_start_is_found_out_before_the_first_round(run: Run, tmp_path: Path) -> None:
    folder = run.copied(tmp_path)
    flip(folder / "start" / "outer.safetensors")
    with pytest.raises(ReplayError, match=r"^the run's start: its outer state does not have the hash"):
        replay(folder)


def test_a_state_that_a_site_reported_otherwise_is_named_with_its_round(run: Run, tmp_path: Path) -> None:
    folder = run.copied(tmp_path)
    path = folder / "oslo" / "applied.jsonl"
    rows = path.read_text().splitlines()
    third = next(place for place, row in enumerate(rows) if '"round_number":3,' in row)
    rows[third] = rows[third].replace('"outer_hash":"', '"outer_hash":"0123456789ab', 1)[:-14] + '"}'
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(ReplayError, match=r"^round 3: oslo reported another outer state \(0123456789ab"):
        replay(folder)


def test_a_view_that_nobody_signed_vouches_for_nothing(run: Run, tmp_path: Path) -> None:
    folder = run.copied(tmp_path)
    path = folder / "oslo" / "views" / "0000000002.json"
    path.write_text(path.read_text().replace('"signature":"', '"signature":"AAAA', 1))
    with pytest.raises(ReplayError, match="a view in oslo's record: the signature"):
        replay(folder)


def test_contributions_beyond_the_records_limit_are_left_out_and_the_replay_says_where(
    federation: Federation, tmp_path: Path
) -> None:
    federation.record_bytes_max = 1500
    ams, bern = federation.start("ams", "bern")
    federation.open(ams, bern, hub=ams)
    first = ranks_of(federation, "ams", tmp_path, record_dir=start_folder(federation), **PLAN)
    second = ranks_of(federation, "bern", tmp_path)
    threads = [threading.Thread(target=each.run, daemon=True) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    folder = write_run(federation, first, second)
    assert 0 < sum(path.stat().st_size for path in (folder / "contributions").iterdir()) <= 1500
    with pytest.raises(ReplayError, match=r"^round [2-9]: .*whose limit of 1,500 bytes was reached in round"):
        replay(folder)


@pytest.fixture
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = Federation(Path(os.path.realpath(tmp_path_factory.mktemp("f"))))
    yield made
    made.stop()


def test_what_is_no_record_is_refused_and_no_record_is_written_over(run: Run, tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"has no run\.json"):
        replay(tmp_path)
    with pytest.raises(LabError, match="is not empty"):
        new_record(run.folder)
    record = RunRecord.read(run.folder)
    lone = record.model_copy(update={"plan": record.plan.model_copy(update={"strategy": "local"})})
    lone.write(tmp_path)
    with pytest.raises(ReplayError, match="nothing to replay"):
        replay(tmp_path)


def test_kills_name_sites_of_the_run_once_and_leave_one() -> None:
    kill = Kill.parse("site-2@3")
    assert kill == Kill("site-2", 3)
    check([kill], ["site-1", "site-2"])
    for text in ("site-2", "2@3", "site-0@1", "site-2@-1"):
        with pytest.raises(LabError, match="says no kill"):
            Kill.parse(text)
    with pytest.raises(LabError, match="is no site of this run"):
        check([Kill("site-3", 1)], ["site-1", "site-2"])
    with pytest.raises(LabError, match="one has to be left"):
        check([kill, Kill("site-1", 1)], ["site-1", "site-2"])
