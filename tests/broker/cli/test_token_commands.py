"""`hansa token`: what a tenant sees of its tokens, makes and revokes."""

from __future__ import annotations

import json

from tests.broker.cli.calling import Hansa


def test_a_narrow_token_is_made_listed_and_revoked(hansa: Hansa) -> None:
    made = hansa(
        "token", "create", "--name", "dashboard", "--scope", "jobs:read", "--days", "1", HANSA_TOKEN=_own(hansa)
    )
    assert made.code == 0, made.err
    text = made.out.strip()
    assert hansa("status", HANSA_TOKEN=text).code == 0
    assert hansa("account", HANSA_TOKEN=text).code == 5
    listed = hansa("token", "list", HANSA_TOKEN=_own(hansa))
    (line,) = (line for line in listed.out.splitlines() if "dashboard" in line)
    token_id = line.split()[0]
    assert "jobs:read" in line
    assert text.split("_")[3] not in listed.out
    assert hansa("token", "revoke", token_id, HANSA_TOKEN=_own(hansa)).out == f"token {token_id} is revoked\n"
    assert hansa("status", HANSA_TOKEN=text).code == 5
    rows = json.loads(hansa("token", "list", "--json", HANSA_TOKEN=_own(hansa)).out)["items"]
    assert [row["revoked_ms"] is not None for row in rows if row["token_id"] == token_id] == [True]
    assert hansa("token", "revoke", "0" * 16, HANSA_TOKEN=_own(hansa)).code == 4


def test_admins_see_the_accounts(hansa: Hansa) -> None:
    assert hansa("admin", "user", "list", who="admin").code == 0
    assert hansa("admin", "user", "list").code == 5


def _own(hansa: Hansa) -> str:
    """Return a token that lives longer than a day: the one of these tests lives for an hour."""
    return hansa("admin", "tenant", "token", "acme", "--days", "2", who="admin").out.strip()
