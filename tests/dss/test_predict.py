"""dss.predict: labels as the student gives them, in the order and form of the input."""

import io
import json
import sys

import pytest
from running import json_lines

from data.jsonl import Record, write_jsonl
from dss import predict
from dss.generate import generate
from dss.student import Student
from dss.weights import load_t5
from tokenizer import T5Tokenizer

QUESTIONS = [
    "how many apples are there?",
    "Tom gave Mia pears",
    "boxes left plus one",
    "two times three, how many?",
]


def run(capsysbinary, *arguments):
    status = predict.main([str(a) for a in arguments])
    out, err = capsysbinary.readouterr()
    return status, out.decode().splitlines(), err.decode()


@pytest.fixture
def rows(tmp_path):
    rows = []
    for i, question in enumerate(QUESTIONS):
        rows.append(Record(f"r{i}", question, "one", "gold reason", other={"mine": i}))
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return tmp_path / "rows.jsonl"


def test_a_line_in_is_a_label_out_as_the_student_decodes_it(student, tmp_path, capsysbinary):
    lines = tmp_path / "questions.txt"
    lines.write_text("\n".join([*QUESTIONS[:2], "", *QUESTIONS[2:]]) + "\n")
    status, out, _ = run(capsysbinary, student, lines, "--max_new_tokens", "6", "--batch_size", "2")
    model, tok = load_t5(student), T5Tokenizer(student)
    ids = generate(model, [tok.encode("predict: " + q) for q in QUESTIONS], 6)
    want = [" ".join(tok.decode(i).split()) for i in ids]
    assert status == 0 and out == [*want[:2], "", *want[2:]], "a blank line keeps its place"


def test_rows_keep_their_keys_and_gain_a_prediction_and_an_explanation(
    student, rows, capsysbinary, tmp_path
):
    made = tmp_path / "made.jsonl"
    status, out, _ = run(
        capsysbinary, student, rows, "--max_new_tokens", "3", "--explain", "--output", made
    )
    assert status == 0 and not out
    for row, before in zip(json_lines(made), json_lines(rows), strict=True):
        assert isinstance(row.pop("prediction"), str) and isinstance(row.pop("explanation"), str)
        assert row == before, "the student's words do not replace the teacher's"


def test_standard_input_is_read(student, capsysbinary, monkeypatch):
    text = "\n".join(QUESTIONS)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    status, out, _ = run(capsysbinary, student, "--labels", "one", "two", "--batch_size", "3")
    assert status == 0 and len(out) == 4 and set(out) <= {"one", "two"}


# ---- Closed sets, and what is said of the answers ----


@pytest.fixture(scope="module")
def classes(student, tmp_path_factory):
    """A directory with a student that was trained on the labels one, two and three."""
    directory = tmp_path_factory.mktemp("classes") / "student"
    loaded = Student.load(student, labels=["one", "two", "three"], max_new_tokens=4)
    loaded.save(directory)
    return directory


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--labels one,two", "at least two labels after --labels, with spaces between; got"),
        ("--labels one, two", "'one,' is not a label of this student: one, two, three"),
        ("--scores --labels One two", "'One' is not a label of this student"),
    ],
)
def test_labels_that_are_none_are_refused(classes, rows, refused, arguments, words):
    assert words in refused(predict.main, classes, rows, *arguments.split())


def test_scores_alone_are_of_the_stored_labels(classes, rows, capsysbinary):
    status, out, err = run(capsysbinary, classes, rows, "--scores")
    assert status == 0 and "among" not in err
    assert out == run(capsysbinary, classes, rows, "--scores", "--labels")[1]
    for line in out:
        assert set(json.loads(line)["scores"]) == {"one", "two", "three"}


@pytest.mark.parametrize(
    "written, outside, right",
    [
        (["one", "two", "three", "one"], 0, 2),
        (["one", "_two", "onetwo", ""], 3, 1),
    ],
)
def test_answers_right_and_outside_the_stored_labels_are_counted(
    classes, rows, capsysbinary, monkeypatch, written, outside, right
):
    monkeypatch.setattr(Student, "answer", lambda self, inputs: written)
    status, _, err = run(capsysbinary, classes, rows)
    told = f"{outside} of 4 answers are not among the student's labels; --labels chooses among th"
    assert status == 0 and (told in err) == (outside > 0)
    assert f"right on {right} of 4 rows with a label" in err


def test_inputs_that_are_cut_are_counted(student, rows, capsysbinary):
    tok = T5Tokenizer(student)
    longest = max(len(tok.encode("predict: " + question)) for question in QUESTIONS)
    for length, told in ((longest, ""), (longest - 1, f"1 of 4 inputs cut at {longest - 1} tok")):
        few = ["--max-new-tokens", "2", "--max-input-length", str(length)]
        _, _, err = run(capsysbinary, student, rows, *few)
        assert told in err and ("inputs cut" in err) == bool(told)


def test_a_student_without_rationales_or_labels_explains_and_scores_nothing(
    student, rows, tmp_path, refused
):
    Student.load(student, method="standard").save(tmp_path / "s")
    assert "without rationales" in refused(predict.main, tmp_path / "s", rows, "--explain")
    assert "at least two labels" in refused(predict.main, student, rows, "--scores")


# ---- Files of other formats ----

ROW = '{"input": "Tom gave Mia pears"}'


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("new", f"[{ROW}]".encode(), "JSON array"),
        ("new", b"one\ntw\xff", "not UTF-8"),
        ("new.csv", b"input,label\nTom,one\n", "a table"),
        ("bad.jsonl", f'{ROW}\n{{"inputs": "y"}}'.encode(), 'bad.jsonl:2: there is no "input"'),
    ],
)
def test_what_is_neither_jsonl_nor_lines_is_named(student, tmp_path, refused, name, content, words):
    (tmp_path / name).write_bytes(content)
    error = refused(predict.main, student, tmp_path / name, "--output", tmp_path / "made")
    assert words in error and f"/{name}:" in error
    assert not list(tmp_path.glob("made*"))


@pytest.mark.parametrize(
    "content, answers",
    [
        (b"[Tom] gave Mia pears\n(a) one, [two]", 2),
        (b"\xef\xbb\xbfTom gave Mia pears\r\n", 1),
        (f"\ufeff{ROW}\n\n{ROW}\n".encode(), 2),
        (b"", 0),
    ],
)
def test_what_only_looks_like_another_format_is_answered(
    student, tmp_path, capsysbinary, content, answers
):
    (tmp_path / "new").write_bytes(content)
    status, out, _ = run(capsysbinary, student, tmp_path / "new", "--labels", "one", "two")
    assert status == 0 and len(out) == answers
    for line in out:
        assert line in ("one", "two") or json.loads(line)["prediction"] in ("one", "two")
