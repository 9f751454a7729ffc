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
def shown(tmp_path, capsys):
    """A function (rows, *more arguments): what is printed, with single spaces."""

    def run(rows, *arguments):
        write_jsonl(tmp_path / "rows.jsonl", rows)
        assert report.main([str(tmp_path / "rows.jsonl"), *map(str, arguments)]) == 0
        return " ".join(capsys.readouterr().out.split())

    return run


def test_rows_are_counted_by_what_they_train_and_the_teacher_by_class(tmp_path, shown):
    write_jsonl(tmp_path / "test.jsonl", [Record("t", " X", "yes"), Record("u", "new", "no")])
    text = shown(ROWS, tmp_path / "test.jsonl")
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
        assert line in text, line


def test_what_misleads_is_counted(shown, spiece):
    """Spellings of one class, one rationale for all, characters that the tokenizer lacks, and rows
    that training cuts."""
    labels = ["a ☃", "a  ☃", "a ☂", "b"] * 25
    rows = [Record("r", "one " * n, label, "Yes.") for n, label in enumerate(labels, 1)]
    rows.append(Record("r", "one " * 1020, "b"))  # too long with the prefix alone
    text = shown(rows, "--spiece", spiece)
    assert "100 rationales are the same: 'yes.'" in text
    assert "a ☃ 50 49.5%" in text
    assert "input 61 101 110 1,030 1 (over 1,024)" in text
    assert "0 (over 64) 75 rationale" in text  # with <unk>
