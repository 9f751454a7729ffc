"""Read a rationale and a label from a teacher's text, and compare labels.

The paper's released outputs and the replies that extract.py collects are read by the same
functions. Nothing is guessed: a text without a marker, or with two different answers, has no label.
"""

import ast
import math
import operator
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

CHOICES = re.compile(r"^\((\w)\) *(.+?)\s*$", re.MULTILINE)  # the lines "(a) park" of a question
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
HALF_WIDTH = {
    code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)
}  # "：" -> ":", as CJK models write it
INVISIBLE = dict.fromkeys([0x61C, 0x200B, 0x200C, 0x200E, 0x200F, 0xFEFF], " ")
SEPARATORS = (
    r"(?<=[^\W_])[\s_-]+(?=[^\W_])"  # between the words of a class: refund_request, Refund Request
)

PARSING = (
    threading.Lock()
)  # ast.parse in several threads at once fails now and then in CPython 3.11
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class Labelled(Protocol):
    input: str
    label: str | None


@dataclass(frozen=True)
class Reading:
    """What a text says."""

    rationale: str | None = None
    label: str | None = None
    rest: str | None = None  # the text after the marker; None without a marker
    ambiguous: bool = False  # it has two different labels, and so none


def read_answer(
    output: str,
    next_examples: Iterable[str],
    markers: list[str],
    read: Callable[[str], str | None],
    same: Callable[[str, str], bool],
) -> Reading:
    """Find rationale and label in one raw output.

    next_examples: what begins an invented next example, which is cut off first.
    markers: what stands between rationale and label, in order of preference. Of the markers that
    have a label after them the best one divides the text.
    read: finds the label in the text after a marker. same: whether two labels are the same one.
    """
    for text in next_examples:
        output = output.split(text)[0]
    searched = output.translate(HALF_WIDTH)  # as long as `output`
    patterns = [marker_pattern(marker) for marker in markers]
    longest_first = "|".join(sorted(patterns, key=len, reverse=True))
    matches = list(re.finditer(longest_first, searched, re.IGNORECASE))
    if not matches:
        normal = unicodedata.normalize("NFKC", output)
        if normal != output and re.search(longest_first, normal, re.IGNORECASE):
            return read_answer(normal, [], markers, read, same)
        return Reading()
    starts = [match.start() for match in matches]
    labels = []
    best_rank = (True, len(patterns))
    for match, end in zip(matches, starts[1:] + [len(output)]):
        rest = output[match.end() : end]
        label = read(rest)
        labels.append(label)
        rank = (label is None, preference(match[0], patterns))
        if rank < best_rank:
            best_rank = rank
            best = match
            best_label = label
            best_rest = rest
    ambiguous = any(label is not None and not same(label, best_label) for label in labels)
    # Markdown before the marker belongs to the answer: `He runs.\n\n**` -> `He runs.`
    rationale = re.sub(r"(^|\s)[*#_>`~\s]*$", "", output[: best.start()]).strip()
    return Reading(rationale or None, None if ambiguous else best_label, best_rest, ambiguous)


def marker_pattern(marker: str) -> str:
    """White space may differ, and Markdown may close before a colon (`**Answer**:`)."""
    words = unicodedata.normalize("NFKC", marker).split()
    return r"(?<!\w)" + r"\s+".join(re.escape(word) for word in words).replace(":", r"[*_]*\s?:")


def preference(found: str, patterns: list[str]) -> int:
    """The number of the pattern that a found marker is."""
    for number, pattern in enumerate(patterns):
        if re.fullmatch(pattern, found, re.IGNORECASE):
            return number
    return len(patterns)


def choice_answer(text: str) -> str | None:
    """` (c) wooded area.` -> `wooded area`; None unless there is exactly one choice."""
    match = re.fullmatch(r"\s*\(\w\)(((?!\(\w\)).)+?)\.?\s*", text, re.DOTALL)
    return match[1].strip() if match else None


def equation_answer(text: str) -> str | None:
    """` (84 / 2).` -> `(84 / 2)`; None unless it is arithmetic."""
    match = re.search(r"\(.*\)", text)
    if match and value(match[0]) is not None:
        return match[0]
    return None


def value(text: str) -> float | None:
    """The value of an arithmetic expression, or None if the text is not one, too long or too large.

    What a model wrote is never given to eval.
    """
    if len(text) > 200 or not re.fullmatch(r"[0-9.+\-*/()\s]+", text):
        return None
    try:
        with PARSING:
            tree = ast.parse(text.strip(), mode="eval")
        return compute(tree.body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def compute(node: ast.AST) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            result = number
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            result = OPERATORS[type(op)](compute(left), compute(right))
        case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
            result = OPERATORS[type(op)](compute(operand))
        case _:
            raise ValueError("not arithmetic")
    if (
        not abs(result) <= 1e15
    ):  # larger floats no longer tell integers apart; this refuses nan, too
        raise ValueError("too large")
    return float(result)


def class_answer(text: str, labels: Iterable[str]) -> str | None:
    """` Neutral.` -> `neutral`, the one of `labels` that the text begins with.

    None if there is none or if the text offers another one (`neutral or contradiction`). Case,
    spaces, `_` and `-` are equal, unless two of the labels are one then.
    """
    labels = sorted(labels, key=len, reverse=True)
    patterns = [r"[\s_-]+".join(map(re.escape, re.split(SEPARATORS, label))) for label in labels]
    flags = re.IGNORECASE
    if len({class_key(label) for label in labels}) < len(labels):
        patterns = [re.escape(label) for label in labels]
        if len({label.casefold() for label in labels}) < len(labels):
            flags = re.UNICODE
    any_label = "|".join(patterns)
    word = r"\b(?:or|and|also|maybe|perhaps|possibly)\b"
    joined = rf"\W*(?:[/,;&|+]|{word})(?:\W|{word})*"
    match = re.match(rf"[\W_]*?({any_label})(?!\w)(?!{joined}({any_label})(?!\w))", text, flags)
    if not match:
        return None
    for label, pattern in zip(labels, patterns):
        if re.fullmatch(pattern, match[1], flags):
            return label
    return None


def class_key(label: str) -> str:
    """The same text for `refund_request`, `Refund-Request` and `refund request`."""
    return re.sub(SEPARATORS, " ", written(label)).casefold()


def written(text: str) -> str:
    """A text as a T5 tokenizer can write it: NFKC, single spaces, for invisible ones as well."""
    return " ".join(unicodedata.normalize("NFKC", text).translate(INVISIBLE).split())


def pick(answer: str, choices: list[tuple[str, str]]) -> str | None:
    """The text of the choice, of [(letter, text)], that `answer` names by its text or else by its
    letter, or None.

    `(b) shop`, `B) shop`, `b. shop`, `shop`, `(b)` and `b` are one.
    """
    answer = written(answer).casefold()
    letter, text = re.fullmatch(r"(?:\(?(\w)[).:](?=\s|$))?\s*(.*?)", answer, re.DOTALL).groups()
    for said in (answer, text):
        for _, choice in choices:
            if said and said.removesuffix(".") == written(choice).casefold().removesuffix("."):
                return choice
    if letter and text.strip("."):
        return None  # a letter with the text of another choice
    for mark, choice in choices:
        if mark.casefold() == (letter or text.removesuffix(".")):
            return choice
    return None


def read_label(
    text: str, label_type: str, labels: Iterable[str] = (), input: str = ""
) -> str | None:
    """The label in the text after a marker, or None.

    label_type: "choice" gives the choice's text as `input` lists it; "class" the one of `labels`;
    "equation" the arithmetic as written; "text" the first line. Bold, code and mathematical markup
    around it is taken off.
    """
    line = re.sub(r"\\[()\[\]]", "", text).strip(":*`$\"' \t\r\n：")
    line = line.split("\n")[0].rstrip("*`$\"'. \t\r")
    if re.search(r"\\(boxed|text|math)", line):
        line = re.sub(r"\\(boxed|text\w*|math\w*)\s*\{|\}", "", line).strip("$. ")
    if label_type == "choice":
        line = line.translate(HALF_WIDTH)
        if len(re.findall(r"\(\w\)", line)) > 1:
            return None
        return pick(line, CHOICES.findall(input))
    if label_type == "class":
        return class_answer(unicodedata.normalize("NFKC", line), labels)
    if label_type == "equation":
        line = re.sub(r"\\(times|cdot)", "*", line.replace("\\div", "/"))
        line = line.translate(HALF_WIDTH).translate(SIGNS)
        line = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", line)  # 1,000 is a thousand
        plain = line.split("=")[0].strip()
        if value(plain) is not None:
            return plain
        return equation_answer(line)
    return line or None


def same_label(a: str, b: str, label_type: str, input: str = "") -> bool:
    """Whether two labels are the same one.

    Equations are compared by value (`84 / 2` = `( 84.0 / 2.0 )`), choices by the choice of `input`
    that they name (`(c) park`, `c` and `park` are one), classes without case, `_`, `-` and spaces,
    and texts as a tokenizer writes them (NFKC, single spaces).
    """
    if label_type == "equation":
        x = value(a)
        y = value(b)
        return x is not None and y is not None and math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-9)
    return label_key(a, label_type, input) == label_key(b, label_type, input)


def label_key(label: str, label_type: str, input: str = "") -> str:
    """The same text for all labels that are one. Equations: only for those written alike."""
    if label_type == "class":
        return class_key(label)
    if label_type == "choice":
        return written(pick(label, CHOICES.findall(input)) or label).casefold()
    return written(label)


def merge_labels(labels: Iterable[str], label_type: str) -> dict[str, str]:
    """{label: the commonest spelling of its class}: labels that compare equal are one class."""
    spellings: dict[str, Counter] = {}
    counts = Counter(labels)
    for label, count in counts.items():
        spellings.setdefault(label_key(label, label_type), Counter())[label] += count
    merged = {}
    for label in counts:
        merged[label] = spellings[label_key(label, label_type)].most_common(1)[0][0]
    return merged


def closed_set(labels: Iterable[str], label_type: str) -> list[str]:
    """The classes among labels, sorted; [] unless there are 2 to 50, each 5 times on average."""
    labels = list(labels)
    classes = sorted(set(merge_labels(labels, label_type).values()))
    if label_type in ("text", "class") and 2 <= len(classes) <= min(50, len(labels) / 5):
        return classes
    return []


def is_free_text(labels: Iterable[str], label_type: str) -> bool:
    """Whether at least 90 % of the labels are distinct. Exact match then finds few right."""
    labels = list(labels)
    if label_type != "text" or len(labels) < 20:
        return False
    return len(set(merge_labels(labels, label_type).values())) >= 0.9 * len(labels)


def token_f1(answer: str, gold: str) -> float:
    """The F1 of the words that two texts share (as in SQuAD), from 0 to 1."""
    said = Counter(written(answer).casefold().split())
    wanted = Counter(written(gold).casefold().split())
    shared = (said & wanted).total()
    return 2 * shared / max(said.total() + wanted.total(), 1)


def choose_label_type(rows: Iterable[Labelled]) -> str:
    """The label type that fits the rows: "choice", "equation" or "text".

    Choices are listed in every input. Equations are arithmetic with parentheses or spaces round an
    operator, and no closed set: age ranges (35-44) and results (2-1) are texts.
    """
    rows = [row for row in rows if row.label is not None]
    if rows and all(len(CHOICES.findall(row.input)) > 1 for row in rows):
        return "choice"
    labels = [row.label for row in rows]
    arithmetic = all(value(label) is not None for label in labels)
    written_out = any(re.search(r"\(|\S\s+[-+*/]\s+\S", label) for label in labels)
    if arithmetic and written_out and not closed_set(labels, "text"):
        return "equation"
    return "text"
