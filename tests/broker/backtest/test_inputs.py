from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from broker.backtest.bids import BidRule, draw_bids
from broker.backtest.errors import BacktestError, OptionError, SitesError, TableError, TraceError
from broker.backtest.policies import policies
from broker.backtest.sites import federation, read_sites
from broker.backtest.throughput import read_throughput
from broker.backtest.trace import read_trace, use_percentile
from broker.backtest.workload import HALF, SAME, TWICE
from tests.broker.backtest.small import HEADER, sites_of, table, trace_of, workload_of, write_trace


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("2017-10-09 07:01:55,-5,1,a", "line 3: duration is -5"),
        ("2017-10-09 07:01:55,nan,1,a", "line 3: duration is nan"),
        ("2017-10-09 07:01:55,soon,1,a", "line 3: duration 'soon' is not a number"),
        ("yesterday,5,1,a", "line 3: timestamp 'yesterday'"),
        ("2017-10-09 07:01:55,5,0,a", "line 3: num_gpus is 0"),
        ("2017-10-09 07:01:55,5,1.5,a", "line 3: num_gpus '1.5'"),
        ("2017-10-09 07:01:55,5,1,", "line 3: cluster is empty"),
        ("2017-10-09 07:01:55,5,1", "line 3: 3 fields"),
        ("2017-10-09 07:01:55,1e12,1,a", "line 3: duration is 1e12"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(tmp_path: Path, row: str, words: str) -> None:
    path = write_trace(tmp_path, "2017-10-09 07:01:55,5,1,a", row)
    with pytest.raises(TraceError, match=words):
        read_trace(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        (HEADER + "\n", "the trace has no jobs"),
        ("timestamp,duration,cluster\n1,1,a\n", "'num_gpus' is missing"),
        (HEADER + ",colour\n1,1,1,a,red\n", "unknown column 'colour'"),
        (HEADER + ",cluster\n1,1,1,a,b\n", "'cluster' stands twice"),
        (HEADER + "\n1,1,1," + "a" * 500 + "\n", "line 2: a field is longer"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=words):
        read_trace(path)


def test_bytes_that_are_no_text_and_a_cut_archive_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    for content in (b"\xff\xfe\x00" * 50, gzip.compress(b"timestamp,duration\n" * 5000)[:-20]):
        path.write_bytes(content)
        with pytest.raises(TraceError):
            read_trace(path)


def test_plain_and_gzipped_traces_read_alike_in_order_of_arrival(tmp_path: Path) -> None:
    path = write_trace(tmp_path, "200,5,1,a", "100,7,2,b")
    packed = tmp_path / "trace.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    plain, unpacked = read_trace(path), read_trace(packed)
    assert plain.cluster == unpacked.cluster == ["b", "a"]
    assert plain.arrival_s.tolist() == unpacked.arrival_s.tolist() == [100.0, 200.0]


def test_a_capacity_is_the_percentile_of_the_clusters_own_use_over_time(tmp_path: Path) -> None:
    # 2 GPUs for 60 s, 3 for 30 s, 1 for 10 s.
    trace = trace_of(tmp_path, "0,90,2,a", "60,40,1,a")
    assert [use_percentile(trace, "a", percent) for percent in (5, 50, 70, 71, 100)] == [1, 2, 2, 3, 3]


def test_a_capacity_holds_the_largest_own_job(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, "0,10000,1,a", "5,1,6,a")
    path = tmp_path / "sites.yaml"
    path.write_text("capacity_percentile: 50\nsites: [{name: a, gpu_type: slow, ask: '1'}]")
    assert federation(read_sites(path), trace).capacity.tolist() == [6]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sites: [", "line 1"),
        ("sites: []", "sites"),
        ("sites: [{name: a, gpu_type: slow}]", "ask"),
        ("sites: [{name: a, gpu_type: slow, ask: '1', colour: red}]", "colour"),
        ("sites: [{name: a, gpu_type: slow, ask: cheap}]", "not an amount"),
        ("sites: [{name: a, gpu_type: slow, ask: '-1'}]", "above 0"),
        ("sites: [{name: z, gpu_type: slow, ask: '1'}]", "'z' has no job"),
        ("sites: [{name: a, gpu_type: s, ask: '1'}, {name: a, gpu_type: s, ask: '1'}]", "twice"),
        ("capacity_percentile: 0\nsites: [{name: a, gpu_type: slow, ask: '1'}]", "capacity_percentile"),
    ],
)
def test_a_sites_file_that_does_not_fit_is_refused(tmp_path: Path, text: str, words: str) -> None:
    trace = trace_of(tmp_path, "0,5,1,a")
    path = tmp_path / "sites.yaml"
    path.write_text(text)
    with pytest.raises(SitesError, match=words):
        federation(read_sites(path), trace)


def test_a_gpu_type_that_the_table_lacks_is_named(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, "0,5,1,a")
    with pytest.raises(TableError, match=r"'h900'.*slow, fast"):
        workload_of(trace, sites_of(trace, a=("h900", "1", 4)), table(tmp_path))


@pytest.mark.parametrize(("column", "value"), [("gpu_types", "slow|h900"), ("model", "unknown-net")])
def test_a_row_with_an_unknown_type_or_model_is_named_by_its_line(tmp_path: Path, column: str, value: str) -> None:
    path = write_trace(tmp_path, "0,5,1,a,", f"1,5,1,a,{value}", header=f"{HEADER},{column}")
    trace = read_trace(path)
    with pytest.raises(TraceError, match=r"trace.csv line 3: .*(h900|unknown-net)"):
        workload_of(trace, sites_of(trace, a=("slow", "1", 4)), table(tmp_path))


def test_a_table_with_a_bad_row_is_refused_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    for row, words in (
        ("slow,maybe,net,1,1", "maybe"),
        ("slow,yes,net,1,-1", "0 or more"),
        ("slow,yes,net,one,1", "whole"),
    ):
        path.write_text(f"gpu_type,consolidated,job_type,gpus,steps_per_s\n{row}\n")
        with pytest.raises(TableError, match=f"line 2.*{words}"):
            read_throughput(path)


def test_policies_are_checked_by_name() -> None:
    assert policies("fcfs, market,fcfs") == ["fcfs", "market"]
    with pytest.raises(OptionError, match=r"'magic'.*alone"):
        policies("alone,magic")
    with pytest.raises(BacktestError):
        policies(" , ")


def test_work_takes_the_traced_time_at_home_and_other_options_follow_the_table(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, "0,100,4,a", "0,100,16,a", "0,100,1,a")
    sites = sites_of(trace, a=("slow", "1", 16), b=("fast", "2", 16)) if "b" in trace.cluster else None
    trace = trace_of(tmp_path, "0,100,4,a", "0,100,16,a", "0,100,1,a", "0,1,1,b")
    sites = sites_of(trace, a=("slow", "1", 16), b=("fast", "2", 16))
    work = workload_of(trace, sites, table(tmp_path))
    slow, fast = sites.gpu_types.index("slow"), sites.gpu_types.index("fast")
    assert work.rate[:3, SAME, slow].tolist() == [1.0, 1.0, 1.0]
    assert work.rate[0, SAME, fast] == pytest.approx(3.0)
    assert work.rate[0, HALF, slow] == pytest.approx(1.8 / 3.2)
    assert work.rate[0, TWICE, fast] == pytest.approx(18 / 3.2)
    assert work.rate[1, SAME, fast] == pytest.approx(12 / 5)
    assert work.counts[1].tolist() == [0, 16, 0]
    assert work.value[0, SAME, slow] == 4 * 2 * 1_000_000


def test_bids_follow_their_rule_and_their_seed(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, *(f"{60 * job},5,1,a" for job in range(200)), "90000,5,1,a")
    asks = trace.gpus * 1_000_000
    assert set(draw_bids(trace, asks, BidRule.FLAT, 3).tolist()) == {2_000_000}
    drawn = draw_bids(trace, asks, BidRule.LOGNORMAL, 3)
    assert drawn.tolist() == draw_bids(trace, asks, BidRule.LOGNORMAL, 3).tolist()
    assert drawn.tolist() != draw_bids(trace, asks, BidRule.LOGNORMAL, 4).tolist()
    # One burst of a minute apart is one user; a day later is another.
    assert len(set(draw_bids(trace, asks, BidRule.PER_USER, 3).tolist())) == 2
