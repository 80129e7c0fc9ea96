"""Step 7 at the site: what an attempt has delivered since its last usage row. Pure.

GPU time is the ranks' running time on the warden's clock times the GPUs of the lease; samples are
this site's in the round log's chain; bytes are what the gateway sent to each other site. All
three only rise, so a row is the difference to what former rows hold, whatever was lost between.
"""

from __future__ import annotations

from sites.journal import AttemptRecord, Delivered
from sites.protocol import Usage
from training.roundlog.control import GatewayStatus


def delivered(record: AttemptRecord, running_s: float, status: GatewayStatus | None, site_id: str) -> Delivered:
    """Return all that the attempt has delivered by now; never less than what its rows hold already."""
    former = record.delivered
    egress = dict(former.egress_bytes)
    samples = former.samples
    if status is not None:
        samples = max(samples, status.samples_by_site.get(site_id, 0))
        for target, count in status.links.items():
            if target != site_id:
                egress[target] = max(egress.get(target, 0), count.bytes_sent)
    return Delivered(
        gpu_milliseconds=max(
            former.gpu_milliseconds, record.gpu_milliseconds_before + int(running_s * 1000) * len(record.gpu_ids)
        ),
        samples=samples,
        egress_bytes=egress,
    )


def cut(record: AttemptRecord, now: Delivered, now_ms: int) -> tuple[AttemptRecord, Usage] | None:
    """Return the next usage row and the record after it, None where nothing was delivered since the last."""
    former = record.delivered
    egress = {target: count - former.egress_bytes.get(target, 0) for target, count in now.egress_bytes.items()}
    usage = Usage(
        lease_id=record.lease_id,
        epoch=record.epoch,
        sequence=record.usage_sequence + 1,
        gpu_milliseconds=now.gpu_milliseconds - former.gpu_milliseconds,
        samples=now.samples - former.samples,
        ended_ms=now_ms,
        egress_bytes={target: count for target, count in sorted(egress.items()) if count},
    )
    if not (usage.gpu_milliseconds or usage.samples or usage.egress_bytes):
        return None
    return record.model_copy(update={"delivered": now, "usage_sequence": usage.sequence}), usage
