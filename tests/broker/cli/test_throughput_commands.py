"""`hansa throughput`: fit, predict and evaluate on a table drawn from known parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from broker.cli import throughput
from broker.cli.errors import UsageError
from tests.training.steptimes.synthetic_tables import csv_text, drawn
from training.steptimes.model import StepModelError
from training.steptimes.table import TableError

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("throughput") / "table.csv"
    file.write_text(csv_text(drawn((1, 2, 3, 4, 8, 16))), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def model(table: Path) -> Path:
    file = table.with_name("model.json")
    result = RUNNER.invoke(throughput.app, ["fit", str(table), "-o", str(file), "--part", "placements"])
    assert result.exit_code == 0, result.output
    assert "on up to 4 nodes" in result.output
    return file


def test_fit_writes_the_same_file_twice(table: Path, model: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.json"
    RUNNER.invoke(throughput.app, ["fit", str(table), "-o", str(again), "--part", "placements"])
    assert again.read_bytes() == model.read_bytes()


def test_predict_prints_step_and_interval(model: Path) -> None:
    arguments = ["predict", str(model), "--name", "wide", "--nodes", "8", "--gpus", "32", "--batch", "16"]
    text = RUNNER.invoke(throughput.app, arguments)
    assert text.exit_code == 0
    assert "90%" in text.output
    document = json.loads(RUNNER.invoke(throughput.app, [*arguments, "--json"]).output)
    assert document["low_s"] < document["step_s"] < document["high_s"]


def test_evaluate_scores_each_model_beside_the_published_form(table: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    result = RUNNER.invoke(throughput.app, ["evaluate", str(table), "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    for word in ("dense", "small", "wide", "all models", "median %", "p95 %", "inside", "published form"):
        assert word in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    document = json.loads(RUNNER.invoke(throughput.app, ["evaluate", str(table), "--json"]).output)
    overall = document["scores"][-1]
    assert overall["name"] == "all models"
    assert overall["mean"] < 10
    assert overall["mean"] < overall["reference_mean"]
    assert overall["covered"] > 0.85


def test_evaluate_of_a_written_model_scores_all_rows(table: Path, model: Path) -> None:
    result = RUNNER.invoke(throughput.app, ["evaluate", str(table), "--model", str(model), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["scores"][-1]["rows"] == 3 * 6 * 4 * 4


def test_a_table_may_be_divided_by_nodes(table: Path) -> None:
    result = RUNNER.invoke(throughput.app, ["evaluate", str(table), "--seen-nodes", "3", "--json"])
    assert json.loads(result.output)["scores"][-1]["rows"] == 3 * 3 * 4 * 4


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["evaluate", "--seen-nodes", "64"], UsageError),
        (["evaluate", "--fit-part", "nowhere"], UsageError),
        (["evaluate", "--seen-nodes", "2", "--fit-part", "placements"], UsageError),
    ],
)
def test_an_impossible_division_says_so(table: Path, arguments: list[str], error: type[Exception]) -> None:
    result = RUNNER.invoke(throughput.app, [arguments[0], str(table), *arguments[1:]])
    assert isinstance(result.exception, error)


def test_a_bad_table_and_a_bad_model_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("model,nodes,gpus,local_batch,step_time_s\nbert,1,1,8,-3\n", encoding="utf-8")
    result = RUNNER.invoke(throughput.app, ["fit", str(bad), "-o", str(tmp_path / "m.json")])
    assert isinstance(result.exception, TableError)
    assert "row 2, step_time_s" in str(result.exception)
    result = RUNNER.invoke(
        throughput.app, ["predict", str(bad), "--name", "bert", "--nodes", "1", "--gpus", "1", "--batch", "8"]
    )
    assert isinstance(result.exception, StepModelError)
