"""What a tenant types, against a broker that answers over a socket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import func, select

from broker.database.tables import Job
from broker.database.uploads import WorkdirUpload
from broker.rounds.clear import hold_round
from broker.transitions import FINAL_JOB_STATES
from tests.broker.cli.calling import Broker, Hansa


@pytest.fixture(autouse=True)
def _credits(hansa: Hansa, broker: Broker) -> None:
    if json.loads(hansa("account", "--json").out)["balance_micros"] < 5_000_000:
        assert hansa("admin", "tenant", "deposit", "acme", "10", who="admin").code == 0


def submitted(hansa: Hansa, job_file: Path) -> str:
    outcome = hansa("submit", str(job_file), "--yes", "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)["job_id"]


def test_quote_names_the_place_and_the_price(hansa: Hansa, job_file: Path) -> None:
    outcome = hansa("quote", str(job_file))
    assert outcome.code == 0, outcome.err
    assert "lubeck 2xcpu-slot" in outcome.out
    assert "yes" in outcome.out


def test_a_quote_brings_nothing_to_the_broker(hansa: Hansa, broker: Broker, job_file: Path) -> None:
    (job_file.parent / "train.py").write_text("print('quoted only')\n")
    before = _uploads(broker)
    assert hansa("quote", str(job_file)).code == 0
    assert _uploads(broker) == before
    submitted(hansa, job_file)
    assert _uploads(broker) == before + 1


def test_submitted_job_is_listed_shown_and_cancelled(hansa: Hansa, job_file: Path) -> None:
    job_id = submitted(hansa, job_file)
    assert job_id in hansa("status").out
    shown = hansa("status", job_id)
    assert "waits for the next round" in shown.out
    assert "job queued" in shown.out
    assert hansa("cancel", job_id).out == f"{job_id} is cancelled\n"


def test_cancelling_twice_is_refused_with_the_reason(hansa: Hansa, job_file: Path) -> None:
    job_id = submitted(hansa, job_file)
    assert hansa("cancel", job_id).code == 0
    again = hansa("cancel", job_id)
    assert again.code == 1
    assert "already cancelled" in again.err


def test_the_same_key_never_makes_a_second_job(hansa: Hansa, job_file: Path) -> None:
    first = json.loads(hansa("submit", str(job_file), "-y", "--json", "--key", "once").out)
    second = json.loads(hansa("submit", str(job_file), "-y", "--json", "--key", "once").out)
    assert first["job_id"] == second["job_id"]


def test_submit_without_a_person_to_ask_is_wrong_usage(hansa: Hansa, job_file: Path) -> None:
    outcome = hansa("submit", str(job_file), "--json")
    assert outcome.code == 2
    assert json.loads(outcome.err)["next_step"].startswith("add --yes")


def test_unknown_key_is_refused_with_its_line(hansa: Hansa, job_file: Path) -> None:
    job_file.write_text(job_file.read_text().replace("  budget: 2", "  bugdet: 2"))
    outcome = hansa("quote", str(job_file))
    assert outcome.code == 2
    assert "line 6, /market/bugdet: unknown key 'bugdet'" in outcome.err


def test_missing_job_file_is_wrong_usage(hansa: Hansa, tmp_path: Path) -> None:
    outcome = hansa("submit", str(tmp_path / "none.yaml"), "-y")
    assert outcome.code == 2
    assert "there is no file" in outcome.err


def test_job_that_no_federation_can_hold_is_refused_at_submit(hansa: Hansa, job_file: Path) -> None:
    job_file.write_text(job_file.read_text().replace("cpu-slot:2", "cpu-slot:64"))
    outcome = hansa("submit", str(job_file), "-y", "--json")
    assert outcome.code == 1
    assert json.loads(outcome.err)["code"] == "job.never_possible"


def test_budget_over_the_balance_is_refused_and_says_what_helps(hansa: Hansa, job_file: Path) -> None:
    job_file.write_text(job_file.read_text().replace("budget: 2", "budget: 5000"))
    outcome = hansa("submit", str(job_file), "-y")
    assert outcome.code == 1
    assert "hansa account" in outcome.err


def test_unknown_job_is_exit_code_4(hansa: Hansa) -> None:
    outcome = hansa("status", "job_none")
    assert outcome.code == 4
    assert outcome.err.startswith("hansa: ")
    assert "Traceback" not in outcome.err


def test_job_of_another_tenant_looks_like_none(hansa: Hansa, broker: Broker, job_file: Path) -> None:
    job_id = submitted(hansa, job_file)
    assert hansa("admin", "tenant", "create", "rival", who="admin").code in (0, 1)
    token = json.loads(hansa("admin", "tenant", "token", "rival", "--json", who="admin").out)["token"]
    assert hansa("status", job_id, HANSA_TOKEN=token).code == 4


def test_invoice_of_a_cancelled_job_charges_nothing(hansa: Hansa, job_file: Path) -> None:
    job_id = submitted(hansa, job_file)
    hansa("cancel", job_id)
    document = json.loads(hansa("invoice", job_id, "--json").out)
    assert document["posted_micros"] == 0
    assert "nothing was charged" in hansa("invoice", job_id).out


def test_watching_a_cancelled_job_is_exit_code_6(hansa: Hansa, job_file: Path) -> None:
    job_id = submitted(hansa, job_file)
    hansa("cancel", job_id)
    outcome = hansa("watch", job_id)
    assert outcome.code == 6
    assert "cancelled by its tenant" in outcome.out


def test_fetch_brings_back_the_workdir_to_the_bit(hansa: Hansa, job_file: Path, tmp_path: Path) -> None:
    job_id = submitted(hansa, job_file)
    outcome = hansa("fetch", job_id, "workdir.tar.gz", "-o", str(tmp_path / "out"), "--json")
    assert outcome.code == 0, outcome.err
    fetched = json.loads(outcome.out)["items"][0]
    assert Path(fetched["path"]).stat().st_size == fetched["size_bytes"] > 0


def test_fetch_of_nothing_says_what_there_is(hansa: Hansa, job_file: Path, tmp_path: Path) -> None:
    outcome = hansa("fetch", submitted(hansa, job_file), "model.safetensors", "-o", str(tmp_path))
    assert outcome.code == 4
    assert "workdir.tar.gz" in outcome.err


def test_logs_of_a_waiting_job_are_empty(hansa: Hansa, job_file: Path) -> None:
    outcome = hansa("logs", submitted(hansa, job_file))
    assert (outcome.code, outcome.out) == (0, "")


def test_prices_name_the_ask(hansa: Hansa) -> None:
    assert "lubeck/cpu-slot" in hansa("prices", who="").out
    assert json.loads(hansa("prices", "--json").out)["items"][0]["ask_micros_per_gpu_hour"] == 500_000


def _uploads(broker: Broker) -> int:
    count = select(func.count()).select_from(WorkdirUpload)
    return broker.market.database.read(lambda session: session.scalar(count)) or 0


def test_a_dry_run_shows_the_quote_and_submits_nothing(hansa: Hansa, job_file: Path) -> None:
    before = json.loads(hansa("ls", "--json").out)["items"]
    outcome = hansa("submit", str(job_file), "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "lubeck 2xcpu-slot" in outcome.out
    assert json.loads(hansa("status", "--json").out)["items"] == before


def test_explain_says_what_would_have_placed_a_job_and_that_is_true(
    hansa: Hansa, broker: Broker, job_file: Path
) -> None:
    # Jobs of earlier tests would have the slots by the second round, which the first one's explanation cannot know.
    open_jobs = select(Job.job_id).where(Job.state.not_in(sorted(FINAL_JOB_STATES)))
    for other in broker.market.database.read(lambda session: list(session.scalars(open_jobs))):
        hansa("cancel", other)
    job_file.write_text(job_file.read_text().replace("  budget: 2", "  budget: 2\n  bid: 0.000001"))
    job_id = submitted(hansa, job_file)
    assert "waits for the next round" in hansa("explain", job_id).out
    hold_round(broker.market)
    explained = json.loads(hansa("explain", job_id, "--json").out)
    assert explained["checked"]
    (bid,) = [row for row in explained["changes"] if row["kind"] == "bid"]
    assert f"- {bid['sentence']}" in hansa("explain", job_id).out
    hansa("cancel", job_id)
    enough = bid["bid_micros_per_million_samples"] / 1_000_000
    job_file.write_text(
        job_file.read_text().replace("bid: 0.000001", f"bid: {enough:.6f}").replace("budget: 2", "budget: 5")
    )
    again = submitted(hansa, job_file)
    hold_round(broker.market)
    assert json.loads(hansa("show", again, "--json").out)["state"] == "proposed"
    hansa("cancel", again)


def test_a_budget_is_set_shown_and_lifted(hansa: Hansa) -> None:
    assert "budget   1.5 credits an hour" in hansa("budget", "1.5").out
    assert json.loads(hansa("account", "--json").out)["budget_micros_per_hour"] == 1_500_000
    assert "budget   no bound" in hansa("budget", "none").out
    for amount in ("0", "-1", "much"):
        assert hansa("budget", amount).code == 2
