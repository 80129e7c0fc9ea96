"""Every setting, exit code and example is documented and is as documented."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from broker.cli import errors
from broker.cli.errors import CliError
from broker.cli.following import INTERRUPTED
from broker.cli.job_document import read_job
from broker.settings import Settings
from sites.dataset import make_manifest
from training.catalogue import GPU_TYPES
from training.jobfile import load_job_file
from training.spec import JobSpec

ROOT = Path(__file__).parents[2]
SETTINGS = (ROOT / "deploy/SETTINGS.md").read_text()
CASES = sorted((ROOT / "training/examples/cases").glob("*.yaml"))


def case(name: str) -> JobSpec:
    return load_job_file(ROOT / f"training/examples/cases/{name}.yaml").spec("0" * 64)


def test_every_setting_stands_in_the_table_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `HANSA_([A-Z_]+)` \| (\S+) \| \S", SETTINGS, re.MULTILINE))
    defaults = {
        name.upper(): f"`{field.default}`" if str(field.default) else "-"
        for name, field in Settings.model_fields.items()
    }
    assert rows == defaults


def test_every_exit_code_stands_in_the_table() -> None:
    kinds = {
        CliError,
        *(kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CliError)),
    }
    codes = {0, INTERRUPTED, *(kind.exit_code for kind in kinds)}
    table = SETTINGS.partition("## Exit codes")[2]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == codes


def test_variables_that_the_program_reads_are_named() -> None:
    read = set()
    for path in (ROOT / "broker/cli").glob("*.py"):
        read |= set(re.findall(r'"(HANSA_[A-Z_]+)"', path.read_text()))
    assert {"HANSA_URL", "HANSA_CONTEXT"} <= read
    assert not {name for name in read if f"`{name}" not in SETTINGS}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_an_example_is_a_job_that_can_be_sent(path: Path) -> None:
    document = read_job(path)
    spec = JobSpec.model_validate(document.spec)
    assert {row.gpu_type for row in spec.resources.accelerators} <= set(GPU_TYPES)
    assert document.packed


def test_the_examples_say_what_they_are_for() -> None:
    assert [path.stem for path in CASES] == ["pretraining", "private_finetuning", "sweep"]
    assert case("pretraining").market.sites_max == 2
    private = case("private_finetuning")
    (notes,) = private.data or ()
    assert (notes.egress_ok, notes.source, private.market.sites_max) == (False, None, 1)
    # The digest is that of the folder beside it, as `hansa data manifest` would name it today.
    assert hashlib.sha256(make_manifest(ROOT / "training/examples/cases/notes")).hexdigest() == notes.sha256
    assert {row.count_max for row in case("sweep").resources.accelerators} == {1}
    assert "LEARNING_RATE" in case("sweep").envs
