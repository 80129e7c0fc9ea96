from __future__ import annotations

import datetime as dt
import itertools

import pytest
from pydantic import ValidationError

from sites.hours import Hours

NIGHTS = {"zone": "Europe/Berlin", "open": [{"days": "mon-fri", "from": "20:00", "to": "07:00"}]}


def at(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text)


@pytest.mark.parametrize(
    ("moment", "is_open"),
    [
        ("2030-01-07T18:59Z", False),  # a Monday; Berlin is an hour ahead in winter
        ("2030-01-07T19:00Z", True),
        ("2030-01-08T05:59Z", True),
        ("2030-01-08T06:00Z", False),
        ("2030-07-08T18:00Z", True),  # and two in summer
        ("2030-01-12T05:00Z", True),  # Saturday's small hours belong to Friday's window
        ("2030-01-12T20:00Z", False),
    ],
)
def test_a_night_belongs_to_the_day_on_which_it_began(moment: str, is_open: bool) -> None:  # noqa: FBT001
    assert Hours.model_validate(NIGHTS).covers(at(moment)) is is_open


def test_what_is_open_and_what_is_closed_fill_the_time() -> None:
    hours = Hours.model_validate(NIGHTS)
    begins, ends = at("2030-03-25T00:00Z"), at("2030-04-05T00:00Z")  # over the change of clocks
    spans = sorted([*hours.spans(begins, ends), *hours.closed(begins, ends)])
    assert spans[0][0] == begins
    assert spans[-1][1] == ends
    assert all(sooner[1] == later[0] for sooner, later in itertools.pairwise(spans))


def test_the_next_opening_is_told() -> None:
    hours = Hours.model_validate(NIGHTS)
    assert hours.next_opening(at("2030-01-12T12:00Z")) == at("2030-01-14T19:00Z")
    assert hours.next_opening(at("2030-01-07T20:00Z")) == at("2030-01-07T20:00Z")


def test_times_are_read_as_yaml_leaves_them() -> None:
    hours = Hours.model_validate({"open": [{"from": 1200, "to": "24:00"}]})  # YAML 1.1 reads 20:00 as 1200
    assert [hours.covers(at(f"2030-01-07T{hour}:30Z")) for hour in ("19", "20", "23")] == [False, True, True]


@pytest.mark.parametrize(
    "document",
    [
        {"open": [{"from": "25:00"}]},
        {"open": [{"from": "8 o'clock"}]},
        {"open": [{"from": 8, "to": 20}]},  # eight minutes past midnight is not what was meant
        {"open": [{"days": "monday"}]},
        {"open": []},
        {"zone": "Hanse/Lubeck", "open": [{}]},
        {"zone": "../etc/passwd", "open": [{}]},
    ],
)
def test_times_that_make_no_sense_are_refused(document: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Hours.model_validate(document)
