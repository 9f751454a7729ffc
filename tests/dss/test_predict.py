"""dss.predict: labels as the student gives them, never outside a closed set, in the order and form of the input."""

import io
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import ROOT

import tokenizer
from data.jsonl import Record, write_jsonl
from dss import predict
from dss.config import SIZES
from dss.generate import generate, score
from dss.model import T5
from dss.student import Student
from dss.weights import load_t5, save_t5

QUESTIONS = ["how many apples are there?", "Tom gave Mia pears", "boxes left plus one", "two times three, how many?"]


@pytest.fixture(scope="module")
def student(tmp_path_factory, spiece):
    """A directory with an untrained student and its tokenizer."""
    directory = tmp_path_factory.mktemp("student")
    torch.manual_seed(3)
    tok = tokenizer.T5Tokenizer(spiece)
    save_t5(T5(replace(SIZES["tiny"], vocab_size=tok.vocab_size)), directory)
    tok.save(directory)
    return directory


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
    rows = [Record(f"r{i}", q, "one", "gold reason", other={"mine": i}) for i, q in enumerate(QUESTIONS)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return tmp_path / "rows.jsonl"


def test_a_line_in_is_a_label_out_as_the_student_decodes_it(student, lines, capsysbinary):
    status, out, _ = run(capsysbinary, student, lines, "--max_new_tokens", "6", "--batch_size", "2")
    model, tok = load_t5(student), tokenizer.T5Tokenizer(student)
    ids = generate(model, [tok.encode("predict: " + q) for q in QUESTIONS], 6)
    want = [" ".join(tok.decode(i).split()) for i in ids]
    assert status == 0 and out == [*want[:2], "", *want[2:]], "a blank line keeps its place"


def test_rows_keep_their_keys_and_gain_a_prediction_and_an_explanation(student, rows, capsysbinary, tmp_path):
    quick = ["--max_new_tokens", "3", "--max_target_length", "5"]
    status, out, _ = run(capsysbinary, student, rows, *quick, "--explain", "--output", tmp_path / "out.jsonl")
    assert status == 0 and not out
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k not in ("prediction", "explanation")} for row in made] == asked
    assert all(isinstance(row["prediction"], str) and isinstance(row["explanation"], str) for row in made)
    assert [row["rationale"] for row in made] == ["gold reason"] * 4, "the student's words do not replace the teacher's"


@settings(max_examples=10)
@given(st.data())
def test_a_closed_set_is_never_left_and_its_scores_are_the_models_probabilities(student, data):
    words = st.sampled_from("one two three four apples pears left".split())
    labels = data.draw(st.lists(words, min_size=1, unique=True))
    texts = data.draw(st.lists(st.sampled_from(QUESTIONS), min_size=1, max_size=5))
    answers = Student.load(student, batch_size=3).score(texts, [labels] * len(texts))
    model, tok = load_t5(student), tokenizer.T5Tokenizer(student)
    for text, scores in zip(texts, answers):
        assert set(scores) == set(labels) and math.isclose(sum(scores.values()), 1, rel_tol=1e-9)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        want = []
        for label in labels:
            ids = tok.encode(label)
            (logits,) = model.logits([tok.encode("predict: " + text)], [[0, *ids[:-1]]])
            want.append(float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().detach()))
        shares = torch.tensor(want, dtype=torch.float64).softmax(0).tolist()
        assert all(math.isclose(scores[x], p, abs_tol=1e-5) for x, p in zip(labels, shares))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_a_score_does_not_depend_on_what_else_is_scored(student, batch_size):
    model, tok = load_t5(student), tokenizer.T5Tokenizer(student)
    inputs = [tok.encode(q) for q in QUESTIONS]
    candidates = [[tok.encode(w) for w in "one two apples left".split()[: i + 1]] for i in range(4)]
    alone = [[score(model, [i], [[c]])[0][0] for c in cs] for i, cs in zip(inputs, candidates)]
    together = score(model, inputs, candidates, batch_size)
    assert [len(s) for s in together] == [1, 2, 3, 4]
    for a, b in zip(sum(alone, []), sum(together, [])):
        assert math.isclose(a, b, rel_tol=1e-5)


def test_labels_of_probability_0_are_ranked_too(student, monkeypatch):
    monkeypatch.setattr("dss.student.score", lambda *_: [[-1.0, -1000.0, -800.0]])
    (scores,) = Student.load(student).score(["How many?"], [["one", "two", "left"]])
    assert list(scores) == ["one", "left", "two"] and scores["left"] == 0


def test_choices_are_those_of_each_question(student, tmp_path, capsysbinary):
    rows = [Record("a", "Where?\nAnswer Choices:\n(a) park\n(b) sea"), Record("b", "Who?\n(a) Tom\n(b) Mia\n(c) Ann")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    status, out, _ = run(capsysbinary, student, tmp_path / "rows.jsonl", "--choices", "--scores")
    first, second = map(json.loads, out)
    assert status == 0 and set(first["scores"]) == {"park", "sea"} and second["prediction"] in ("Tom", "Mia", "Ann")
    twice = Record("c", "Where?\n(a) park\n(b) sea\n(c) park")
    write_jsonl(tmp_path / "twice.jsonl", [twice])
    _, out, _ = run(capsysbinary, student, tmp_path / "twice.jsonl", "--choices", "--scores")
    assert math.isclose(sum(json.loads(out[0])["scores"].values()), 1), "a choice listed twice is one"


WRITTEN = {"single_task": "Tom gave <extra_id_0> two", "label_first": "two <extra_id_0> Tom gave"}


@pytest.mark.parametrize("method", WRITTEN)
def test_label_and_rationale_in_one_output_are_told_apart(student, monkeypatch, method):
    """What the student writes is scripted; label_first stops at the separator when a label is all that is asked for."""

    def written(model, inputs, longest, batch_size, stop):
        ids = loaded.tokenizer.encode(WRITTEN[method])[:-1]
        return [ids[: ids.index(stop)] if stop else ids for _ in inputs]

    monkeypatch.setattr("dss.student.generate", written)
    loaded = Student.load(student, method=method)
    assert loaded.answer(["x"]) == ["two"] and loaded.explain(["x"]) == ["Tom gave"]


def test_a_label_first_answer_is_the_beginning_of_what_it_writes_and_its_score_ends_at_the_separator(student):
    loaded = Student.load(student, method="label_first", max_target_length=20, max_new_tokens=20)
    separator = loaded.tokenizer.special["<extra_id_0>"]
    with torch.no_grad():
        loaded.model.output_matrix[separator] = loaded.model.output_matrix.sum(0)  # so that it is written at times
    whole = loaded.write("predict", QUESTIONS, 20)
    for label, ids in zip(loaded.answer(QUESTIONS), whole):
        assert label == loaded.tokenizer.decode(ids[: ids.index(separator)] if separator in ids else ids)
    (scores,) = loaded.score(["how many"], [["one", "two"]])
    question = loaded.encode("predict", ["how many"])
    ids = [[*loaded.tokenizer.encode(label)[:-1], separator] for label in ("one", "two")]
    want = torch.tensor(score(loaded.model, question, [ids])[0], dtype=torch.float64).softmax(0).tolist()
    assert [scores["one"], scores["two"]] == pytest.approx(want)
    with pytest.raises(ValueError, match="cannot score"):
        Student.load(student, method="single_task").score(["x"], [["one"]])
    with pytest.raises(ValueError, match="the same tokens"):
        loaded.score(["x"], [["one", " one"]])


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["{dir}/none", "{rows}"], "no such directory of weights"),
        (["{student}", "{dir}/none.jsonl"], "none.jsonl"),
        (["{student}", "{rows}", "--choices"], "the input lists none"),
        (["{student}", "{dir}/bad.jsonl", "--output", "{dir}/made"], 'bad.jsonl:2: "input"'),
    ],
)
def test_bad_input_ends_in_one_line_and_nothing_is_written(student, rows, tmp_path, refused, arguments, what):
    (tmp_path / "bad.jsonl").write_text('{"input": "x"}\n{"inputs": "y"}\n')
    assert what in refused(predict.main, *(a.format(dir=tmp_path, student=student, rows=rows) for a in arguments))
    assert not list(tmp_path.glob("made*"))


@pytest.mark.parametrize("wrong", ["--scores", "--labels a a", "--labels a --choices", "--batch_size 0", "--explian"])
def test_wrong_flags_are_named(student, wrong, refused):
    assert wrong.split()[0].replace("_", "-") in refused(predict.main, student, "-", *wrong.split())


def test_standard_input_is_read_and_a_reader_that_leaves_is_no_error(student, capsysbinary, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(QUESTIONS).encode())))
    status, out, _ = run(capsysbinary, student, "--labels", "one", "two")
    assert status == 0 and len(out) == 4 and set(out) <= {"one", "two"}
    many = "\n".join(QUESTIONS * 2000)
    command = f"{sys.executable} -m dss.predict {student} --labels one two --batch_size 4 | head -1"
    result = subprocess.run(command, shell=True, cwd=ROOT, input=many, capture_output=True, text=True)
    assert result.stdout.strip() in ("one", "two") and "Error" not in result.stderr
