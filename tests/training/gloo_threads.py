"""Real Gloo groups whose ranks are threads of one process: a site with several ranks in a fast test."""

from __future__ import annotations

import threading
from datetime import timedelta

import torch.distributed as dist

from training.ranks import Ranks

LIMIT = timedelta(seconds=30)


def ranks_of_a_site(world: int) -> list[Ranks]:
    """Return the `world` ranks of one new site."""
    store = dist.HashStore()
    found: dict[int, Ranks] = {}

    def connect(rank: int) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)]
        options._timeout = LIMIT
        found[rank] = Ranks(dist.ProcessGroupGloo(store, rank, world, options))

    threads = [threading.Thread(target=connect, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT.total_seconds())
    return [found[rank] for rank in range(world)]
