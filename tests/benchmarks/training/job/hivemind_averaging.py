"""hivemind's DecentralizedAverager on DiLoCo's pseudo-gradients, as OpenDiLoCo uses it: groups found through its DHT, fp16."""

from __future__ import annotations

import json
import time

import hivemind
import peer_site
import torch
from hivemind.compression import Float16Compression

model, optimizer = peer_site.model, peer_site.optimizer
parameters = list(model.parameters())
theta = [each.detach().clone().requires_grad_() for each in parameters]
outer = torch.optim.SGD(theta, **peer_site.OUTER)
known = json.loads(peer_site.heard("peers")) if peer_site.site else []
dht = hivemind.DHT(
    start=True,
    initial_peers=known,
    host_maddrs=[f"/ip4/{peer_site.address}/tcp/0"],
    announce_maddrs=None,
    use_relay=False,
    auto_nat=False,
    nat_port_map=False,
)
if peer_site.site == 0:
    peer_site.say("peers", json.dumps([str(each) for each in dht.get_visible_maddrs()]))
averager = hivemind.averaging.DecentralizedAverager(
    [torch.zeros_like(each) for each in parameters],
    dht,
    start=True,
    prefix="measured",
    target_group_size=peer_site.sites,
    min_group_size=2,
    # A fifth of its defaults: groups form sooner, and a peer that is gone is given up after as long as with the others.
    min_matchmaking_time=1.0,
    request_timeout=0.6,
    next_chunk_timeout=2.0,
    allreduce_timeout=20.0,
    compression=Float16Compression(),
)
peer_site.start_together()
while True:
    for _ in range(peer_site.period_steps):
        peer_site.compute()
        optimizer.step()
    started_s = time.monotonic()
    with averager.get_tensors() as tensors, torch.no_grad():
        for tensor, shared, own in zip(tensors, theta, parameters, strict=True):
            tensor.copy_(shared - own)
    group = averager.step(timeout=20.0)
    with averager.get_tensors() as tensors, torch.no_grad():
        for tensor, shared in zip(tensors, theta, strict=True):
            shared.grad = tensor.clone()
    outer.step()
    with torch.no_grad():
        for shared, own in zip(theta, parameters, strict=True):
            own.copy_(shared)
    peer_site.told(stall_s=time.monotonic() - started_s, members=len(group or ()))
