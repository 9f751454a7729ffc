"""data.report counts what is in a file as a careful reader would."""

import pytest

from data import report
from data.jsonl import Record, write_jsonl

ROWS = [
    Record("a", "x", "yes", "because", "yes", {"model": "m"}),
    Record("b", "y", "yes", "since", "no", {"model": "m"}),
    Record("c", "Y ", "no", None, "no", {"model": "m"}),  # no rationale
    Record("d", "z", "no", "for", None, {"model": "m"}),  # the teacher answered, but not usably
    Record("e", "w", None, "as", "yes", {"model": "m"}),  # no gold
    Record("e", "v"),  # nothing
]


@pytest.fixture
def files(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    write_jsonl(tmp_path / "test.jsonl", [Record("t", " X", "yes"), Record("u", "new", "no")])
    return tmp_path / "rows.jsonl", tmp_path / "test.jsonl"


def test_rows_are_counted_by_what_they_train_and_the_teacher_by_class(files, capsys):
    assert report.main([*map(str, files)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for line in (
        "rows.jsonl: 6 rows 3 50.0% a label and a rationale",
        "1 16.7% a label, no usable rationale",
        "1 16.7% only the teacher's label",
        "1 16.7% neither label",
        "teacher right on 2 of 4 rows with gold, 50.0%",
        "yes 2 50.0% 50.0%",
        "no 2 50.0% 50.0%",
        "test.jsonl share 1 inputs",
    ):
        assert line in shown, line


def test_what_misleads_is_counted(tmp_path, capsys, spiece):
    """Spellings of one class, one rationale for all, characters that the tokenizer lacks."""
    rows = []
    for label in ["a ☃", "a  ☃", "a ☂", "b"] * 5:
        rows.append(Record(str(len(rows)), f"one {len(rows)}", label, "Yes."))
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert report.main([str(tmp_path / "rows.jsonl"), "--spiece", str(spiece)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for line in (
        "20 rationales are the same: 'yes.'",
        "a ☃ 10 50.0%",
        "0 (over 64) 15 rationale",  # with <unk>
    ):
        assert line in shown, (line, shown)


def test_lengths_are_percentiles_and_rows_that_training_cuts_are_counted(tmp_path, capsys, spiece):
    lengths = [*range(1, 101), 1020]  # the last is too long with the prefix alone
    write_jsonl(tmp_path / "rows.jsonl", [Record(str(n), "one " * n, "two") for n in lengths])
    assert report.main([str(tmp_path / "rows.jsonl"), "--spiece", str(spiece)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "input 61 101 110 1,030 1 (over 1,024)" in shown
