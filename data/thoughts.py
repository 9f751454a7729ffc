"""A reasoning model's thoughts, which stand in tags before its answer."""

import re

NAME = r"(?:\w+:)?(?:think|thinking|thoughts?|reason|reasoning|analysis|reflection|scratchpad)"
OPENING = rf"<{NAME}>|\[{NAME}\]|◁{NAME}▷|<\|channel\|?>(?:thought|analysis)|analysis(?=\w)"
CLOSING = (  # its opening tag may be in the chat template
    rf"</{NAME}>|\[/{NAME}\]|◁/{NAME}▷|<channel\|>|<\|channel\|>final<\|message\|>|assistantfinal"
)
OTHER_TOKENS = r"<\|start\|>assistant|<\|\w+\|>"
HTML = r"a|b|i|u|s|p|em|br|strong|small|mark|code|pre|span|div|sub|sup|ul|ol|li"


def split_thoughts(text: str) -> tuple[str, str]:
    """`<think>Hm.</think>The answer` -> ("Hm.", "The answer"): the thoughts, and what is said
    after them. After a thought that is never closed nothing is said.
    """
    closings = list(re.finditer(CLOSING, text, re.IGNORECASE))
    if closings:
        last = closings[-1]
        return remove_tags(text[: last.start()]), text[last.end() :]
    if re.match(rf"\s*({OPENING})", text, re.IGNORECASE):
        return remove_tags(text), ""
    return "", text


def remove_tags(thought: str) -> str:
    return re.sub(rf"{OPENING}|{CLOSING}|{OTHER_TOKENS}", "", thought, flags=re.IGNORECASE).strip()


def markup_at_start(text: str) -> str:
    """The tag that a text begins with, or "". HTML's tags are text."""
    tag = re.match(rf"\s*(</?([\w:.-]+)>|<\|\w+\|?>|\[/?{NAME}\]|◁/?\w+▷)", text, re.IGNORECASE)
    if not tag or re.fullmatch(HTML, tag[2] or "", re.IGNORECASE):
        return ""
    return tag[1]
