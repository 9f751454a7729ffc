"""A prompt file: the few-shot exemplars of one task, how a question is put, and how an answer is read.

One JSON object (data/prompts/ has five):

    exemplars      [{"input", "rationale", "label"}]
    question       template of a question:  "Q: {input}{hint}\\nA:"
    answer         template of an answer:   " {rationale} So the answer is {label}."
    answer_marker  what stands between rationale and label, a text or a list of texts, in any case of letters
    label_type     "choice" (one of the lines "(a) park" of the input), "class" (one of `labels`), "equation", "text"
    labels         the labels of "class"
    stop           texts that begin an invented next question; asked for as `stop`, and cut off here in any case
and, where needed,
    instruction    said first: the system message of a chat, the first lines of a completion
    hint           template that stands for {hint} under --rationalize:  "\\n(The answer is {label}.)"
    separator      between exemplars of a completion; a blank line if not given
    input_parts    names for the parts of an input that `input_separator` divides, for use in `question`
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property

from data.answers import CHOICES, cut, pick, read_label, same_label

# Tokens that end a turn, which a server whose chat template is not the model's lets through as text (llama.cpp with a
# base model: all of 8 replies). What follows is an invented next turn.
ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<end_of_turn>", "</s>")
LABEL_TYPES = ("choice", "class", "equation", "text")


class PromptError(ValueError):
    """A prompt file that cannot be used; the message gives file and reason."""


@dataclass(frozen=True)
class Answer:
    """What a teacher's text holds: rationale and label, or else the kind of problem and a word on it."""

    rationale: str | None = None
    label: str | None = None
    problem: str | None = None  # "empty" | "truncated" | "unparsed" | "label_invalid"
    detail: str = ""


@dataclass(frozen=True)
class Prompt:
    exemplars: list
    question: str
    answer: str
    answer_marker: str | list
    label_type: str
    labels: list = ()
    stop: list = ()
    instruction: str = ""
    hint: str = ""
    separator: str = "\n\n"
    input_parts: list = ()
    input_separator: str = "</s>"
    sha256: str = field(default="", kw_only=True)  # of the file

    # ---- Putting the question ----------------------------------------------------------------------------------------

    def chat(self, input, gold=None):
        """The messages of a chat. With a `gold` label every question carries the hint (--rationalize)."""
        messages = [{"role": "system", "content": self.instruction}] if self.instruction else []
        for asked, reply in self.shots[gold is not None]:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply.strip()}]
        return [*messages, {"role": "user", "content": self.ask(input, gold)}]

    def completion(self, input, gold=None):
        """The text of a completion, which the teacher goes on from."""
        head = [self.instruction] if self.instruction else []
        shots = [asked + reply for asked, reply in self.shots[gold is not None]]
        return self.separator.join([*head, *shots, self.ask(input, gold)])

    @cached_property
    def shots(self):
        """[(question, answer)] of the exemplars, without the hint and, in shots[True], with it."""
        return [
            [(self.ask(e["input"], e["label"] if hinted else None), self.reply(e)) for e in self.exemplars]
            for hinted in (False, True)
        ]

    def ask(self, input, gold=None):
        parts = input.split(self.input_separator) if self.input_parts else []
        if len(parts) != len(self.input_parts):
            raise ValueError(
                f"the prompt wants {len(self.input_parts)} parts ({', '.join(self.input_parts)}) joined by "
                f"{self.input_separator!r}, the input has {len(parts)}"
            )
        named = {name: part.strip() for name, part in zip(self.input_parts, parts)}
        hint = fill(self.hint, label=self.show(gold, input)) if gold is not None else ""
        return fill(self.question, input=input.strip(), hint=hint, **named)

    def reply(self, exemplar):
        label = self.show(exemplar["label"], exemplar["input"])
        return fill(self.answer, rationale=exemplar["rationale"], label=label)

    def show(self, label, input):
        """A label as answers have it: a choice with its letter."""
        choices = CHOICES.findall(input) if self.label_type == "choice" else []
        chosen = pick(label, choices)
        return next((f"({letter}) {text}" for letter, text in choices if text == chosen), label)

    # ---- Reading the answer ------------------------------------------------------------------------------------------

    def parse(self, text, input, cut_short=False):
        """A teacher's text -> Answer. `cut_short`: it ended at the token limit, so what stands last may be torn."""
        if not text.strip():
            return Answer(problem="empty", detail="the reply has no text")
        ends = [*self.stop, *ENDS]
        rationale, rest = cut(text, ends, self.marker)
        if cut_short and not any(end in text for end in ends) and "\n" not in (rest or "").lstrip():
            return Answer(problem="truncated", detail="the reply ended at the token limit, before a whole answer")
        if rest is None:
            return Answer(problem="unparsed", detail=f"the reply does not say {self.markers[0]!r}")
        label = read_label(rest, self.label_type, self.labels, input)
        if label is None:
            return Answer(rationale, problem="label_invalid", detail=f"no {self.label_type} in {rest.strip()[:80]!r}")
        if rationale is None:
            return Answer(label=label, problem="unparsed", detail=f"no rationale before {self.markers[0]!r}")
        return Answer(rationale, label)

    def same(self, a, b, input):
        """Whether two labels are the same one."""
        return same_label(a, b, self.label_type, input)

    @property
    def markers(self):
        return [self.answer_marker] if isinstance(self.answer_marker, str) else list(self.answer_marker)

    @property
    def marker(self):
        """A regular expression for `cut`."""
        return "(?i)" + "|".join(map(re.escape, self.markers))


def fill(template, **values):
    """The template with each {name} replaced; braces around anything else stay, also those in the values."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def load_prompt(path):
    """The Prompt of a file. Raises PromptError, in one line, for one that cannot work; OSError if it cannot be read.

    Every exemplar's answer must parse back to its own rationale and label, so that a marker or template that does not
    fit is found before anything is paid for.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        values = json.loads(content)
    except ValueError as problem:
        raise PromptError(f"{path}: not JSON ({problem})") from None
    try:
        check_values(values)
        prompt = Prompt(**values, sha256=hashlib.sha256(content).hexdigest())
        check_prompt(prompt)
    except ValueError as problem:
        raise PromptError(f"{path}: {problem}") from None
    return prompt


def check_values(values):
    """Raise ValueError unless the keys are those of a prompt file and each has its type."""
    if not isinstance(values, dict):
        raise ValueError(f"a prompt file is one JSON object, this is {type(values).__name__}")
    texts = {"question", "answer", "label_type", "instruction", "hint", "separator", "input_separator"}
    lists = {"labels", "stop", "input_parts"}
    known = texts | lists | {"exemplars", "answer_marker"}
    for name in sorted(values.keys() - known):
        raise ValueError(f'unknown key "{name}"; a prompt file has {", ".join(sorted(known))}')
    for name in ("exemplars", "question", "answer", "answer_marker", "label_type"):
        if name not in values:
            raise ValueError(f'"{name}" is missing')
    marker = values["answer_marker"]
    for name, value in [(n, values[n]) for n in sorted(values.keys() & texts)]:
        if not isinstance(value, str):
            raise ValueError(f'"{name}" must be a text, got {value!r}')
    for name, value in [(n, values[n]) for n in sorted(values.keys() & lists)] + [("answer_marker", marker)]:
        if name == "answer_marker" and isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
            raise ValueError(f'"{name}" must be a list of texts that are not blank, got {value!r}')
    if not marker:
        raise ValueError('"answer_marker" must not be empty')
    if not isinstance(values["exemplars"], list):
        raise ValueError('"exemplars" must be a list')
    for number, e in enumerate(values["exemplars"], 1):
        if not isinstance(e, dict) or e.keys() != {"input", "rationale", "label"}:
            raise ValueError(f"exemplar {number} must have input, rationale and label, and nothing else")
        if not all(isinstance(text, str) and text.strip() for text in e.values()):
            raise ValueError(f"exemplar {number}: input, rationale and label must be texts that are not blank")


def check_prompt(prompt):
    """Raise ValueError unless the templates, the marker and the exemplars fit together."""
    if prompt.label_type not in LABEL_TYPES:
        raise ValueError(f'"label_type" must be one of {", ".join(LABEL_TYPES)}, got {prompt.label_type!r}')
    if (prompt.label_type == "class") != bool(prompt.labels):
        raise ValueError('"labels" goes with label_type "class", which needs it')
    if len(prompt.stop) > 4:
        raise ValueError(f'"stop" may have 4 texts, the most that servers take; it has {len(prompt.stop)}')
    allowed = {"question": {"input", "hint", *prompt.input_parts}, "answer": {"rationale", "label"}, "hint": {"label"}}
    needed = {"question": set(prompt.input_parts) or {"input"}, "answer": {"rationale", "label"}, "hint": set()}
    for name, names in allowed.items():
        found = set(re.findall(r"\{(\w+)\}", getattr(prompt, name)))
        for wrong in sorted(found - names) + sorted(needed[name] - found):
            what = "is missing from" if wrong in needed[name] else "means nothing in"
            raise ValueError(f'{{{wrong}}} {what} "{name}"; it takes {", ".join(f"{{{n}}}" for n in sorted(names))}')
    for number, e in enumerate(prompt.exemplars, 1):
        try:
            prompt.ask(e["input"])
        except ValueError as problem:
            raise ValueError(f"exemplar {number}: {problem}") from None
        read = prompt.parse(prompt.reply(e), e["input"])
        if (read.rationale, read.label) != (e["rationale"], e["label"]):
            seen = read.detail or f"rationale {read.rationale!r}, label {read.label!r}"
            raise ValueError(f"exemplar {number}: its answer does not read back as itself ({seen})")
