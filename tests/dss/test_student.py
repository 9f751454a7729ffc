"""Student: probabilities of labels are the model's, and label and rationale are told apart."""

import math

import pytest
import torch
from checkpoints import make_student
from hypothesis import given, settings
from hypothesis import strategies as st

from dss.generate import score
from dss.student import Student

QUESTIONS = ["how many apples are there?", "Tom gave Mia pears", "boxes left plus one", "two?"]


@pytest.fixture(scope="module")
def student(tmp_path_factory, spiece):
    """A directory with an untrained student, which has no dss.json."""
    return make_student(tmp_path_factory.mktemp("student"), spiece)


@settings(max_examples=10)
@given(st.data())
def test_a_closed_set_is_never_left_and_its_scores_are_the_models_probabilities(student, data):
    words = st.sampled_from("one two three four apples pears left".split())
    labels = data.draw(st.lists(words, min_size=1, unique=True))
    texts = data.draw(st.lists(st.sampled_from(QUESTIONS), min_size=1, max_size=5))
    answers = Student.load(student, batch_size=3).score(texts, [labels] * len(texts))
    loaded = Student.load(student)
    model, tok = loaded.model, loaded.tokenizer
    for text, scores in zip(texts, answers):
        assert set(scores) == set(labels) and math.isclose(sum(scores.values()), 1, rel_tol=1e-9)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        want = []
        for label in labels:
            ids = tok.encode(label)
            (logits,) = model.logits([tok.encode("predict: " + text)], [[0, *ids[:-1]]])
            logs = logits.detach().log_softmax(-1)
            want.append(float(logs.gather(1, torch.tensor(ids)[:, None]).sum()))
        shares = torch.tensor(want, dtype=torch.float64).softmax(0).tolist()
        assert all(math.isclose(scores[x], p, abs_tol=1e-5) for x, p in zip(labels, shares))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_a_score_does_not_depend_on_what_else_is_scored(student, batch_size):
    loaded = Student.load(student)
    model, tok = loaded.model, loaded.tokenizer
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


WRITTEN = {"single_task": "Tom gave <extra_id_0> two", "label_first": "two <extra_id_0> Tom gave"}


@pytest.mark.parametrize("method", WRITTEN)
def test_label_and_rationale_in_one_output_are_told_apart(student, monkeypatch, method):
    """What the student writes is scripted. For a label alone, label_first stops at a separator."""

    def written(model, inputs, longest, batch_size, stop):
        ids = loaded.tokenizer.encode(WRITTEN[method])[:-1]
        return [ids[: ids.index(stop)] if stop else ids for _ in inputs]

    monkeypatch.setattr("dss.student.generate", written)
    loaded = Student.load(student, method=method)
    assert loaded.answer(["x"]) == ["two"] and loaded.explain(["x"]) == ["Tom gave"]


def test_a_label_first_answer_and_its_score_end_at_the_separator(student):
    loaded = Student.load(student, method="label_first", max_target_length=20, max_new_tokens=20)
    separator = loaded.tokenizer.special["<extra_id_0>"]
    matrix = loaded.model.output_matrix
    with torch.no_grad():
        matrix[separator] = matrix.sum(0)  # so that it is written at times
    whole = loaded.write("predict", QUESTIONS, 20)
    for label, ids in zip(loaded.answer(QUESTIONS), whole):
        end = ids.index(separator) if separator in ids else len(ids)
        assert label == loaded.tokenizer.decode(ids[:end])
    (scores,) = loaded.score(["how many"], [["one", "two"]])
    question = loaded.encode("predict", ["how many"])
    ids = [[*loaded.tokenizer.encode(label)[:-1], separator] for label in ("one", "two")]
    logs = torch.tensor(score(loaded.model, question, [ids])[0], dtype=torch.float64)
    want = logs.softmax(0).tolist()
    assert [scores["one"], scores["two"]] == pytest.approx(want)
    with pytest.raises(ValueError, match="cannot score"):
        Student.load(student, method="single_task").score(["x"], [["one"]])
    with pytest.raises(ValueError, match="the same tokens"):
        loaded.score(["x"], [["one", " one"]])


@pytest.mark.parametrize("ask", ["answer", "explain", "answer_with_rationale"])
def test_one_text_in_place_of_a_list_is_refused(student, ask):
    """Each of its letters would be answered."""
    with pytest.raises(TypeError, match="a list of texts"):
        getattr(Student.load(student), ask)("how many?")
    with pytest.raises(TypeError, match="a list of texts"):
        Student.load(student).score("how", [["one", "two"]] * 3)


@pytest.mark.parametrize("method", ["dss", "label_first", "single_task"])
def test_a_blank_text_has_a_blank_answer_and_changes_no_other(student, method):
    loaded = Student.load(student, method=method, max_new_tokens=5, max_target_length=5)
    first, blank, spaces, last = loaded.answer(["how many?", "", " \n", "two"])
    assert (blank, spaces) == ("", "") and [first, last] == loaded.answer(["how many?", "two"])
    assert loaded.explain(["", "how many?"])[0] == ""


def test_the_likeliest_of_the_choices_is_the_answer(student, spiece):
    """Of those that the input lists, once each; else of the closed set."""
    loaded = Student.load(student, answers="likeliest", labels=["left", "right"])
    question = "Where?\n(a) one box\n(b) two pears\n(c) two pears"
    (scores,) = loaded.score([question], [["one box", "two pears"]])
    assert loaded.answer([question]) == [next(iter(scores))]
    (scores,) = loaded.score(["Where?"], [["left", "right"]])
    assert loaded.answer(["Where?"]) == [next(iter(scores))]
    with pytest.raises(ValueError, match="no closed set"):
        Student.load(student, answers="likeliest").answer(["Where?"])
    assert Student.load(student, method="single_task", answers="likeliest").answer([question])
