"""A site's operator in the portal: sees that site and no other, tries asks, wishes for them, drains."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from broker.errors import NotFoundError
from broker.identity.passwords import Role, UserTermsError, create_user
from broker.portal import ACCESS
from broker.portal.blueprint import Access
from broker.wishes import read_wish
from sites.protocol import WishReply
from tests.broker.portal.conftest import Client, Visitor
from tests.broker.portal.scene import PASSWORD, Scene

pytestmark = pytest.mark.xdist_group("portal")


def test_an_operator_belongs_to_a_site_that_is_there(scene: Scene) -> None:
    with pytest.raises(UserTermsError):
        create_user(scene.market, "nils@example.org", PASSWORD, Role.OPERATOR)
    with pytest.raises(UserTermsError):
        create_user(scene.market, "nils@example.org", PASSWORD, Role.ADMIN, site_id="bremen")
    with pytest.raises(NotFoundError, match="no site 'atlantis'"):
        create_user(scene.market, "nils@example.org", PASSWORD, Role.OPERATOR, site_id="atlantis")


def test_the_site_shows_what_it_earned_and_runs(operator: Visitor) -> None:
    operator.visit("/")
    expect(operator.page).to_have_url(f"{operator.address}/site")
    expect(operator.page.locator(".chart[data-drawn=yes] canvas")).to_have_count(2)
    main = operator.page.locator("main")
    expect(main).to_contain_text("earned in 24 h")
    expect(main).to_contain_text("4 cpu-slot")
    expect(main).to_contain_text("in the federation")
    operator.page.get_by_role("link", name="Statement").click()
    expect(operator.page.get_by_role("heading", name="Statement of bremen")).to_be_visible()
    expect(operator.page.locator("tbody tr")).to_have_count(1)


def test_an_ask_is_tried_then_wished_for_and_answered_by_the_site(operator: Visitor, scene: Scene) -> None:
    operator.visit("/site")
    operator.page.get_by_label("cpu-slot").fill("1000")
    operator.page.get_by_role("button", name="Try on recent rounds").click()
    expect(operator.page.get_by_role("status")).to_contain_text("with 0 GPUs sold instead of 4")
    assert _wish(scene) is None
    operator.page.get_by_label("cpu-slot").fill("1.25")
    operator.page.get_by_role("button", name="Ask the site to take them").click()
    expect(operator.page.locator("main")).to_contain_text("The site has not answered yet")
    wish = scene.agents["bremen"].say(takes_wishes=True).wish
    assert wish is not None
    assert wish.asks_micros_per_gpu_hour == {"cpu-slot": 1_250_000}
    scene.agents["bremen"].say(takes_wishes=True, wish_reply=WishReply(number=wish.number))
    operator.visit("/site")
    expect(operator.page.locator("main")).to_contain_text("Taken by the site.")
    operator.page.get_by_role("button", name="Drain").click()
    drained = scene.agents["bremen"].say(takes_wishes=True).wish
    assert drained is not None
    assert (drained.draining, drained.asks_micros_per_gpu_hour) == (True, {"cpu-slot": 1_250_000})
    operator.page.get_by_role("button", name="Back to the asks").click()
    reset = scene.agents["bremen"].say(takes_wishes=True).wish
    assert reset is not None
    assert (reset.draining, reset.asks_micros_per_gpu_hour) == (True, {})


def test_an_ask_that_is_no_amount_is_refused_in_its_place(operator: Visitor) -> None:
    operator.visit("/site")
    operator.page.get_by_label("cpu-slot").fill("cheap")
    operator.page.get_by_role("button", name="Try on recent rounds").click()
    expect(operator.page.get_by_role("alert")).to_contain_text("the ask of cpu-slot")
    operator.errors = [error for error in operator.errors if "422" not in error]  # the browser names the refusal


def test_an_operator_sees_no_other_role_s_pages(client_of: dict[str, Client], scene: Scene) -> None:
    olga = client_of["olga"].client
    for path in ("/jobs", f"/jobs/{scene.jobs['spanning']}", "/admin/sites/bremen", "/admin/rounds", "/jobs/new"):
        assert olga.get(path).status_code == 403, path
    pages = [endpoint for endpoint, access in ACCESS.items() if access is Access.OPERATOR]
    assert len(pages) >= 5
    for name in ("ada", "root"):
        assert client_of[name].client.get("/site").status_code == 403
        assert client_of[name].client.get("/site/delivery.json").status_code == 403


def test_nothing_of_another_site_or_of_a_bid_stands_on_the_page(client_of: dict[str, Client]) -> None:
    page = client_of["olga"].client.get("/site").text
    assert "danzig" not in page
    assert "lubeck" not in page
    assert "bid" not in page.replace("forbid", "")


def _wish(scene: Scene) -> object:
    return scene.market.database.read(lambda session: read_wish(session, "bremen"))
