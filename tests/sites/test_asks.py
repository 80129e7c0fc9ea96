"""What a site asks: its base, and the owner's rules by time, load, power and carbon."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sites.asks import (
    OVERRIDES_FILE,
    AskBook,
    AskPart,
    AskRules,
    PricedPool,
    ask_at,
    first_gpus,
    parse_curve,
    read_overrides,
    read_power,
    write_overrides,
)
from sites.errors import AskError, SettingsError
from sites.settings import load_settings
from sites.site_cli import app
from tests.sites.conftest import StartAgent
from tests.sites.market import Market
from tests.sites.test_settings import GOOD, write

NOON = dt.datetime(2030, 1, 7, 12, tzinfo=dt.UTC)  # a Monday
BASE = (AskPart(gpus=8, price="1"), AskPart(gpus=8, price="1.5"))  # type: ignore[arg-type]  # as people write it
POWER = "time,price,carbon\n2030-01-07T00:00Z,0.10,400\n2030-01-07T18:00Z,0.40,100\n"


def asked(
    rules: dict[str, object], moment: dt.datetime = NOON, lent: float = 0.0, power: Path | None = None
) -> list[int]:
    figures = None if power is None else read_power(power)
    found = ask_at(BASE, AskRules.model_validate(rules), figures, moment, lent)
    return [part.price for part in found.curve]


def test_without_rules_the_base_is_asked() -> None:
    assert asked({}) == [1_000_000, 1_500_000]


def test_a_schedule_counts_in_its_own_zone() -> None:
    rules = {"zone": "Europe/Berlin", "schedule": [{"days": "mon-fri", "from": "08:00", "to": "20:00", "factor": 2}]}
    at = [NOON.replace(hour=hour) for hour in (6, 7, 18, 19)]
    assert [asked(rules, moment)[0] for moment in at] == [1_000_000, 2_000_000, 2_000_000, 1_000_000]
    assert asked(rules, NOON + dt.timedelta(days=5)) == asked({})


@pytest.mark.parametrize(("lent", "first"), [(0.0, 1_000_000), (0.49, 1_000_000), (0.5, 1_100_000), (1.0, 2_000_000)])
def test_the_more_is_lent_the_more_is_asked(lent: float, first: int) -> None:
    assert asked({"utilisation": [{"from": 0.5, "factor": 1.1}, {"from": 0.9, "factor": 2}]}, lent=lent)[0] == first


def test_power_and_its_carbon_come_on_top(tmp_path: Path) -> None:
    (tmp_path / "power.csv").write_text(POWER)
    rules = {"power": {"file": "power.csv", "kw_per_gpu": 0.5, "carbon_price": "0.1"}}
    # 0.5 kW x (0.10 + 0.4 kg x 0.1) credits per kWh, and in the evening 0.5 x (0.40 + 0.1 x 0.1)
    at = [asked(rules, NOON.replace(hour=hour), power=tmp_path / "power.csv")[0] for hour in (12, 18)]
    assert at == [1_070_000, 1_205_000]
    late = asked(rules, NOON + dt.timedelta(days=3), power=tmp_path / "power.csv")[0]
    assert late == 1_000_000 + round(0.5 * (400_000 + 400 * 100)), "without a figure the dearest of the file is asked"


def test_a_broken_file_of_overrides_leaves_what_was_asked_before(tmp_path: Path) -> None:
    pool = PricedPool("A100", 16, BASE, AskRules())
    book = AskBook([pool], tmp_path)
    write_overrides(tmp_path, {"A100": parse_curve("2.50", 16)})
    assert book.asks([pool], NOON, {})["A100"].curve[0].price == 2_500_000
    (tmp_path / OVERRIDES_FILE).write_text("{")
    assert book.asks([pool], NOON, {})["A100"].curve[0].price == 2_500_000
    with pytest.raises(AskError, match="delete it"):
        read_overrides(tmp_path)


def test_an_ask_stays_within_what_the_owner_names_and_rises_strictly() -> None:
    assert asked({"lowest": 2}) == [2_000_000]
    assert asked({"highest": "1.2"}) == [1_000_000, 1_200_000]
    flattened = ask_at(BASE, AskRules.model_validate({"lowest": 2}), None, NOON, 0)
    assert [(part.gpus, part.price) for part in flattened.curve] == [(16, 2_000_000)]


def test_the_cheapest_gpus_are_lent_first() -> None:
    assert [(part.gpus, part.price) for part in first_gpus(BASE, 10)] == [(8, 1_000_000), (2, 1_500_000)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "1 to"),
        ("time,price\n2030-01-07T00:00,0.1\n", "line 2: the time needs its zone"),
        ("time,price\n2030-01-07T00:00Z,cheap\n", "line 2"),
        ("time,cost\n2030-01-07T00:00Z,1\n", "no column 'price'"),
        ("time,price\n2030-01-07T00:00Z,-1\n", "between 0 and a million"),
        ("time,price\n2030-01-07T00:00Z,NaN\n", "line 2"),
        ("time,price\n2030-01-07T01:00Z,1\n2030-01-07T00:00Z,1\n", "line 3: times must rise"),
    ],
)
def test_a_power_file_that_makes_no_sense_is_told(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "power.csv").write_text(text)
    with pytest.raises(AskError, match=words):
        read_power(tmp_path / "power.csv")


@pytest.mark.parametrize("text", ["cheap", "8:1", "8:1,8:1", "8:2,8:1", "9:1,8:2", "-1", "0:1,16:2", "8:,8:1"])
def test_an_ask_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(AskError, match="is no ask"):
        parse_curve(text, 16)


def test_a_broken_power_file_leaves_what_it_said_before(tmp_path: Path) -> None:
    path = tmp_path / "power.csv"
    path.write_text(POWER)
    rules = AskRules.model_validate({"power": {"file": str(path), "kw_per_gpu": 1}})
    pool = PricedPool("A100", 16, BASE, rules)
    book = AskBook([pool], tmp_path)
    assert book.asks([pool], NOON, {})["A100"].curve[0].price == 1_100_000
    path.write_text("nonsense")
    assert book.asks([pool], NOON, {})["A100"].curve[0].price == 1_100_000
    path.write_text(POWER.replace("0.10", "0.20"))
    assert book.asks([pool], NOON, {})["A100"].curve[0].price == 1_200_000


def test_faulty_rules_are_told_with_their_line(tmp_path: Path) -> None:
    text = GOOD.replace("    ask: 0.25", "    ask: 0.25\n    ask_rules:\n      schedule: [{days: mon, factor: -1}]")
    with pytest.raises(SettingsError, match=r"line 8, pools.0.ask_rules.schedule.0.factor"):
        load_settings(write(tmp_path, text))


def test_the_command_sets_shows_and_takes_back(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)

    def ask(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["ask", *words, "--settings", str(path)])
        return result.exit_code, result.output

    code, output = ask("cpu-slot", "1:0.5,1:0.75")
    assert code == 0, output
    assert "1 at 0.50 then 1 at 0.75" in output
    pools = json.loads(ask("--json")[1])["pools"]
    assert [pool["gpu_type"] for pool in pools] == ["cpu-slot", "A100"]
    assert len(pools[0]["hours"]) == 25
    assert (pools[0]["set_here"], pools[1]["set_here"]) == (True, False)
    assert "1 at 0.50 then" not in ask("cpu-slot", "--clear")[1]
    for words in (("H100", "1"), ("cpu-slot", "x"), ("cpu-slot",), ("--clear",), ("cpu-slot", "1", "--clear")):
        code, output = ask(*words)
        assert (code, "[ask.invalid]" in output) == (1, True), words


def test_the_agent_offers_what_was_set_without_being_started_anew(
    market: Market, start_agent: StartAgent, tmp_path: Path
) -> None:
    agent = start_agent()
    assert agent.tick()
    assert market.heartbeats[-1].offer.pools[0].ask_micros_per_gpu_hour == 500_000
    result = CliRunner().invoke(app, ["ask", "cpu-slot", "0.8", "--settings", str(tmp_path / "site.yaml")])
    assert result.exit_code == 0, result.output
    assert agent.tick()
    assert market.heartbeats[-1].offer.pools[0].ask_micros_per_gpu_hour == 800_000
