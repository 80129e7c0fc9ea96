"""The services that tests ask for are real, empty and private."""

from __future__ import annotations

import redis
import sqlalchemy


def test_a_database_is_empty_and_holds_what_is_written(database_url: str) -> None:
    engine = sqlalchemy.create_engine(database_url)
    with engine.begin() as connection:
        assert sqlalchemy.inspect(connection).get_table_names() == []
        connection.execute(sqlalchemy.text("CREATE TABLE seen (number INTEGER PRIMARY KEY)"))
        connection.execute(sqlalchemy.text("INSERT INTO seen VALUES (7)"))
    with engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("SELECT number FROM seen")).scalar_one() == 7
    engine.dispose()


def test_a_second_database_knows_nothing_of_the_first(database_url: str) -> None:
    engine = sqlalchemy.create_engine(database_url)
    with engine.connect() as connection:
        assert sqlalchemy.inspect(connection).get_table_names() == []
    engine.dispose()


def test_valkey_listens_on_no_port_and_is_empty(valkey_url: str) -> None:
    assert valkey_url.startswith("unix:///")
    with redis.Redis.from_url(valkey_url) as client:
        assert client.dbsize() == 0
        assert client.config_get("port") == {"port": "0"}
        client.set("left", "behind")


def test_what_a_former_test_left_in_valkey_is_gone(valkey_url: str) -> None:
    with redis.Redis.from_url(valkey_url) as client:
        assert client.get("left") is None
