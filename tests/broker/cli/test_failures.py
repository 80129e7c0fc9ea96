"""How the command line fails: a sentence, what helps, an exit code, and never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from werkzeug.serving import make_server

from broker.api.app import create_app
from broker.cli.errors import CliError
from broker.cli.following import _printable
from broker.cli.jobs import _file_name
from tests.broker.cli.calling import Broker, Hansa


def test_no_broker_is_exit_code_3(hansa: Hansa) -> None:
    outcome = hansa("status", HANSA_URL="http://127.0.0.1:1")
    assert outcome.code == 3
    assert "cannot be reached" in outcome.err
    assert "HANSA_URL" in outcome.err


def test_no_token_is_exit_code_5(hansa: Hansa) -> None:
    outcome = hansa("account", who="")
    assert outcome.code == 5
    assert "no token is set" in outcome.err


def test_forged_token_is_exit_code_5(hansa: Hansa) -> None:
    outcome = hansa("account", "--json", HANSA_TOKEN="hansa_tenant_" + "0" * 16 + "_" + "0" * 64)
    assert outcome.code == 5
    assert json.loads(outcome.err)["code"].startswith("credential.")


def test_tenant_may_not_do_what_admins_do(hansa: Hansa) -> None:
    assert hansa("admin", "ledger").code == 5


def test_plain_http_to_a_distant_host_is_refused(hansa: Hansa) -> None:
    outcome = hansa("account", HANSA_URL="http://market.example")
    assert outcome.code == 2
    assert "https://" in outcome.err


def test_address_that_is_no_broker_is_exit_code_3(hansa: Hansa) -> None:
    server = make_server("127.0.0.1", 0, _hello)
    threading.Thread(target=server.handle_request, daemon=True).start()
    outcome = hansa("account", HANSA_URL=f"http://127.0.0.1:{server.server_port}")
    assert outcome.code == 3
    assert "may not be a broker" in outcome.err


def test_certificate_of_another_authority_is_refused_and_the_pinned_one_is_taken(
    hansa: Hansa, broker: Broker, tmp_path: Path
) -> None:
    certificate = broker.market.authority.server_certificate()
    files = (str(certificate.certificate_path), str(certificate.key_path))
    server = make_server("127.0.0.1", 0, create_app(broker.market), threaded=True, ssl_context=files)
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    try:
        url = f"https://127.0.0.1:{server.server_port}"
        outcome = hansa("account", "--json", HANSA_URL=url)
        assert outcome.code == 3
        assert json.loads(outcome.err)["code"] == "cli.untrusted"
        ca = tmp_path / "ca.pem"
        ca.write_text(broker.market.authority.ca_pem)
        assert hansa("account", HANSA_URL=url, HANSA_CA=str(ca)).code == 0
    finally:
        server.shutdown()
        serving.join()


def test_unreadable_authority_is_wrong_usage(hansa: Hansa, tmp_path: Path) -> None:
    assert hansa("account", HANSA_CA=str(tmp_path / "none.pem")).code == 2


def test_serving_without_tls_beyond_loopback_is_refused(hansa: Hansa) -> None:
    outcome = hansa("broker", "serve", "--plain-http", "--bind", "0.0.0.0:7400")
    assert outcome.code == 2


def test_worker_without_redis_says_which_variable_is_missing(hansa: Hansa) -> None:
    outcome = hansa("broker", "worker", "rounds", HANSA_REDIS_URL="")
    assert outcome.code == 2
    assert "HANSA_REDIS_URL" in outcome.err


def test_unknown_command_is_wrong_usage(hansa: Hansa) -> None:
    assert hansa("sail").code == 2


def test_logs_cannot_take_over_the_terminal() -> None:
    assert _printable("a\x1b]0;owned\x07b\tc\n") == "a]0;ownedb\tc\n"


@pytest.mark.parametrize("name", ["..", ".", "/"])
def test_artifact_cannot_be_written_elsewhere(name: str) -> None:
    with pytest.raises(CliError):
        _file_name(name)
    assert _file_name("../../etc/passwd") == "etc-passwd"
    assert _file_name("lubeck/summary.json") == "lubeck-summary.json"


def test_help_loads_nothing_heavy() -> None:
    heavy = ["flask", "sqlalchemy", "httpx", "torch", "celery", "rich", "cryptography", "broker.market"]
    code = (
        "import sys\n"
        "from broker.cli.main import main\n"
        "sys.argv = ['hansa', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        f"print('LOADED', sorted(set({heavy!r}) & set(sys.modules)))\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "LOADED []" in printed
    assert "demo" in printed


def _hello(_environ: object, start: Callable[[str, list[tuple[str, str]]], object]) -> list[bytes]:
    start("200 OK", [("Content-Type", "text/html")])
    return [b"<html>hello</html>"]
