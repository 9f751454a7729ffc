"""A reasoning model's thoughts, which stand in tags before its answer."""

import re
from collections.abc import Callable

FINAL = r"<\|channel\|>final.{0,30}?<\|message\|>"  # of OpenAI's harmony format
# (what opens a thought, what closes it; {} is the name that the opening has). Any case of letters.
FORMS = [
    (
        r"(?:<\|start\|>)?(?:assistant)?<\|channel\|>(analysis|commentary)<\|message\|>",
        FINAL,
    ),
    (r"(analysis)(?=[\w\n])", "assistantfinal"),  # the same, whose special tokens a server took out
    (r"<([a-z][\w:.-]*)(?:\s[^<>]*)?>", r"</{}>"),
    (r"\[(\w+)\]", r"\[/{}\]"),
    (r"◁(\w+)▷", r"◁/{}▷"),
    (r"<\|(\w+)>(?:thought)?", r"<{}\|>"),
    (r"<\|(?:begin|start)_(\w+)\|>", r"<\|end_{}\|>"),
    (r"<\|(\w+)\|>", r"<\|/{}\|>"),
]
HTML = ["a", "b", "i", "u", "s", "p", "em", "br", "strong", "small", "mark", "code", "pre", "span"]
HTML += ["div", "sub", "sup", "ul", "ol", "li", "table", "h1", "h2", "h3"]
NAMES = r"(?:\w+:)?(?:think|thinking|thoughts?|reason|reasoning|analysis|reflection|scratchpad)"
NEVER_IN_TEXT = re.compile(r"think|thought|reason|<\|channel", re.IGNORECASE)
CLOSED = re.compile(  # a closing tag whose opening tag the chat template holds
    rf"</{NAMES}>|\[/{NAMES}\]|◁/{NAMES}▷|<\|end_(?:of_)?{NAMES}\|>|{FINAL}",
    re.IGNORECASE,
)
TOKENS = re.compile(  # what is taken out of a thought
    rf"<\|start\|>assistant|<\|channel\|>\w+|<\|\w+\|>|</?{NAMES}>|\[/?{NAMES}\]|◁/?{NAMES}▷",
    re.IGNORECASE,
)

MARKUP = re.compile(rf"\s*(?:</?([\w:.-]+)>|<\|\w+\|?>|\[/?{NAMES}\]|◁/?\w+▷)", re.IGNORECASE)


def split_thoughts(text: str, has_answer: Callable[[str], bool]) -> tuple[str, str]:
    """`<think>Hm.</think>The answer` -> ("Hm.", "The answer"): the thoughts, and what is said
    after them.

    A tag of any name but HTML's that opens the text and is closed later holds a thought, unless it
    holds the answer and nothing follows. A thought that is never closed has no answer after it.
    """
    for opening, closing in FORMS:
        start = re.match(r"\s*" + opening, text, re.IGNORECASE)
        if not start or start[1].lower() in HTML:
            continue
        end = last_match(closing.replace("{}", re.escape(start[1])), text)
        if end:
            return divide(text[start.end() : end.start()], text[end.end() :], has_answer)
        if NEVER_IN_TEXT.search(start[0]):
            return clean(text), ""
    end = last_match(CLOSED.pattern, text)
    if end:
        return divide(text[: end.start()], text[end.end() :], has_answer)
    return "", text


def last_match(pattern: str, text: str) -> re.Match | None:
    matches = list(re.finditer(pattern, text, re.IGNORECASE))
    return matches[-1] if matches else None


def divide(inside: str, after: str, has_answer: Callable[[str], bool]) -> tuple[str, str]:
    if not after.strip() and has_answer(inside):
        return "", inside
    more, said = split_thoughts(after, has_answer)
    return clean(f"{inside}\n{more}"), said


def clean(thought: str) -> str:
    return TOKENS.sub("", thought).strip()


def markup_at_start(text: str) -> str:
    """The tag that a text begins with, or "". HTML's tags are text."""
    tag = MARKUP.match(text)
    if not tag or (tag[1] or "").lower() in HTML:
        return ""
    return tag[0].strip()
