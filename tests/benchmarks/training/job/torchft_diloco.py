"""torchft's DiLoCo: one replica a site, its lighthouse at site 0, pseudo-gradients averaged as fp32 over Gloo."""

from __future__ import annotations

import time
from datetime import timedelta

import peer_site
import torch
from torch.distributed import TCPStore
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

LIGHTHOUSE_PORT, STORE_PORT = 29510, 29600

if peer_site.site == 0:
    # The heartbeat's limit is its own default: with a shorter one a busy machine's sites count as lost and nothing is merged.
    lighthouse = LighthouseServer(
        bind=f"0.0.0.0:{LIGHTHOUSE_PORT}", min_replicas=2, join_timeout_ms=1000, heartbeat_timeout_ms=5000
    )
    peer_site.say("lighthouse", f"http://{peer_site.address}:{LIGHTHOUSE_PORT}")
store = TCPStore(peer_site.address, STORE_PORT, is_master=True, wait_for_workers=False)
model, optimizer = peer_site.model, peer_site.optimizer
manager = Manager(
    pg=ProcessGroupGloo(timeout=timedelta(seconds=20)),
    load_state_dict=model.load_state_dict,
    state_dict=model.state_dict,
    min_replica_size=2,
    use_async_quorum=False,
    init_sync=False,  # all start from the same seed
    timeout=timedelta(seconds=20),
    quorum_timeout=timedelta(seconds=60),
    rank=0,
    world_size=1,
    store_addr=peer_site.address,
    store_port=STORE_PORT,
    lighthouse_addr=peer_site.heard("lighthouse"),
    replica_id=f"site-{peer_site.site}",
    hostname=peer_site.address,
)
outer = torch.optim.SGD(model.parameters(), **peer_site.OUTER)
peer_site.start_together()
with DiLoCo(manager, [model], optimizer, outer, sync_every=peer_site.period_steps, pin_memory=False):
    while True:
        for _ in range(peer_site.period_steps - 1):
            peer_site.compute()
            optimizer.step()
        peer_site.compute()
        before, started_s = manager.current_step(), time.monotonic()
        optimizer.step()  # and, by its hook, the sync
        members = manager.num_participants() if manager.current_step() > before else 0
        peer_site.told(stall_s=time.monotonic() - started_s, members=members)
