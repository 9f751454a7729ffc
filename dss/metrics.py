"""When is a predicted label right? As a text, as one of the choices in the question, or as the value of an equation."""

from data.answers import same_label


def accuracy(predictions, rows, metric):
    """(share right, [right or not for each]) of predicted texts against rows with .input and a .label.

    metric: "text", "choice" or "equation", label types of data/answers.py.
    """
    right = [same_label(p, row.label, metric, row.input) for p, row in zip(predictions, rows, strict=True)]
    return sum(right) / max(len(right), 1), right
