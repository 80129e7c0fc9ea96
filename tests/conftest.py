"""What every test can ask for: each module named here gives some fixtures or keeps one rule."""

import os

# One thread for each worker, before anything loads numpy: more of them only wait for each other's cores.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

pytest_plugins = [
    "tests.fixtures.databases",
    "tests.fixtures.determinism",
    "tests.fixtures.interrupts",
    "tests.fixtures.skips",
    "tests.fixtures.valkey",
]
