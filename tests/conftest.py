"""What every test can ask for: each module named here gives some fixtures or keeps one rule."""

pytest_plugins = [
    "tests.fixtures.databases",
    "tests.fixtures.determinism",
    "tests.fixtures.interrupts",
    "tests.fixtures.skips",
    "tests.fixtures.valkey",
]
