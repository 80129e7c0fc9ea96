"""A journal that an older agent wrote is read: an attempt is never lost over an upgrade."""

from __future__ import annotations

import json

from sites.journal import AttemptRecord
from sites.protocol import OUTPUT_NAME_LENGTH_MAX


def test_a_record_of_an_older_agent_is_read() -> None:
    record = AttemptRecord(
        lease_id="lease_a", epoch=1, job_id="job_a", tenant_id="acme", gpu_type="H100", gpu_ids=("g0",), order=None
    )
    older = json.loads(record.model_dump_json())
    outputs = {"x" * OUTPUT_NAME_LENGTH_MAX: "a1" * 32, "x" * (OUTPUT_NAME_LENGTH_MAX + 1): "b2" * 32}
    older |= {"view_number": 3, "outputs": outputs}
    read = AttemptRecord.model_validate_json(json.dumps(older))
    assert read == record.model_copy(update={"outputs": {"x" * OUTPUT_NAME_LENGTH_MAX: "a1" * 32}})
