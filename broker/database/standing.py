"""What is not over, as conditions of queries.

The state is written into the statement and not bound to it: a database uses an index over some rows only for a statement
that says by itself that it wants none but those, and what is over grows for ever.
"""

from __future__ import annotations

from sqlalchemy import literal

from broker.database.tables import Lease, Placement

LEASE_STANDS = Lease.state != literal("ended", literal_execute=True)
PLACEMENT_STANDS = Placement.state != literal("ended", literal_execute=True)
