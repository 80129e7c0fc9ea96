"""`hansa secret`: a value goes in by standard input or a file, and never comes out."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from tests.broker.cli.calling import Hansa

VALUE = "not-on-any-command-line"


def test_a_secret_is_set_listed_and_deleted(hansa: Hansa, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{VALUE}\n".encode())))
    done = hansa("secret", "set", "HF_TOKEN")
    assert (done.code, done.out) == (0, "secret HF_TOKEN is set\n"), done.err
    (tmp_path / "key.json").write_text('{"key": 1}\n')
    assert hansa("secret", "set", "KEY", "--file", str(tmp_path / "key.json")).code == 0
    listed = hansa("secret", "list")
    assert [line.split()[0] for line in listed.out.splitlines()][-2:] == ["HF_TOKEN", "KEY"]
    rows = json.loads(hansa("secret", "list", "--json").out)["items"]
    assert [sorted(row) for row in rows] == [["name", "set_ms"]] * 2
    assert hansa("secret", "delete", "KEY").out == "secret KEY is deleted\n"
    assert hansa("secret", "delete", "KEY").code == 4
    assert hansa("secret", "set", "KEY", "--file", str(tmp_path / "none")).code != 0
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    refused = hansa("secret", "set", "KEY", "--file", str(tmp_path / "binary"))
    assert (refused.code, "base64" in refused.err) == (2, True)
    assert hansa("secret", "list", HANSA_TOKEN="").code == 5
