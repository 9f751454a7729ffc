"""What a teacher's text answers: a rationale, a marker, a label; and when two labels are the same.

The paper's released outputs and the replies that extract.py collects are cut by the same function. Nothing is guessed:
a text without the marker, or with two answers behind it, has no label.
"""

import re

from data.equation import same_value, value

CHOICES = re.compile(r"^\((\w)\) *(.+?)\s*$", re.MULTILINE)  # the lines "(a) park" of a question
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})


def cut(output, next_examples, marker):
    """One raw output -> (rationale, the text behind the marker), both None where the marker, a regular expression, is
    missing. What begins with one of `next_examples` is an invented next example and is cut off first."""
    for text in next_examples:
        output = output.split(text)[0]
    match = re.search(marker, output)
    if not match:
        return None, None
    return output[: match.start()].strip() or None, output[match.end() :]


def split_thinking(text):
    """`<think>Hm.</think>The answer` -> ("Hm.", "The answer"): a reasoning model's thoughts and what it says then.

    The opening tag may be missing (a chat template can hold it); without the closing one the thought never ended.
    """
    thought, closed, said = text.rpartition("</think>")
    if not closed:
        thought, said = (text, "") if text.lstrip().startswith("<think>") else ("", text)
    return re.sub(r"</?think>", "", thought).strip(), said


def choice_answer(text):
    """` (c) wooded area.` -> `wooded area`; None unless there is exactly one choice."""
    match = re.fullmatch(r"\s*\(\w\)(((?!\(\w\)).)+?)\.?\s*", text, re.DOTALL)
    return match[1].strip() if match else None


def equation_answer(text):
    """` (84 / 2).` -> `(84 / 2)`; None unless it is arithmetic."""
    match = re.search(r"\(.*\)", text)
    return match[0] if match and value(match[0]) is not None else None


def class_answer(text, labels):
    """` Neutral.` -> `neutral`, the one of `labels` that the text begins with, in any case of letters, or None."""
    for label in sorted(labels, key=len, reverse=True):
        if re.match(rf"\s*{re.escape(label)}(?!\w)", text, re.IGNORECASE):
            return label
    return None


def pick(answer, choices):
    """The text of the choice, of [(letter, text)], that `answer` names by its text or else by its letter, or None."""
    letter, text = re.fullmatch(r"(?:\((\w)\))?\s*(.*?)\.?\s*", answer.strip().casefold(), re.DOTALL).groups()
    for _, choice in choices:
        if text and text == choice.casefold().removesuffix("."):
            return choice
    by_letter = {mark.casefold(): choice for mark, choice in choices}
    return None if letter and text else by_letter.get(letter or text)


def same_choice(a, b, input):
    """Whether two answers name the same choice of those `input` lists, in any case of letters."""
    x, y = (pick(answer, CHOICES.findall(input)) for answer in (a, b))
    return x is not None and y is not None and x.casefold() == y.casefold()


def read_label(text, label_type, labels=(), input=""):
    """What stands behind the marker -> the label, or None if it is none.

    label_type: "choice" gives the choice's text as `input` lists it; "class" the one of `labels`; "equation" the
    arithmetic as written; "text" the first line. Signs of bold, code and mathematics around it, which chat models
    like, are taken off.
    """
    line = text.strip("*`$\"' \t\r\n").split("\n")[0].rstrip("*`$\"'. \t\r")
    if label_type == "choice":
        return None if len(re.findall(r"\(\w\)", line)) > 1 else pick(line, CHOICES.findall(input))
    if label_type == "class":
        return class_answer(line, labels)
    if label_type == "equation":
        line = line.translate(SIGNS)
        plain = line.split("=")[0].strip()
        return plain if value(plain) is not None else equation_answer(line)
    return line or None


def same_label(a, b, label_type, input=""):
    """Whether two labels are the same: equations by value (`84 / 2` = `( 84.0 / 2.0 )`), choices by the choice of
    `input` they name (`(c) park`, `c`, `(c)` and `park` are one), classes in any case of letters, texts by their
    words."""
    if label_type == "equation":
        return same_value(a, b)
    if label_type == "choice" and same_choice(a, b, input):
        return True
    if label_type == "class":
        a, b = a.casefold(), b.casefold()
    return a.split() == b.split()


def choose_label_type(rows):
    """The label type that fits rows (with .input and .label): choices in every input; every label arithmetic, with an
    operator in some; else text."""
    rows = [row for row in rows if row.label is not None]
    if rows and all(len(CHOICES.findall(row.input)) > 1 for row in rows):
        return "choice"
    arithmetic = all(value(row.label) is not None for row in rows)
    if rows and arithmetic and any(re.search(r"\d\s*[+*/-]", row.label) for row in rows):
        return "equation"
    return "text"
