"""When is a predicted label right? As a text, as one of the choices in the question, or as the value of an equation."""

import re

from data.answers import CHOICES, same_choice
from data.equation import same_value, value


def text_right(prediction, label, _input=""):
    """The same text, white space apart."""
    return prediction.split() == label.split()


def choice_right(prediction, label, input):
    """The same choice of those the input lists: `(c) park`, `c`, `(c)` and `park` are, in any case of letters."""
    return text_right(prediction, label) or same_choice(prediction, label, input)


def equation_right(prediction, label, _input=""):
    """Equations of the same value: `84 / 2` = `( 84.0 / 2.0 )`."""
    return same_value(prediction, label)


METRICS = {"text": text_right, "choice": choice_right, "equation": equation_right}


def choose_metric(rows):
    """The metric that fits rows (with .input and .label): choices in every input; every label arithmetic with an
    operator in some; else text."""
    rows = [row for row in rows if row.label is not None]
    if rows and all(len(CHOICES.findall(row.input)) > 1 for row in rows):
        return "choice"
    labels = [row.label for row in rows]
    if (
        labels
        and all(value(label) is not None for label in labels)
        and any(re.search(r"\d\s*[+*/-]", s) for s in labels)
    ):
        return "equation"
    return "text"


def accuracy(predictions, rows, metric):
    """(share right, [right or not for each]) of predicted texts against rows with .input and a .label."""
    right = [METRICS[metric](p, row.label, row.input) for p, row in zip(predictions, rows, strict=True)]
    return sum(right) / max(len(right), 1), right
