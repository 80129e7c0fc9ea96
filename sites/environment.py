"""What a process that Hansa starts at a site finds in its environment: enough to find Hansa, none of the agent's own."""

from __future__ import annotations

import os
from pathlib import Path


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
