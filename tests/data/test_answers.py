"""When is a label right: as a text, as a choice, as the value of an equation computed without
eval.
"""

import pytest

from data.answers import (
    choose_label_type,
    class_answer,
    closed_set,
    is_free_text,
    same_label,
    token_f1,
    value,
)
from data.jsonl import Record

VALUES = {"8 - 2 - 3": 3, "8 / 2 / 2": 2, "2 + 3 * 4": 14, "-(2 - 3) * .5": 0.5}
NO_VALUE = "x 9**9 1//2 1/0 9e99 0x10 1_000 1,000 (1 (1)) 2(3) __import__('os')".split()


@pytest.mark.parametrize("text", [*VALUES, *NO_VALUE, "", "2 3", "(" * 5000, "9" * 16])
def test_a_value_is_what_python_computes_of_bounded_arithmetic(text):
    assert value(text) == VALUES.get(text)


def test_equations_are_equal_by_value():
    assert same_label("(7 * 30)", "( 30.0 * 7.0 )", "equation")
    assert not same_label("84 / 2", "84 - 2", "equation")


QUESTION = "Where?\nAnswer Choices:\n(a) park\n(b) U.S.\n(c) wooded area\n(d) b\n(e) park"


def test_a_choice_is_named_by_text_or_letter():
    for said in ("wooded area", "(c) wooded area", "c", "C)", "(c)", "c. Wooded area.", "C"):
        assert same_label(said, "wooded area", "choice", QUESTION), said
    for said in ("", "(c", "(a) wooded", "park", "f", "wooded"):
        assert not same_label(said, "wooded area", "choice", QUESTION), said
    assert same_label("b", "b", "choice", QUESTION), "the text of (d), not the letter of (b)"
    assert same_label("(b) U.S", "U.S.", "choice", QUESTION)
    for said in ("(e)", "a"):
        assert same_label(said, "park", "choice", QUESTION)


def kind_of(labels, question="How many?"):
    return choose_label_type([Record("r", question, label) for label in labels])


def test_the_metric_fits_the_rows():
    assert kind_of(["park"], QUESTION) == "choice"
    assert kind_of(["( 84.0 / 2.0 )", "12"]) == kind_of(["2 + 3", "(2 * 3)"]) == "equation"
    assert kind_of(["neutral"]) == kind_of(["35 - 44", "45 - 54", "(55 - 64)"] * 5) == "text"
    for labels in ("2 12", "35-44 45-54", "2-1 0-0", "1/2 2/4", "2024-05-01 2023-04-02"):
        assert kind_of(labels.split()) == "text", "it only looks like an equation"


WRITTEN = {"cafe\u0301": "café", "m²": "m2", "Ａ１": "A1", "a\u200bb  c ": "a b c"}
WRITTEN["\u0958"] = "\u0915\u093c"  # a letter of Hindi that NFKC takes apart


@pytest.mark.parametrize("a, b", WRITTEN.items())
def test_a_label_is_right_if_it_is_what_the_tokenizer_can_write(a, b):
    assert same_label(a, b, "text") and same_label(a, b, "class")
    assert closed_set([a, b, b, "other"] * 5, "text") == sorted([b, "other"]), "one class"
    assert not same_label("é", "e", "text") and not same_label("A", "a", "text")


CLASSES = ["refund_request", "bug", "very-late", "-1"]
SAID = {"Refund-request.": "refund_request", "VERY LATE": "very-late", "-1": "-1", "1": None}
SAID |= {
    "refund": None,
    "refundrequest": None,
    "bug / -1": None,
    "bug or very late": None,
    "bugs": None,
}


@pytest.mark.parametrize("text", SAID)
def test_classes_are_compared_without_case_and_separators(text):
    assert class_answer(text, CLASSES) == SAID[text]


def test_free_text_is_told_from_classes_and_measured_by_its_words():
    commits = [f"fix case {i}" for i in range(30)]
    assert is_free_text(commits, "text") and not is_free_text(["a", "b"] * 20, "text")
    assert token_f1("Fix the case", "fix case 1") == pytest.approx(2 / 3)
