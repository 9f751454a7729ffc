"""Student: probabilities of labels are the model's, and label and rationale are told apart."""

import pytest
import torch

from dss.generate import score
from dss.methods import PREDICT
from dss.student import Student

QUESTIONS = ["how many apples are there?", "Tom gave Mia pears", "boxes left plus one", "two?"]


@pytest.mark.parametrize("method, end", [("dss", "</s>"), ("label_first", "<extra_id_0>")])
def test_scores_are_the_models_probabilities_shared_among_the_labels(student, method, end):
    """The token that ends a label is part of it; dss.generate's own test has the likelihoods."""
    loaded = Student.load(student, method=method, batch_size=3)
    labels = ["one", "two", "apples left", "pears"]
    ids = [loaded.tokenizer.encode(label + end)[:-1] for label in labels]
    for text, scores in zip(QUESTIONS, loaded.score(QUESTIONS, [labels] * 4)):
        logs = score(loaded.model, loaded.encode(PREDICT, [text]), [ids])[0]
        want = dict(zip(labels, torch.tensor(logs).softmax(0).tolist()))
        assert scores == pytest.approx(want, rel=1e-4)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_sets_that_cannot_be_scored_are_refused(student):
    with pytest.raises(ValueError, match="cannot score"):
        Student.load(student, method="single_task").score(["x"], [["one"]])
    with pytest.raises(ValueError, match="the same tokens"):
        Student.load(student).score(["x"], [["one", " one"]])
    with pytest.raises(ValueError, match="no closed set"):
        Student.load(student, answers="likeliest").answer(["Where?"])


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


@pytest.mark.parametrize("ask", ["answer", "explain", "predict"])
def test_one_text_in_place_of_a_list_is_refused(student, ask):
    """Each of its letters would be answered."""
    with pytest.raises(TypeError, match="a list of texts"):
        getattr(Student.load(student), ask)("how many?")


@pytest.mark.parametrize("method", ["dss", "label_first", "single_task"])
def test_a_blank_text_has_a_blank_answer_and_changes_no_other(student, method):
    loaded = Student.load(student, method=method, max_new_tokens=5, max_target_length=5)
    first, blank, spaces, last = loaded.answer(["how many?", "", " \n", "two"])
    assert (blank, spaces) == ("", "") and [first, last] == loaded.answer(["how many?", "two"])
    assert loaded.explain(["", "how many?"])[0] == ""


def test_the_likeliest_of_the_choices_is_the_answer(student):
    """Of those that the input lists, once each; else of the closed set."""
    loaded = Student.load(student, answers="likeliest", labels=["left", "right"])
    choices = "Where?\n(a) one box\n(b) two pears\n(c) two pears"
    for question, labels in ((choices, ["one box", "two pears"]), ("Where?", loaded.labels)):
        (scores,) = loaded.score([question], [labels])
        assert loaded.answer([question]) == [next(iter(scores))]
    assert Student.load(student, method="single_task", answers="likeliest").answer([choices])
