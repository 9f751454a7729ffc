"""When is a label right: as a text, as a choice, as the value of an equation computed without
eval.
"""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.answers import choose_label_type, same_label, value
from data.jsonl import Record

numbers = st.integers(0, 999).map(str) | st.floats(0, 999, allow_nan=False).map(
    lambda x: f"{x:.2f}"
)
expressions = st.recursive(
    numbers,
    lambda e: st.builds("( {} {} {} )".format, e, st.sampled_from("+-*/"), e) | e.map("-{}".format),
    max_leaves=6,
)


@given(expressions)
def test_a_value_is_what_python_computes(text):
    try:
        want = eval(text)  # text is made here, of digits, + - * / and parentheses
    except ZeroDivisionError:
        want = None
    if want is None or abs(want) > 1e14 or len(text) > 200:
        return
    assert value(text) is not None and math.isclose(value(text), want, rel_tol=1e-9, abs_tol=1e-9)


@given(st.text())
def test_no_text_makes_it_raise(text):
    assert value(text) is None or math.isfinite(value(text))


NO_VALUE = ["", " ", "2 3", *"x 9**9**9 1//2 1/0 9e99 0x10 1_000 1,000 (1 1) 'a'*9 True".split()]
NO_VALUE += ["1 if 1 else 2", "__import__('os')", "(" * 99 + "1" + ")" * 99 + " " * 9, "9" * 16]


@pytest.mark.parametrize("text", NO_VALUE)
def test_what_is_not_bounded_arithmetic_has_no_value(text):
    assert value(text) is None


def test_equations_are_equal_by_value_classes_in_any_case_and_texts_by_their_words():
    for a, b in (("84 / 2", "( 84.0 / 2.0 )"), ("(7 * 30)", "( 30.0 * 7.0 )")):
        assert same_label(a, b, "equation") and not same_label(a, "84 - 2", "equation")
    assert not same_label("x", "x", "equation")
    assert same_label("Neutral ", "neutral", "class") and not same_label("a b", "ab", "text")


QUESTION = "Where?\nAnswer Choices:\n(a) park\n(b) Garden Center\n(c) wooded area\n(d) b\n(e) park"


def test_a_choice_is_named_by_text_or_letter():
    for prediction in (
        "wooded area",
        "(c) wooded area",
        "c",
        "(c)",
        "C",
        "(c) Wooded area.",
        " wooded area ",
    ):
        assert same_label(prediction, "wooded area", "choice", QUESTION), prediction
    for prediction in ("", "(c", "(a) wooded", "park", "(a) sea", "f", "wooded", "(b) park"):
        assert not same_label(prediction, "wooded area", "choice", QUESTION), prediction
    assert same_label("b", "b", "choice", QUESTION), "the text of (d), not the letter of (b)"
    assert same_label("(e)", "park", "choice", QUESTION) and same_label(
        "a", "park", "choice", QUESTION
    )


def rows(*pairs):
    return [Record(str(i), text, label) for i, (text, label) in enumerate(pairs)]


def test_the_metric_fits_the_rows():
    assert choose_label_type(rows((QUESTION, "park"))) == "choice"
    assert choose_label_type(rows(("How many?", "( 84.0 / 2.0 )"), ("?", "12"))) == "equation"
    assert choose_label_type(rows(("How many?", "2"), ("?", "12"))) == "text", (
        "counts, not equations"
    )
    assert choose_label_type(rows(("p</s>h", "neutral"))) == choose_label_type([]) == "text"
