"""What a teacher's text answers: a rationale, a marker, a label; and when two labels are the same.

The paper's released outputs and the replies that extract.py collects are read by the same function. Nothing is guessed:
a text without a marker, or with two different answers, has no label.
"""

import ast
import math
import operator
import re
import threading
from collections.abc import Callable, Iterable

CHOICES = re.compile(r"^\((\w)\) *(.+?)\s*$", re.MULTILINE)  # the lines "(a) park" of a question
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})

# How reasoning models mark their thoughts: <think>, <thinking>, [THINK], and the channels of OpenAI's harmony format.
THINKING = re.compile(r"\s*(<think(ing)?>|\[THINK\]|(<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>)")
ANSWERING = re.compile(r"</think(ing)?>|\[/THINK\]|<\|channel\|>final<\|message\|>")
TAGS = re.compile(r"</?think(ing)?>|\[/?THINK\]|(<\|start\|>assistant|<\|channel\|>\w+|<\|\w+\|>)+")

PARSING = threading.Lock()  # CPython 3.11 counts the depth of all threads' parsing as one: SystemError, now and then
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
OPERATORS |= {ast.UAdd: operator.pos, ast.USub: operator.neg}


def read_answer(output: str, next_examples: Iterable[str], markers: list[str], read: Callable, same: Callable) -> tuple:
    """One raw output -> (rationale, label, the text after the marker), each a text or None.

    What begins with one of `next_examples` is an invented next example and is cut off first. `markers` are in order of
    preference: of those that have a label after them, the best one divides rationale and answer. `read` finds the
    label in the text after a marker; an output with two labels that are not the `same` has none.
    """
    for text in next_examples:
        output = output.split(text)[0]
    patterns = [  # white space in a marker may differ, and Markdown may close before its colon
        r"(?<!\w)" + r"\s+".join(map(re.escape, marker.split())).replace(":", "[*_]*:") for marker in markers
    ]
    matches = list(re.finditer("|".join(sorted(patterns, key=len, reverse=True)), output, re.IGNORECASE))
    if not matches:
        return None, None, None
    ends = [match.start() for match in matches[1:]] + [len(output)]
    rests = [output[match.end() : end] for match, end in zip(matches, ends)]
    labels = [read(rest) for rest in rests]
    ranks = [[bool(re.fullmatch(p, match[0], re.IGNORECASE)) for p in patterns].index(True) for match in matches]
    best = min(range(len(matches)), key=lambda i: (labels[i] is None, ranks[i], i))
    ambiguous = any(label is not None and not same(label, labels[best]) for label in labels)
    # Markdown before the marker belongs to the answer: `He runs.\n\n**` -> `He runs.`
    rationale = re.sub(r"(^|\s)[*#_>`~\s]*$", "", output[: matches[best].start()]).strip()
    return rationale or None, None if ambiguous else labels[best], rests[best]


def split_thinking(text: str) -> tuple[str, str]:
    """`<think>Hm.</think>The answer` -> ("Hm.", "The answer"): a reasoning model's thoughts and what it says then.

    The opening tag may be missing (a chat template can hold it); without the closing one the thought never ended.
    """
    end = max((match.end() for match in ANSWERING.finditer(text)), default=len(text) if THINKING.match(text) else 0)
    return TAGS.sub("", text[:end]).strip(), text[end:]


def choice_answer(text: str) -> str | None:
    """` (c) wooded area.` -> `wooded area`; None unless there is exactly one choice."""
    match = re.fullmatch(r"\s*\(\w\)(((?!\(\w\)).)+?)\.?\s*", text, re.DOTALL)
    return match[1].strip() if match else None


def equation_answer(text: str) -> str | None:
    """` (84 / 2).` -> `(84 / 2)`; None unless it is arithmetic."""
    match = re.search(r"\(.*\)", text)
    return match[0] if match and value(match[0]) is not None else None


def value(text):
    """The value of an arithmetic expression as a float, or None if the text is not one, is too long or too large. What
    a model wrote is never given to eval."""
    if len(text) > 200 or not re.fullmatch(r"[0-9.+\-*/()\s]+", text):
        return None
    try:
        with PARSING:
            tree = ast.parse(text.strip(), mode="eval")
        return compute(tree.body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def compute(node):
    match node:
        case ast.Constant(value=int() | float() as result):
            pass
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            result = OPERATORS[type(op)](compute(left), compute(right))
        case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
            result = OPERATORS[type(op)](compute(operand))
        case _:
            raise ValueError("not arithmetic")
    if not abs(result) <= 1e15:  # beyond it floats no longer tell integers apart; also refuses nan
        raise ValueError("too large")
    return float(result)


def class_answer(text: str, labels: Iterable[str]) -> str | None:
    """` Neutral.` -> `neutral`, the one of `labels` that the text begins with, in any case of letters; None if there
    is none or the text offers another one (`neutral or contradiction`)."""
    labels = sorted(labels, key=len, reverse=True)
    one = rf"({'|'.join(map(re.escape, labels))})(?!\w)"
    match = re.match(rf"\s*{one}(?!\W*(\b(or|and)\b|[/,])\W*{one})", text, re.IGNORECASE)
    return next(label for label in labels if label.casefold() == match[1].casefold()) if match else None


def pick(answer: str, choices: list[tuple[str, str]]) -> str | None:
    """The text of the choice, of [(letter, text)], that `answer` names by its text or else by its letter, or None.

    `(b) shop`, `B) shop`, `b. shop`, `shop`, `(b)` and `b` are one.
    """
    answer = answer.strip().casefold()
    letter, text = re.fullmatch(r"(?:\(?(\w)[).:](?=\s|$))?\s*(.*?)", answer, re.DOTALL).groups()
    for said in (answer, text):
        for _, choice in choices:
            if said and said.removesuffix(".") == choice.casefold().removesuffix("."):
                return choice
    by_letter = {mark.casefold(): choice for mark, choice in choices}
    return None if letter and text.strip(".") else by_letter.get(letter or text.removesuffix("."))


def read_label(text: str, label_type: str, labels: Iterable[str] = (), input: str = "") -> str | None:
    """The text behind a marker -> the label, or None.

    label_type: "choice" gives the choice's text as `input` lists it; "class" the one of `labels`; "equation" the
    arithmetic as written; "text" the first line. Bold, code and mathematical markup around it, which chat models
    like, is taken off.
    """
    line = text.strip(":*`$\"' \t\r\n").split("\n")[0].rstrip("*`$\"'. \t\r")
    if re.search(r"\\(boxed|text)", line):
        line = re.sub(r"\\(boxed|text)\s*\{|\}", "", line).strip("$. ")
    if label_type == "choice":
        return None if len(re.findall(r"\(\w\)", line)) > 1 else pick(line, CHOICES.findall(input))
    if label_type == "class":
        return class_answer(line, labels)
    if label_type == "equation":
        line = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", line).translate(SIGNS)  # 1,000 is a thousand
        plain = line.split("=")[0].strip()
        return plain if value(plain) is not None else equation_answer(line)
    return line or None


def same_label(a: str, b: str, label_type: str, input: str = "") -> bool:
    """Whether two labels are the same: equations by value (`84 / 2` = `( 84.0 / 2.0 )`), choices by the choice of
    `input` they name (`(c) park`, `c`, `(c)` and `park` are one) or as texts, classes in any case of letters, texts by
    their words."""
    if label_type == "equation":
        x, y = value(a), value(b)
        return x is not None and y is not None and math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-9)
    if label_type == "choice":
        choices = CHOICES.findall(input)
        a, b = pick(a, choices) or a, pick(b, choices) or b
    if label_type in ("choice", "class"):
        a, b = a.casefold(), b.casefold()
    return a.split() == b.split()


def choose_label_type(rows: Iterable) -> str:
    """The label type that fits rows (with .input and .label): choices in every input; every label arithmetic, with an
    operator in some; else text."""
    rows = [row for row in rows if row.label is not None]
    if rows and all(len(CHOICES.findall(row.input)) > 1 for row in rows):
        return "choice"
    arithmetic = all(value(row.label) is not None for row in rows)
    return "equation" if arithmetic and any(re.search(r"\d\s*[+*/-]", row.label) for row in rows) else "text"
