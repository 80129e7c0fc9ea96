"""The schema in force: Alembic's revisions, run by the program itself.

`upgrade` is what `hansa broker` and the tests call before anything else; the tables are declared
once, in `broker.database.tables`, and a test holds the two together. After changing the tables,
`python -m broker.database.schema "what changed"` writes the revision that the change needs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from sqlalchemy import text

# Their tables belong to the schema.
from broker.database import (
    abilities,  # noqa: F401  see above
    certificates,  # noqa: F401
    forecasts,  # noqa: F401
    idempotency,  # noqa: F401
    moves,  # noqa: F401
    probes,  # noqa: F401
    refusals,  # noqa: F401
    tenant_secrets,  # noqa: F401
    terms,  # noqa: F401
    uploads,  # noqa: F401
    wishes,  # noqa: F401
)
from broker.database.engine import Database

MIGRATIONS: Final = Path(__file__).parent / "migrations"
# Any number, as long as all brokers of one database use the same.
_ADVISORY_LOCK: Final = 0x48616E7361


def upgrade(database: Database) -> None:
    """Bring the database to the newest revision; one that is there already is left as it is.

    Safe to call from several processes at once: one works, the others wait and then find it done.
    """
    with database.migration() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _ADVISORY_LOCK})
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def write_revision(message: str) -> None:
    """Write the revision that leads from the revisions so far to the tables as declared."""
    with tempfile.TemporaryDirectory() as folder:
        database = Database(f"sqlite:///{folder}/empty.sqlite3")
        upgrade(database)
        with database.migration() as connection:
            config = _config()
            config.attributes["connection"] = connection
            number = len(list((MIGRATIONS / "versions").glob("*.py"))) + 1
            command.revision(config, message=message, autogenerate=True, rev_id=f"{number:04d}")
        database.close()


def _config() -> Config:
    config = Config()
    # Alembic interpolates %: a path may hold one.
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("file_template", "%%(rev)s_%%(slug)s")
    return config


if __name__ == "__main__":
    write_revision(sys.argv[1])
