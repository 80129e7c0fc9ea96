from __future__ import annotations

import os
from pathlib import Path

import pytest

from sites.attempt_folder import AttemptFolder, open_left_by_ranks


def test_link_in_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "key.pem"
    secret.write_text("secret")
    root = tmp_path / "attempt"
    (root / "output").mkdir(parents=True)
    (root / "output/link").symlink_to(secret)
    (root / "linked").symlink_to(tmp_path)
    os.mkfifo(root / "output/pipe")
    (root / "output/plain").write_text("fine")
    for parts in (("output", "link"), ("linked", "key.pem"), ("output", "pipe"), ("output", "absent")):
        with pytest.raises(FileNotFoundError), open_left_by_ranks(root, *parts):
            pass
    with open_left_by_ranks(root, "output", "plain") as stream:
        assert stream.read() == b"fine"


def test_socket_path_is_short_enough_however_deep_the_folder(tmp_path: Path) -> None:
    deep = AttemptFolder(tmp_path / ("d" * 120))
    path = deep.socket("agent.sock")
    assert len(os.fsencode(path)) <= 107
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert AttemptFolder(tmp_path / ("e" * 120)).socket("agent.sock") != path
    path.parent.rmdir()
