"""dss.predict: labels as the student gives them, in the order and form of the input."""

import io
import json
import subprocess
import sys

import pytest
from checkpoints import make_student
from running import ROOT

from data.jsonl import Record, write_jsonl
from dss import predict
from dss.generate import generate
from dss.weights import load_t5
from tokenizer import T5Tokenizer

QUESTIONS = [
    "how many apples are there?",
    "Tom gave Mia pears",
    "boxes left plus one",
    "two times three, how many?",
]


@pytest.fixture(scope="module")
def student(tmp_path_factory, spiece):
    """A directory with an untrained student, which has no dss.json."""
    return make_student(tmp_path_factory.mktemp("student"), spiece)


def run(capsysbinary, *arguments):
    status = predict.main([str(a) for a in arguments])
    out, err = capsysbinary.readouterr()
    return status, out.decode().splitlines(), err.decode()


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "questions.txt").write_text("\n".join([*QUESTIONS[:2], "", *QUESTIONS[2:]]) + "\n")
    return tmp_path / "questions.txt"


@pytest.fixture
def rows(tmp_path):
    rows = [
        Record(f"r{i}", q, "one", "gold reason", other={"mine": i}) for i, q in enumerate(QUESTIONS)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return tmp_path / "rows.jsonl"


def test_a_line_in_is_a_label_out_as_the_student_decodes_it(student, lines, capsysbinary):
    status, out, _ = run(capsysbinary, student, lines, "--max_new_tokens", "6", "--batch_size", "2")
    model, tok = load_t5(student), T5Tokenizer(student)
    ids = generate(model, [tok.encode("predict: " + q) for q in QUESTIONS], 6)
    want = [" ".join(tok.decode(i).split()) for i in ids]
    assert status == 0 and out == [*want[:2], "", *want[2:]], "a blank line keeps its place"


def test_rows_keep_their_keys_and_gain_a_prediction_and_an_explanation(
    student, rows, capsysbinary, tmp_path
):
    quick = ["--max_new_tokens", "3"]
    status, out, _ = run(
        capsysbinary, student, rows, *quick, "--explain", "--output", tmp_path / "out.jsonl"
    )
    assert status == 0 and not out
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [
        {k: v for k, v in row.items() if k not in ("prediction", "explanation")} for row in made
    ] == asked
    assert all(
        isinstance(row["prediction"], str) and isinstance(row["explanation"], str) for row in made
    )
    assert [row["rationale"] for row in made] == ["gold reason"] * 4, (
        "the student's words do not replace the teacher's"
    )


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["{dir}/none", "{rows}"], "no such directory of weights"),
        (["{student}", "{dir}/none.jsonl"], "none.jsonl"),
        (["{student}", "{dir}/bad.jsonl", "--output", "{dir}/made"], 'bad.jsonl:2: "input"'),
    ],
)
def test_bad_input_ends_in_one_line_and_nothing_is_written(
    student, rows, tmp_path, refused, arguments, what
):
    (tmp_path / "bad.jsonl").write_text('{"input": "x"}\n{"inputs": "y"}\n')
    assert what in refused(
        predict.main, *(a.format(dir=tmp_path, student=student, rows=rows) for a in arguments)
    )
    assert not list(tmp_path.glob("made*"))


@pytest.mark.parametrize(
    "wrong", ["--scores", "--labels a a", "--batch_size 0", "--max-input-length 1", "--explian"]
)
def test_wrong_flags_are_named(student, wrong, refused):
    assert wrong.split()[0].replace("_", "-") in refused(predict.main, student, "-", *wrong.split())


def test_standard_input_is_read_and_a_reader_that_leaves_is_no_error(
    student, capsysbinary, monkeypatch
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(QUESTIONS).encode())))
    status, out, _ = run(capsysbinary, student, "--labels", "one", "two")
    assert status == 0 and len(out) == 4 and set(out) <= {"one", "two"}
    many = "\n".join(QUESTIONS * 200)
    command = f"{sys.executable} -m dss.predict {student} --labels one two --batch_size 4 | head -1"
    result = subprocess.run(
        command, shell=True, cwd=ROOT, input=many, capture_output=True, text=True
    )
    assert result.stdout.strip() in ("one", "two") and "Error" not in result.stderr
