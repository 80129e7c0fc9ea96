"""What a process that Hansa starts at a site finds there: an environment with none of the agent's own, its share of memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from sites.settings import SiteSettings

# What the leases of a site may take of its host's memory together; the rest is the system's and the agent's.
_MEMORY_SHARE: Final = 0.9


def own_environment(python: str) -> dict[str, str]:
    """Return the environment in which `python` finds Hansa, and little else."""
    environment = {
        "PATH": os.pathsep.join((str(Path(python).parent), os.defpath)),
        "LANG": "C.UTF-8",
        "PYTHONSAFEPATH": "1",  # what -P says, for the processes that torchrun starts too
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    origin = Path(__file__).parents[1]  # one distribution holds sites and training
    if origin.name not in {"site-packages", "dist-packages"}:
        environment["PYTHONPATH"] = str(origin)  # a checkout: the interpreter does not find it by itself
    return environment


def memory_bytes(settings: SiteSettings, gpus: int) -> int | None:
    """Return what a lease of so many GPUs may take of the host's memory: as the operator says, or the GPUs' share."""
    if settings.limits.memory_gb is not None:
        return int(settings.limits.memory_gb * 1_000_000_000)
    if settings.driver == "slurm":
        return None  # what the cluster grants by its own rules
    sold = sum(len(pool.gpu_ids) for pool in settings.pools)
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(host_bytes * _MEMORY_SHARE * gpus / sold)
