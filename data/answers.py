"""Read a rationale and a label from a teacher's text, and compare labels.

The paper's released outputs and the replies that extract.py collects are read by the same
functions. Nothing is guessed: a text without a marker, or with two different answers, has no label.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from data.jsonl import Record

CHOICES = re.compile(r"^\((\w)\) *(.+?)\s*$", re.MULTILINE)  # the lines "(a) park" of a question
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # "：" -> ":", "Ａ" -> "A"
LARGEST = 1e15  # larger floats do not tell integers apart
INVISIBLE = dict.fromkeys([0x61C, 0x200B, 0x200C, 0x200E, 0x200F, 0xFEFF], " ")


@dataclass(frozen=True)
class Reading:
    """What a text says."""

    rationale: str | None = None
    label: str | None = None
    rest: str | None = None  # the text after the marker; None without a marker
    rank: int = 0  # the marker's place in the order of preference
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
    by_length = sorted(markers, key=len, reverse=True)  # one marker may begin another
    pattern = "|".join(f"({marker_pattern(marker)})" for marker in by_length)
    matches = list(re.finditer(pattern, output.translate(HALF_WIDTH), re.IGNORECASE))
    if not matches:
        return Reading()
    readings = []
    ends = [match.start() for match in matches[1:]] + [len(output)]
    for match, end in zip(matches, ends):
        rest = output[match.end() : end]
        # Markdown before the marker belongs to the answer: `He runs.\n\n**` -> `He runs.`
        rationale = re.sub(r"(^|\s)[*#_>`~\s]*$", "", output[: match.start()]).strip()
        rank = markers.index(by_length[match.lastindex - 1])
        readings.append(Reading(rationale or None, read(rest), rest, rank))
    best = min(readings, key=lambda reading: (reading.label is None, reading.rank))
    for other in readings:
        if other.label is not None and not same(other.label, best.label):
            return replace(best, label=None, ambiguous=True)
    return best


def marker_pattern(marker: str) -> str:
    """White space may differ, and Markdown may close before a colon (`**Answer**:`)."""
    words = unicodedata.normalize("NFKC", marker).split()
    return r"(?<!\w)" + r"\s+".join(re.escape(word) for word in words).replace(":", r"[*_]*\s?:")


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
    if len(text) > 200:
        return None
    tokens = re.findall(r"\d+\.?\d*|\.\d+|\S", text)
    try:
        result = add(tokens)
    except (ValueError, IndexError, ZeroDivisionError):
        return None
    return result if not tokens and abs(result) <= LARGEST else None


def add(tokens: list[str]) -> float:
    """The value of a sum. Removes the tokens that it reads; so do `multiply` and `operand`."""
    result = multiply(tokens)
    while tokens and tokens[0] in "+-":
        sign = tokens.pop(0)
        number = multiply(tokens)
        result += number if sign == "+" else -number
    return result


def multiply(tokens: list[str]) -> float:
    result = operand(tokens)
    while tokens and tokens[0] in "*/":
        if tokens.pop(0) == "*":
            result *= operand(tokens)
        else:
            result /= operand(tokens)
    return result


def operand(tokens: list[str]) -> float:
    token = tokens.pop(0)
    if token == "-":
        return -operand(tokens)
    if token == "(":
        result = add(tokens)
        if tokens.pop(0) != ")":
            raise ValueError("a parenthesis is not closed")
        return result
    number = float(token)
    if number > LARGEST:
        raise ValueError("too large")
    return number


def class_answer(text: str, labels: Iterable[str]) -> str | None:
    """` Neutral.` -> `neutral`, the one of `labels` that the text begins with.

    None if there is none or if the text offers another one (`neutral or contradiction`). Case,
    spaces, `_` and `-` are equal.
    """
    keys = {class_key(label): label for label in labels}
    longest_first = sorted(keys, key=len, reverse=True)
    any_label = "|".join(re.escape(key) for key in longest_first)
    word = r"\b(?:or|and|also|maybe|perhaps|possibly)\b"
    joined = rf"\W*(?:[/,;&|+]|{word})(?:\W|{word})*"
    pattern = rf"[\W_]*?({any_label})(?!\w)(?!{joined}({any_label})(?!\w))"
    match = re.match(pattern, class_key(text))
    return keys[match[1]] if match else None


def class_key(label: str) -> str:
    """The same text for `refund_request`, `Refund-Request` and `refund request`."""
    return re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", written(label)).casefold()


def written(text: str) -> str:
    """A text as a T5 tokenizer can write it: NFKC, single spaces, for invisible ones as well."""
    return " ".join(unicodedata.normalize("NFKC", text).translate(INVISIBLE).split())


def pick(answer: str, choices: list[tuple[str, str]]) -> str | None:
    """The text of the choice, of [(letter, text)], that `answer` names by its text or else by its
    letter, or None.

    `(b) shop`, `B) shop`, `b. shop`, `shop`, `(b)` and `b` are one.
    """
    texts = {}
    letters = {}
    for letter, choice in choices:
        texts[written(choice).casefold().removesuffix(".")] = choice
        letters[letter.casefold()] = choice
    answer = written(answer).casefold().removesuffix(".")
    letter, text = re.fullmatch(r"(?:\(?(\w)[).:](?=\s|$))?\s*(.*?)", answer, re.DOTALL).groups()
    if answer in texts or text in texts:
        return texts.get(answer, texts.get(text))
    if letter and text:
        return None  # a letter with the text of another choice
    return letters.get(letter or text)


def read_label(
    text: str, label_type: str, labels: Iterable[str] = (), input: str = ""
) -> str | None:
    """The label in the text after a marker, or None.

    label_type: "choice" gives the choice's text as `input` lists it; "class" the one of `labels`;
    "equation" the arithmetic as written; "text" the first line. Bold, code and mathematical markup
    around it is taken off.
    """
    text = re.sub(r"\\[()\[\]]", "", text)
    line = text.strip(":*`$\"' \t\r\n：").split("\n")[0].rstrip("*`$\"'. \t\r")
    if re.search(r"\\(boxed|text|math)", line):
        line = re.sub(r"\\(boxed|text\w*|math\w*)\s*\{|\}", "", line).strip("$. ")
    if label_type == "text":
        return line or None
    line = line.translate(HALF_WIDTH)
    if label_type == "class":
        return class_answer(line, labels)
    if label_type == "choice":
        several = len(re.findall(r"\(\w\)", line)) > 1
        return None if several else pick(line, CHOICES.findall(input))
    line = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", line.translate(SIGNS))  # 1,000 is a thousand
    plain = line.split("=")[0].strip()
    if value(plain) is not None:
        return plain
    return equation_answer(line)


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
    counts = Counter(labels)
    commonest: dict[str, str] = {}
    for label, _ in counts.most_common():
        commonest.setdefault(label_key(label, label_type), label)
    return {label: commonest[label_key(label, label_type)] for label in counts}


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


def choose_label_type(rows: Iterable[Record]) -> str:
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
