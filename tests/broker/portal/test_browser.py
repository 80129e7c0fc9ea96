"""What people see and do in the portal, in a real browser."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect
from sqlalchemy import select

from broker.database.tables import Event
from broker.freeze import FrozenError, require_open
from broker.identity.errors import LoginError
from broker.identity.passwords import verify_login
from tests.broker.portal.conftest import Visitor
from tests.broker.portal.scene import HOSTILE, PASSWORD, Scene

pytestmark = pytest.mark.xdist_group("portal")

WIDTHS = (390, 820, 1280)
TENANT_PAGES = ("/jobs", "/jobs/{spanning}", "/jobs/{left-out}", "/jobs/new", "/jobs/new?by=file", "/market")
ADMIN_PAGES = (
    "/admin/sites",
    "/admin/sites/bremen",
    "/admin/links",
    "/admin/rounds",
    "/admin/rounds/1",
    "/admin/replay",
    "/admin/forecasts",
    "/admin/tenants",
    "/admin/accounts",
    "/admin/ledger?audit=1",
    "/jobs/{spanning}",
)
OPERATOR_PAGES = ("/site", "/site/statement", "/market")
# Where a person wants to look at the pages: a folder named here gets a picture of each at each width.
PICTURES = os.environ.get("HANSA_TEST_PICTURES", "")


def test_a_person_signs_in_and_out(visitor: Visitor) -> None:
    visitor.visit("/jobs")
    expect(visitor.page).to_have_url(f"{visitor.address}/sign-in?next=/jobs")
    visitor.page.get_by_label("Name").fill("ada@example.org")
    visitor.page.get_by_label("Password").fill(PASSWORD)
    visitor.page.get_by_role("button", name="Sign in").click()
    expect(visitor.page).to_have_url(f"{visitor.address}/jobs")
    expect(visitor.page.get_by_role("link", name="spanning")).to_be_visible()
    visitor.page.get_by_role("button", name="Sign out").click()
    expect(visitor.page.get_by_role("heading", name="Sign in")).to_be_visible()
    visitor.visit("/jobs")
    expect(visitor.page.get_by_role("heading", name="Sign in")).to_be_visible()


def test_a_job_page_shows_its_curves_where_it_runs_and_why(tenant: Visitor, scene: Scene) -> None:
    tenant.visit(f"/jobs/{scene.jobs['spanning']}")
    expect(tenant.page.locator(".chart[data-drawn=yes] canvas")).to_have_count(2)
    main = tenant.page.locator("main")
    expect(main).to_contain_text("4 cpu-slot at bremen + 2 cpu-slot at danzig")
    expect(main).to_contain_text("credits an hour")
    expect(main).to_contain_text("80.0 MB")
    expect(main).to_contain_text("step 40 loss 2.125")
    expect(main).to_contain_text("queued → proposed")


def test_a_job_that_waits_says_why(tenant: Visitor, scene: Scene) -> None:
    tenant.visit(f"/jobs/{scene.jobs['left-out']}")
    expect(tenant.page.locator("main")).to_contain_text("would reach it")


def test_a_job_that_waits_is_told_what_would_start_it(tenant: Visitor, scene: Scene) -> None:
    tenant.visit(f"/jobs/{scene.jobs['left-out']}")
    tenant.page.get_by_role("link", name="What would start it?").click()
    expect(tenant.page.get_by_role("status")).to_contain_text("round")
    expect(tenant.page.get_by_role("heading", name="What would start it")).to_be_visible()
    if PICTURES:
        for width in (375, 768, 1280):
            tenant.page.set_viewport_size({"width": width, "height": 900})
            tenant.page.screenshot(path=Path(PICTURES) / f"explained-{width}.png", full_page=True)


def test_what_a_site_prints_and_reports_stays_text(tenant: Visitor, scene: Scene) -> None:
    tenant.visit(f"/jobs/{scene.jobs['spanning']}")
    expect(tenant.page.locator("main")).to_contain_text(HOSTILE)
    assert tenant.page.evaluate("window.hacked") is None
    assert tenant.page.locator("main img").count() == 0


def test_a_watched_job_follows_what_happens(tenant: Visitor, scene: Scene) -> None:
    scene.agents["danzig"].run_log("a line that came later")
    tenant.visit(f"/jobs/{scene.jobs['spanning']}")
    expect(tenant.page.locator("#live")).to_have_attribute("data-live", "polling")
    scene.agents["bremen"].run_log("a line that came while watching")
    expect(tenant.page.locator("#live")).to_contain_text("a line that came while watching")


def test_a_job_is_submitted_by_form_in_three_interactions(tenant: Visitor) -> None:
    tenant.visit("/jobs/new")
    tenant.page.get_by_label("Job name").fill("by-form")
    tenant.page.get_by_role("button", name="Show what it would get").click()
    expect(tenant.page.locator("#quote .chosen")).to_contain_text("cpu-slot at")
    tenant.page.get_by_role("button", name="Submit", exact=True).click()
    expect(tenant.page.get_by_role("heading", name="by-form")).to_be_visible()
    expect(tenant.page.locator("#live")).to_contain_text("queued")


def test_a_goal_is_answered_beside_the_form_and_put_into_it(tenant: Visitor) -> None:
    tenant.visit("/jobs/new")
    tenant.page.locator("#gpu_min_1").fill("1")
    tenant.page.locator("#gpu_max_1").fill("4")
    tenant.page.get_by_label("Goal").select_option("deadline")
    # Without a button: the quote follows the fields.
    expect(tenant.page.locator("#advice")).to_contain_text("give market.deadline")
    tenant.page.get_by_label("Goal").select_option("budget")
    advice = tenant.page.locator("#advice")
    expect(advice).to_contain_text("of the budget")
    expect(advice).to_contain_text("4 cpu-slot at")
    if PICTURES:
        for width in (390, 820, 1280):
            tenant.page.set_viewport_size({"width": width, "height": 900})
            tenant.page.screenshot(path=Path(PICTURES) / f"advice-{width}.png", full_page=True)
    tenant.page.get_by_role("button", name="Put it into the form").click()
    expect(tenant.page.locator("#gpu_min_1")).to_have_value("4")
    expect(tenant.page.locator("#gpu_max_1")).to_have_value("4")
    expect(tenant.page.get_by_label("Goal")).to_have_value("budget")
    expect(tenant.page.locator("#quote .chosen")).to_contain_text("4 cpu-slot at")


def test_an_uploaded_workdir_survives_a_mistake_in_another_field(tenant: Visitor, workdir_file: Path) -> None:
    tenant.visit("/jobs/new")
    tenant.page.get_by_label("Job name").fill("own-code")
    tenant.page.get_by_label("Your folder as .tar.gz").check()
    tenant.page.locator("#workdir_file").set_input_files(workdir_file)
    tenant.page.locator("#gpu_max_1").fill("1")
    tenant.page.get_by_role("button", name="Submit", exact=True).click()
    expect(tenant.page.locator("#fault-gpu_max_1")).to_be_visible()
    tenant.page.locator("#gpu_min_1").fill("1")
    tenant.page.get_by_role("button", name="Submit", exact=True).click()
    expect(tenant.page.get_by_role("heading", name="own-code")).to_be_visible()
    tenant.errors = [error for error in tenant.errors if "422" not in error]  # the browser names the first answer


def test_a_job_is_submitted_by_job_file_and_a_fault_is_shown_at_its_line(tenant: Visitor) -> None:
    tenant.visit("/jobs/new?by=file")
    text = tenant.page.get_by_label("Job file").input_value()
    wrong = text.replace("name: stdlib-lm", "name: by-file").replace("sites_max: 2", "sites_mx: 2")
    line = wrong.splitlines().index("  sites_mx: 2") + 1
    tenant.page.get_by_label("Job file").fill(wrong)
    tenant.page.get_by_role("button", name="Show what it would get").click()
    expect(tenant.page.locator("#quote")).to_contain_text(f"line {line}, market.sites_mx")
    tenant.page.get_by_role("button", name="Submit", exact=True).click()
    expect(tenant.page.locator("#faults")).to_contain_text(f"line {line}, market.sites_mx")
    tenant.page.get_by_label("Job file").fill(wrong.replace("sites_mx", "sites_max"))
    tenant.page.get_by_role("button", name="Submit", exact=True).click()
    expect(tenant.page.get_by_role("heading", name="by-file")).to_be_visible()
    tenant.errors = [error for error in tenant.errors if "422" not in error]  # the browser names the second answer


def test_a_job_is_cancelled(tenant: Visitor, scene: Scene) -> None:
    tenant.visit("/jobs/new")
    tenant.page.get_by_label("Job name").fill("short-lived")
    tenant.page.get_by_role("button", name="Submit", exact=True).click()
    tenant.page.get_by_role("button", name="Cancel job").click()
    expect(tenant.page.locator("#live")).to_contain_text("cancelled by its tenant")
    expect(tenant.page.get_by_role("button", name="Cancel job")).to_have_count(0)


def test_the_market_shows_prices_use_and_certificate(tenant: Visitor) -> None:
    tenant.visit("/market")
    expect(tenant.page.locator(".chart[data-drawn=yes] canvas")).to_have_count(1)
    expect(tenant.page.locator("main")).to_contain_text("4 of 4")
    expect(tenant.page.locator("main")).to_contain_text("bound")


def test_an_admin_invites_a_site_once(admin: Visitor) -> None:
    admin.visit("/admin/sites")
    admin.page.get_by_label("Name").fill("riga")
    admin.page.get_by_role("button", name="Invite").click()
    expect(admin.page.locator("#join-string")).to_be_visible()
    admin.visit("/admin/sites")
    expect(admin.page.locator("#join-string")).to_have_count(0)


def test_an_admin_replays_a_round_to_the_bit(admin: Visitor) -> None:
    admin.visit("/admin/rounds/1")
    admin.page.get_by_role("button", name="Replay").click()
    expect(admin.page.get_by_role("status")).to_contain_text("identical to the bit")


def test_an_admin_gives_credits_and_the_ledger_still_sums_to_nought(admin: Visitor) -> None:
    admin.visit("/admin/tenants")
    admin.page.get_by_label("Tenant").fill("bob")
    admin.page.get_by_label("Credits").fill("12.5")
    admin.page.get_by_role("button", name="Deposit").click()
    expect(admin.page.get_by_role("row", name="bob")).to_contain_text("362.50")
    admin.visit("/admin/ledger")
    admin.page.get_by_role("button", name="Run the audit").click()
    expect(admin.page.locator("#ledger-sum")).to_have_text("0.00")
    expect(admin.page.get_by_role("status")).to_contain_text("found nothing")


def test_an_admin_opens_an_account_sets_its_password_and_closes_it(
    admin: Visitor, visitor: Visitor, scene: Scene
) -> None:
    admin.visit("/admin/accounts")
    opening = admin.page.locator("form", has=admin.page.get_by_role("heading", name="New account"))
    opening.get_by_label("Login").fill("cid@example.org")
    opening.get_by_role("combobox").select_option("tenant")
    opening.locator("#tenant_id").fill("bob")
    opening.get_by_label("Password").fill("the first password")
    opening.get_by_role("button", name="Open").click()
    expect(admin.page.get_by_role("row", name="cid@example.org")).to_contain_text("open")
    changing = admin.page.locator("form", has=admin.page.get_by_role("heading", name="Another password"))
    changing.get_by_label("Login").fill("cid@example.org")
    changing.get_by_label("Password").fill("the second password")
    changing.get_by_role("button", name="Set").click()
    expect(admin.page.get_by_role("status")).to_contain_text("Done: cid@example.org")
    verify_login(scene.market, "cid@example.org", "the second password")
    closing = admin.page.locator("form", has=admin.page.get_by_role("heading", name="Close an account"))
    closing.get_by_label("Login").fill("cid@example.org")
    closing.get_by_role("button", name="Close").click()
    expect(admin.page.get_by_role("row", name="cid@example.org")).to_contain_text("closed")
    with pytest.raises(LoginError):
        verify_login(scene.market, "cid@example.org", "the second password")
    assert _said(scene, "user")[-3:] == [
        ("created", "cid@example.org"),
        ("password", "cid@example.org"),
        ("disabled", "cid@example.org"),
    ]
    by = select(Event.actor).where(Event.kind == "user").order_by(Event.event_id.desc()).limit(3)
    assert scene.market.database.read(lambda session: list(session.scalars(by))) == ["person root@example.org"] * 3


def test_an_admin_cannot_close_the_own_account(admin: Visitor, scene: Scene) -> None:
    admin.visit("/admin/accounts")
    closing = admin.page.locator("form", has=admin.page.get_by_role("heading", name="Close an account"))
    closing.get_by_label("Login").fill("root@example.org")
    closing.get_by_role("button", name="Close").click()
    expect(admin.page.get_by_role("alert")).to_contain_text("your own account")
    verify_login(scene.market, "root@example.org", PASSWORD)
    admin.errors = [error for error in admin.errors if "422" not in error]  # the browser names the refusal


def test_an_admin_freezes_the_market_and_opens_it_again(admin: Visitor, scene: Scene) -> None:
    admin.visit("/admin/rounds")
    admin.page.get_by_label("Why").fill("the books are being looked at")
    admin.page.get_by_role("button", name="Freeze").click()
    expect(admin.page.get_by_role("status")).to_contain_text("the books are being looked at (by root@example.org)")
    with pytest.raises(FrozenError):
        scene.market.database.read(require_open)
    if PICTURES:
        _picture(admin, "root-frozen-1280")
    admin.page.get_by_role("button", name="Open the market").click()
    expect(admin.page.get_by_role("button", name="Freeze")).to_be_visible()
    scene.market.database.read(require_open)
    assert _said(scene, "market")[-2:] == [
        ("frozen", "the books are being looked at (by root@example.org)"),
        ("thawed", "by root@example.org"),
    ]


def _said(scene: Scene, kind: str) -> list[tuple[str, str]]:
    events = select(Event).where(Event.kind == kind).order_by(Event.event_id)
    return scene.market.database.read(lambda session: [(row.after, row.detail) for row in session.scalars(events)])


def test_every_page_fits_its_window(visitor: Visitor, scene: Scene, cookies: dict[str, str]) -> None:
    for name, pages in (("ada", TENANT_PAGES), ("root", ADMIN_PAGES), ("olga", OPERATOR_PAGES)):
        visitor.page.goto("about:blank")  # what the last page still asks for, it asks as the person who saw it
        visitor.become(cookies[name])
        for path in pages:
            visitor.page.set_viewport_size({"width": WIDTHS[0], "height": 900})
            assert visitor.visit(path.format(**scene.jobs)) == 200
            for width in WIDTHS:
                visitor.page.set_viewport_size({"width": width, "height": 900})
                wide = visitor.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
                assert wide <= 0, f"{path} is {wide} px wider than a window of {width} px"
                if PICTURES:
                    _picture(visitor, f"{name}-{path.strip('/').replace('/', '_')}-{width}")


def _picture(visitor: Visitor, name: str) -> None:
    plain = name.replace("{", "").replace("}", "").replace("?", "-")
    for scheme in ("light", "dark"):
        visitor.page.emulate_media(color_scheme=scheme)
        if visitor.page.locator(".chart").count():
            visitor.page.wait_for_timeout(500)  # charts follow a new width and palette after a moment
        visitor.page.screenshot(path=Path(PICTURES) / f"{plain}-{scheme}.png", full_page=True)


def test_without_javascript_a_job_is_quoted_submitted_and_watched(
    chromium: Browser, address: str, cookies: dict[str, str]
) -> None:
    context = chromium.new_context(java_script_enabled=False)
    context.set_default_timeout(10_000)
    visitor = Visitor(context.new_page(), address)
    visitor.become(cookies["ada"])
    visitor.visit("/jobs/new")
    visitor.page.get_by_label("Job name").fill("no-script")
    visitor.page.get_by_role("button", name="Show what it would get").click()
    expect(visitor.page.locator("#quote .chosen")).to_contain_text("cpu-slot at")
    visitor.page.get_by_role("button", name="Submit", exact=True).click()
    expect(visitor.page.locator("#state")).to_contain_text("queued")
    visitor.page.get_by_role("button", name="Cancel job").click()
    expect(visitor.page.locator("#state")).to_contain_text("cancelled by its tenant")
    context.close()
