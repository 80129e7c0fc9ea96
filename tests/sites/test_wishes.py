"""What the portal asks for changes an offer only as far as the site's own settings allow."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from sites import inventory
from sites.errors import SettingsError
from sites.inventory import Measured, Terms
from sites.policy import Policy
from sites.protocol import Heartbeat, Wish
from sites.settings import SiteSettings, load_settings
from sites.wishes import WISH_FILE, judge, keep_wish, kept_wish

TEXT = """
site_id: hamburg
folder: here
pools:
  - {gpu_type: cpu-slot, gpus: 2, ask: 0.20}
  - {gpu_type: A100, gpus: 4, ask: [{gpus: 3, price: 1.10}, {gpus: 1, price: 1.60}]}
"""
REMOTE = "remote: {asks: {A100: {least: 1.00, most: 2.00}}}\n"


def settings_of(folder: Path, text: str) -> SiteSettings:
    path = folder / "site.yaml"
    path.write_text(text)
    return load_settings(path)


def asks(settings: SiteSettings) -> dict[str, list[int]]:
    offer = inventory.offer(
        settings, Measured(), Terms(Policy(), {}, draining=False, now=dt.datetime(2029, 1, 1, tzinfo=dt.UTC))
    )
    return {
        pool.gpu_type: [pool.ask_micros_per_gpu_hour, *(step.ask_micros_per_gpu_hour for step in pool.ask_steps)]
        for pool in offer.pools
    }


def test_an_ask_inside_its_range_is_offered_and_the_curve_keeps_its_shape(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, TEXT + REMOTE)
    judged = judge(settings, Wish(number=3, asks_micros_per_gpu_hour={"A100": 1_500_000}))
    assert asks(judged.settings) == {"cpu-slot": [200_000], "A100": [1_500_000, 2_000_000]}
    assert judged.reply is not None
    assert (judged.reply.number, judged.reply.refused) == (3, "")


def test_an_ask_outside_its_range_or_without_one_is_refused_and_named(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, TEXT + REMOTE)
    wish = Wish(number=1, asks_micros_per_gpu_hour={"A100": 2_000_001, "cpu-slot": 1}, draining=True)
    judged = judge(settings, wish)
    assert asks(judged.settings) == asks(settings)
    assert not judged.draining
    assert judged.reply is not None
    for said in ("A100 at 2.000001 is outside 1.00 to 2.00", "the ask of cpu-slot", "remote.drain"):
        assert said in judged.reply.refused


def test_without_the_owners_leave_nothing_is_taken(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, TEXT)
    judged = judge(settings, Wish(number=1, asks_micros_per_gpu_hour={"A100": 1_500_000}, draining=True))
    assert (judged.settings, judged.draining, judged.reply) == (settings, False, None)


def test_a_site_is_drained_where_its_owner_allows_it(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, TEXT + "remote: {drain: true}\n")
    assert judge(settings, Wish(number=1, draining=True)).draining
    assert not judge(settings, Wish(number=2, draining=False)).draining


def test_a_wish_outlives_the_agent_but_not_the_owners_leave(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, TEXT + REMOTE)
    settings.folder.mkdir()
    assert kept_wish(settings) is None
    wish = Wish(number=1, asks_micros_per_gpu_hour={"A100": 1_500_000})
    keep_wish(settings, wish)
    assert kept_wish(settings) == wish
    narrower = settings_of(tmp_path, TEXT + REMOTE.replace("2.00", "1.40"))
    assert asks(judge(narrower, kept_wish(narrower)).settings) == asks(settings)
    (settings.folder / WISH_FILE).write_text("{")
    assert kept_wish(settings) is None


def test_a_range_is_for_a_type_that_the_site_offers(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="names H100, which no pool"):
        settings_of(tmp_path, TEXT + "remote: {asks: {H100: {least: 1, most: 2}}}\n")
    with pytest.raises(SettingsError, match="most must not be below least"):
        settings_of(tmp_path, TEXT + "remote: {asks: {A100: {least: 2, most: 1}}}\n")


def test_an_agent_that_takes_no_wishes_says_nothing_new() -> None:
    """An older broker refuses fields that it does not know."""
    offer = inventory.Offer(pools=())
    said = Heartbeat(agent_version="1", boot="b", offer=offer).model_dump(exclude_defaults=True)
    assert not {"takes_wishes", "wish_reply"} & set(said)
