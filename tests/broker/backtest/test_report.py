"""The command from files to a page, and the page in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from typer.testing import CliRunner

from broker.cli.main import app
from tests.broker.backtest.small import HEADER, TABLE, random_trace

SITES = """
sites:
  - {name: a, gpu_type: slow, ask: "0.40", capacity_gpus: 8}
  - {name: b, gpu_type: fast, ask: "1.10", capacity_gpus: 10}
  - {name: c, gpu_type: slow, ask: "0.30", capacity_gpus: 12}
"""
# Set to a folder to look at the page by eye.
PICTURES = os.environ.get("HANSA_PICTURES")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backtest")
    random_trace(folder, seed=8, jobs=100)
    (folder / "sites.yaml").write_text(SITES)
    (folder / "table.csv").write_text(TABLE)
    return folder


def _backtest(folder: Path, *options: str, report: str = "report.html"):  # noqa: ANN202  typer's own result
    return CliRunner().invoke(
        app,
        [
            "backtest",
            *("--trace", str(folder / "trace.csv"), "--sites", str(folder / "sites.yaml")),
            *("--throughput", str(folder / "table.csv"), "--report", str(folder / report)),
            *(
                "--json",
                str(folder / f"{report}.json"),
                "--quiet",
                "--solver",
                "reference",
                "--moments",
                "2",
                "--agents",
                "2",
            ),
            *options,
        ],
        catch_exceptions=True,
    )


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    result = _backtest(folder)
    assert result.exit_code == 0, result.output
    return folder / "report.html"


def test_the_page_stands_alone_and_states_what_is_assumed(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"(src|href)=|url\(|<script|@import", text)
    for sentence in ("no bids, no GPU types", "market over market-alone", "Owen point", "misreport", "60 s"):
        assert sentence in text


def test_the_figures_are_the_same_again_but_for_the_times_measured(folder: Path, page: Path) -> None:
    result = _backtest(folder, report="again.html")
    assert result.exit_code == 0, result.output
    first, again = (json.loads((folder / f"{name}.json").read_text()) for name in ("report.html", "again.html"))
    assert first.pop("timing").keys() == again.pop("timing").keys()
    assert first == again
    assert first["policies"]["market"]["counters"]["finishes"] > 0
    assert first["misreports"]["bid"]["agents"] > 0


def test_another_seed_draws_other_bids(folder: Path, page: Path) -> None:
    result = _backtest(folder, "--seed", "1", "--policy", "alone", report="seed.html")
    assert result.exit_code == 0, result.output
    first, other = (json.loads((folder / f"{name}.json").read_text()) for name in ("report.html", "seed.html"))
    assert first["policies"]["alone"]["welfare"] != other["policies"]["alone"]["welfare"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--policy", "alone,magic"), "no policy 'magic'"),
        (("--bids", "generous"), "none of lognormal"),
        (("--patience", "-1"), "--patience"),
        (("--solver", "magic"), "none of product"),
        (("--from", "someday"), "not a date"),
        (("--from", "2017-01-02", "--to", "2017-01-01"), "--from must be before"),
        (("--from", "2031-01-01"), "no job arrives"),
        (("--report", "/nowhere/at/all/report.html"), "does not exist"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_in_a_sentence(
    folder: Path, options: tuple[str, ...], words: str
) -> None:
    result = _backtest(folder, *options, report="refused.html")
    assert result.exit_code != 0
    assert words in str(result.exception) + result.output
    assert not (folder / "refused.html").exists()


def test_a_bad_row_reaches_the_person_with_its_line(folder: Path) -> None:
    (folder / "bad.csv").write_text(f"{HEADER}\n0,5,1,a\n1,-2,1,a\n")
    result = _backtest(folder, "--trace", str(folder / "bad.csv"), report="refused.html")
    assert "bad.csv line 3: duration is -2" in str(result.exception)


def test_the_page_reads_well_in_a_browser(page: Path) -> None:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert path is not None, "No Chromium: run deploy/test_parts.sh, or on Debian `apt-get install chromium`."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        window = browser.new_page(viewport={"width": 1100, "height": 900})
        errors: list[str] = []
        window.on("console", lambda message: errors.append(message.text))
        window.on("request", lambda request: request.url.startswith("file:") or errors.append(request.url))
        window.goto(page.as_uri())
        assert window.locator("svg").count() >= 5
        # No text of a plot is cut off or lies on another's.
        outside = window.evaluate(
            """() => [...document.querySelectorAll('svg')].flatMap(svg => {
                const frame = svg.getBoundingClientRect()
                return [...svg.querySelectorAll('text')].filter(text => {
                    const box = text.getBoundingClientRect()
                    return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1
                }).map(text => text.textContent)
            })"""
        )
        colliding = window.evaluate(
            """() => [...document.querySelectorAll('svg')].flatMap(svg => {
                const all = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()])
                return all.flatMap(([a, one], i) => all.slice(i + 1).filter(([, other]) =>
                    one.left < other.right - 1 && other.left < one.right - 1 &&
                    one.top < other.bottom - 1 && other.top < one.bottom - 1).map(([b]) => a + ' / ' + b))
            })"""
        )
        wide = window.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if PICTURES:
            window.screenshot(path=Path(PICTURES) / "backtest.png", full_page=True)
        browser.close()
    assert errors == []
    assert outside == []
    assert colliding == []
    assert wide <= 0
