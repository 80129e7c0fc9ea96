from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from sites.site_cli import app
from tests.sites.conftest import SITE_YAML
from tests.sites.market import Market


def hansa_site(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, words)
    return result.exit_code, result.output


def test_site_joins_and_tells_its_status(market: Market, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(SITE_YAML)
    code, output = hansa_site("join", market.join_string("hamburg"), "--settings", str(path), "--json")
    assert code == 0, output
    assert json.loads(output)["site_id"] == "hamburg"
    assert hansa_site("drain", "--settings", str(path))[0] == 0
    code, output = hansa_site("status", "--settings", str(path), "--json")
    status = json.loads(output)
    assert (status["market"], status["draining"], status["attempts"]) == (market.url, True, [])
    assert hansa_site("drain", "--end", "--settings", str(path))[0] == 0
    assert "draining" not in hansa_site("status", "--settings", str(path))[1]


def test_fault_is_a_sentence_with_its_code(market: Market, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(SITE_YAML.replace("hamburg", "bremen"))
    code, output = hansa_site("join", market.join_string("hamburg"), "--settings", str(path))
    assert code == 1
    assert "is for site hamburg" in output
    assert "[join.invalid]" in output
    code, output = hansa_site("run", "--settings", str(path))
    assert code == 1
    assert "hansa site join" in output
