from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sites import metering
from sites.journal import AttemptRecord, Delivered, Journal
from sites.protocol import Usage
from training.roundlog.control import GatewayStatus, LinkBytes
from training.roundlog.view import GENESIS_HASH


def record() -> AttemptRecord:
    return AttemptRecord(
        lease_id="lease_a", epoch=3, job_id="job", tenant_id="t", gpu_type="A100", gpu_ids=("0", "1"), order=None
    )


def status(samples: int, sent: dict[str, int]) -> GatewayStatus:
    return GatewayStatus(
        view_number=1,
        promised=0,
        sealed_round=0,
        chain_hash=GENESIS_HASH,
        applied_round=0,
        outer_hash=None,
        needs_snapshot=False,
        samples_done=samples * 2,
        hub_lost_s=None,
        waiting_for=(),
        links={site: LinkBytes(bytes_sent=count, bytes_received=9) for site, count in sent.items()},
        equivocations=(),
        samples_by_site={"hamburg": samples, "bremen": samples},
    )


def test_row_holds_what_was_delivered_since_the_last() -> None:
    first = metering.cut(record(), metering.delivered(record(), 1.5, status(10, {"bremen": 100}), "hamburg"), 17)
    assert first is not None
    assert first[1] == Usage(
        lease_id="lease_a",
        epoch=3,
        sequence=1,
        gpu_milliseconds=3000,
        samples=10,
        ended_ms=17,
        egress_bytes={"bremen": 100},
    )
    now = metering.delivered(first[0], 2.0, status(10, {"bremen": 150, "kiel": 5}), "hamburg")
    second = metering.cut(first[0], now, 18)
    assert second is not None
    assert (second[1].sequence, second[1].gpu_milliseconds, second[1].samples) == (2, 1000, 0)
    assert second[1].egress_bytes == {"bremen": 50, "kiel": 5}
    assert metering.cut(second[0], now, 19) is None


def test_ranks_that_started_anew_are_metered_on_top_of_the_former_ones() -> None:
    first = metering.cut(record(), metering.delivered(record(), 5.0, None, "hamburg"), 17)
    assert first is not None
    # What the lost run did after its last row is nobody's to charge.
    anew = first[0].model_copy(update={"ranks_run": 2, "gpu_milliseconds_before": first[0].delivered.gpu_milliseconds})
    second = metering.cut(anew, metering.delivered(anew, 1.0, None, "hamburg"), 18)
    assert second is not None
    assert second[1].gpu_milliseconds == 2000


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 10**9), st.booleans()), max_size=20))
def test_rows_add_up_to_the_most_that_was_ever_seen(readings: list[tuple[float, int, bool]]) -> None:
    """Whatever is lost between (a gateway's state, a warden), nothing is counted twice or taken back."""
    current, rows = record(), []
    for running_s, samples, answers in readings:
        reading = metering.delivered(current, running_s, status(samples, {}) if answers else None, "hamburg")
        row = metering.cut(current, reading, 0)
        if row is not None:
            current = row[0]
            rows.append(row[1])
    assert [row.sequence for row in rows] == list(range(1, len(rows) + 1))
    most = max((int(running_s * 1000) * 2 for running_s, _, _ in readings), default=0)
    assert sum(row.gpu_milliseconds for row in rows) == most
    assert sum(row.samples for row in rows) == max((s for _, s, answers in readings if answers), default=0)


def test_row_and_record_are_kept_together_or_not_at_all(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    row = metering.cut(record(), Delivered(gpu_milliseconds=5), 0)
    assert row is not None
    journal.cut(*row)
    changed = row[0].model_copy(update={"usage_sequence": 99})
    with pytest.raises(Exception, match="UNIQUE"):
        journal.cut(changed, row[1])  # the number is used already
    assert [entry.usage_sequence for entry in journal.attempts()] == [1]
    assert journal.usage() == [row[1]]
    assert journal.drop_usage("lease_a") == 1
    assert journal.drop_usage("lease_a") is None
    journal.close()


def test_epochs_only_rise(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    for epoch in (2, 5, 3):
        journal.fence("job", epoch)
    journal.close()
    assert Journal(tmp_path / "journal").epochs() == {"job": 5}
