"""An operator's wish travels to the site's agent, which says what it made of it; older agents hear nothing of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from broker.bootstrap import open_market
from broker.errors import NotFoundError, RefusedError
from broker.settings import Settings
from broker.wishes import make_wish, read_wish
from sites.protocol import Wish, WishReply
from tests.broker.portal.scene import Agent, _offer
from training.clock import ManualClock


@pytest.fixture
def bremen(tmp_path: Path) -> Agent:
    market = open_market(Settings(home=tmp_path, public_url="http://127.0.0.1"), clock=ManualClock())
    agent = Agent(market, "bremen", _offer("bremen", 4, 900_000, ()))
    agent.join()
    return agent


def test_a_wish_is_said_until_another_stands_and_its_answer_is_kept(bremen: Agent) -> None:
    market = bremen.market
    assert bremen.say(takes_wishes=True).wish is None
    assert make_wish(market, "bremen", {"cpu-slot": 1_000_000}, draining=None) == 1
    wish = Wish(number=1, asks_micros_per_gpu_hour={"cpu-slot": 1_000_000})
    assert bremen.say(takes_wishes=True).wish == wish
    standing = market.database.read(lambda session: read_wish(session, "bremen"))
    assert standing is not None
    assert not standing.is_answered
    assert bremen.say(takes_wishes=True, wish_reply=WishReply(number=1, refused="too low")).wish == wish
    standing = market.database.read(lambda session: read_wish(session, "bremen"))
    assert standing is not None
    assert (standing.is_answered, standing.refused) == (True, "too low")
    assert make_wish(market, "bremen", {}, draining=True) == 2
    late = bremen.say(takes_wishes=True, wish_reply=WishReply(number=1, refused="too low"))
    assert late.wish == Wish(number=2, draining=True)
    standing = market.database.read(lambda session: read_wish(session, "bremen"))
    assert standing is not None
    assert (standing.is_answered, standing.refused) == (False, "")


def test_the_newest_word_on_a_wish_counts(bremen: Agent) -> None:
    """An owner who changes the site's settings starts the agent anew, which judges the same wish again."""
    make_wish(bremen.market, "bremen", {"cpu-slot": 1_000_000}, draining=None)
    bremen.say(takes_wishes=True, wish_reply=WishReply(number=1))
    bremen.say(takes_wishes=True, wish_reply=WishReply(number=1, refused="now outside"))
    standing = bremen.market.database.read(lambda session: read_wish(session, "bremen"))
    assert standing is not None
    assert (standing.is_answered, standing.refused) == (True, "now outside")
    bremen.say()
    standing = bremen.market.database.read(lambda session: read_wish(session, "bremen"))
    assert standing is not None
    assert not standing.is_answered, "a site whose settings allow nothing any more has not taken it"


def test_an_agent_that_takes_no_wishes_is_told_none(bremen: Agent) -> None:
    make_wish(bremen.market, "bremen", {"cpu-slot": 1_000_000}, draining=True)
    assert bremen.say().wish is None


def test_a_wish_that_makes_no_sense_is_refused(bremen: Agent) -> None:
    with pytest.raises(NotFoundError):
        make_wish(bremen.market, "atlantis", {}, draining=True)
    with pytest.raises(RefusedError, match="offers no H100; it offers cpu-slot"):
        make_wish(bremen.market, "bremen", {"H100": 1}, draining=None)
    with pytest.raises(RefusedError, match="below nought"):
        make_wish(bremen.market, "bremen", {"cpu-slot": 2**46}, draining=None)


def test_what_an_older_agent_reads_holds_no_new_field(bremen: Agent) -> None:
    """Both sides refuse unknown fields: an answer without a wish must read as it did before there were any."""
    assert "wish" in json.loads(bremen.say(takes_wishes=True).model_dump_json())
    assert "wish" not in json.loads(bremen.say().model_dump_json(exclude={"wish"}))
