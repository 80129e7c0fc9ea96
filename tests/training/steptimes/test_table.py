"""Tables of step times are read strictly, and every fault says its row, its field and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.steptimes.table import TableError, read_table

HEADER = "model,part,gpus_per_node,nodes,gpus,local_batch,step_time_s,sync_time_s\n"
GOOD = "bert,placements,4-4-2,3,10,8,1.5,0.9\n"


def read(path: Path, text: str) -> object:
    file = path / "table.csv"
    file.write_text(text, encoding="utf-8")
    return read_table(file)


def test_the_fullest_node_paces_an_uneven_shape(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text(HEADER + GOOD + "bert,scalability,,6,20,8,1.9,\n", encoding="utf-8")
    table = read_table(file)
    assert table.node_gpus.tolist() == [4.0, 4.0]
    assert table.part == ("placements", "scalability")
    assert table.sync_s[0] == 0.9
    assert table.sync_s[1] != table.sync_s[1]  # NaN: not measured


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("bert,p,,3,2,8,1.5,\n", "row 3, gpus: 2 on 3 nodes; count the GPUs of all nodes"),
        ("bert,p,4-4,3,10,8,1.5,\n", "row 3, gpus_per_node: 4-4 are 8 GPUs on 2 nodes"),
        ("bert,p,4-x,2,8,8,1.5,\n", "row 3, gpus_per_node: '4-x' is no shape"),
        ("bert,p,,2,8,8,0,\n", "row 3, step_time_s: '0'; give seconds, above 0"),
        ("bert,p,,2,8,8,nan,\n", "row 3, step_time_s: 'nan'"),
        ("bert,p,,2,8,8,1e400,\n", "row 3, step_time_s: '1e400'"),
        ("bert,p,,2,8,8,1.5,-1\n", "row 3, sync_time_s: '-1'; give seconds, 0 or more"),
        ("bert,p,,2,8,1_0,1.5,\n", "row 3, local_batch: '1_0'; give a whole number"),
        ("bert,p,,2,8,8\n", "row 3, step_time_s: ''"),
        (",p,,2,8,8,1.5,\n", "row 3, model: empty"),
    ],
)
def test_a_bad_row_is_named_with_its_field_and_remedy(tmp_path: Path, row: str, said: str) -> None:
    with pytest.raises(TableError) as caught:
        read(tmp_path, HEADER + GOOD + row)
    assert said in str(caught.value)


def test_a_table_without_a_column_says_which(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="lacks the column local_batch"):
        read(tmp_path, "model,nodes,gpus,step_time_s\nbert,1,1,0.4\n")


def test_an_empty_table_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="has no rows"):
        read(tmp_path, HEADER)


def test_faults_are_listed_up_to_a_limit(tmp_path: Path) -> None:
    with pytest.raises(TableError) as caught:
        read(tmp_path, HEADER + "bert,p,,2,8,8,0,\n" * 100)
    assert str(caught.value).count("step_time_s") == 8
    assert "further rows were not looked at" in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_bytes(b"\xff\xfe\x00m")
    with pytest.raises(TableError, match="not a CSV file in UTF-8"):
        read_table(file)
