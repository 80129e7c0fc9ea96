from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.training.memory_log import MemoryLog
from tests.training.small_job import run, seats, site
from training.economy import LADDER, affordable_codec
from training.throughput import CODEC_RATIOS


def test_without_a_cap_the_plan_stands() -> None:
    assert affordable_codec("int8", None, posted_bytes=10**12, elements_left=1e12) == ("int8", "")


@given(
    planned=st.sampled_from(LADDER),
    cap_gb=st.floats(1e-3, 100),
    posted=st.integers(0, 10**11),
    left=st.floats(1, 1e12),
)
def test_the_least_lossy_codec_that_fits_is_taken_and_never_a_less_compressed_one(
    planned: str, cap_gb: float, posted: int, left: float
) -> None:
    codec, reason = affordable_codec(planned, cap_gb, posted_bytes=posted, elements_left=left)  # type: ignore[arg-type]
    choices = LADDER[LADDER.index(planned) :]  # type: ignore[arg-type]
    fitting = [each for each in choices if left * 4 / CODEC_RATIOS[each] <= cap_gb * 1e9 - posted]
    assert codec == (fitting[0] if fitting else choices[-1])
    assert bool(reason) == (codec != planned)


def test_a_codec_off_the_ladder_is_left_alone() -> None:
    assert affordable_codec("sign", 1e-9, posted_bytes=0, elements_left=1e9) == ("sign", "")


def test_a_job_with_a_cap_stays_below_it_and_sites_still_agree(tmp_path: Path) -> None:
    """60 rounds of 83 values would take 20 kB as fp32; headers of small fragments are part of it."""
    free, capped = MemoryLog(seats("ams", "oslo")), MemoryLog(seats("ams", "oslo"))
    run(*(site(free, tmp_path / "free", name, samples=960) for name in ("ams", "oslo")))
    sites = [site(capped, tmp_path / "capped", name, samples=960, max_egress_gb=16e-6) for name in ("ams", "oslo")]
    run(*sites)
    posted = [
        sum(len(each) for by_site in log.contributions.values() for each in by_site["ams"].fragments.values())
        for log in (free, capped)
    ]
    assert posted[0] > 16_000 >= posted[1]
    assert capped.hashes_agree()
    magics = {part[:4] for by_site in capped.contributions.values() for part in by_site["ams"].fragments.values()}
    assert len(magics) > 1, "the codec changed while the job ran"
    assert sites[0].session is not None
    assert sites[0].session._synchronizer is not None
    assert sites[0].session._synchronizer.posted_bytes == posted[1]
