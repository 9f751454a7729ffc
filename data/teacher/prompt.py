"""A prompt file: the few-shot exemplars of one task, how a question is put, and how an answer is read.
data/README.md says how to write one."""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

from data.answers import CHOICES, pick, read_answer, read_label, same_label
from data.files import digest, read_json

# Tokens that end a turn, which a server whose chat template is not the model's lets through as text (llama.cpp with a
# base model: all of 8 replies). What follows is an invented next turn.
ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|return|>", "<|endoftext|>", "<end_of_turn>", "</s>")
LABEL_TYPES = ("choice", "class", "equation", "text")


@dataclass(frozen=True)
class Answer:
    """What a text holds, rationale and label or else the kind of error and a word on it, and what asking took."""

    rationale: str | None = None
    label: str | None = None
    error: str | None = None  # "empty" | "truncated" | "unparsed" | "label_invalid", or why there was no reply
    detail: str = ""
    raw: str = ""  # text
    model: str = ""  # that answered, as the server says
    attempts: int = 0
    seconds: float = 0.0  # of the last reply
    usage: Counter = field(default_factory=Counter)  # of all attempts


@dataclass(frozen=True)
class Prompt:
    exemplars: list  # [{"input", "rationale", "label"}]
    question: str  # template:  "Q: {input}{hint}\nA:"
    answer: str  # template:  " {rationale} So the answer is {label}."
    answer_marker: list[str]  # between rationale and label, in any case of letters, the best first; or a single text
    label_type: str  # "choice" (one of the lines "(a) park" of the input), "class", "equation", "text"
    labels: list[str] = ()  # of "class"
    stop: list[str] = ()  # what begins an invented next question; asked for as `stop`, and cut off here in any case
    instruction: str = ""  # said before the first exemplar
    hint: str = ""  # template that stands for {hint} under --rationalize:  "\n(The answer is {label}.)"
    input_parts: list[str] = ()  # names, for use in `question`, of the parts of an input
    input_separator: str = "</s>"  # that this divides
    sha256: str = ""  # of the file

    def chat(self, input: str, gold: str | None = None) -> list[dict]:
        """The messages of a chat. With a `gold` label every question carries the hint (--rationalize).

        The instruction is in the first user turn: some chat templates (Gemma's) refuse a system message.
        """
        *texts, _ = [text for asked, reply in self.turns(input, gold) for text in (asked, reply.strip())]
        texts[0] = f"{self.instruction}\n\n{texts[0]}" if self.instruction else texts[0]
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    def completion(self, input: str, gold: str | None = None) -> str:
        """The text of a completion, which the teacher goes on from."""
        return "\n\n".join(filter(None, [self.instruction, *map("".join, self.turns(input, gold))]))

    def turns(self, input, gold):
        """[(question, answer)] of the exemplars and, with an empty answer, of the row."""
        shots = [(self.ask(e["input"], gold and e["label"]), self.reply(e)) for e in self.exemplars]
        return [*shots, (self.ask(input, gold), "")]

    def ask(self, input, gold=None):
        """The question for one input. Raises ValueError for an input that does not fit."""
        parts = input.split(self.input_separator) if self.input_parts else []
        if len(parts) != len(self.input_parts):
            wanted = f"{len(self.input_parts)} parts ({', '.join(self.input_parts)})"
            raise ValueError(f"the prompt wants {wanted} joined by {self.input_separator!r}, and finds {len(parts)}")
        if self.label_type == "choice" and not CHOICES.search(input):
            raise ValueError('the prompt wants choices, the input has no lines like "(a) park"')
        named = {name: part.strip() for name, part in zip(self.input_parts, parts)}
        hint = fill(self.hint, label=self.show(gold, input)) if gold is not None else ""
        return fill(self.question, input=input.strip(), hint=hint, **named)

    def reply(self, exemplar):
        label = self.show(exemplar["label"], exemplar["input"])
        return fill(self.answer, rationale=exemplar["rationale"], label=label)

    def show(self, label, input):
        """A label as answers have it: a choice with its letter."""
        choices = CHOICES.findall(input) if self.label_type == "choice" else []
        return next((f"({letter}) {text}" for letter, text in choices if text == pick(label, choices)), label)

    def parse(self, text: str, input: str, cut_short: bool = False) -> Answer:
        """A teacher's text -> Answer. `cut_short`: it ended at the token limit, so what stands last may be torn."""
        if not text.strip():
            return Answer(error="empty", detail="the reply has no text")
        ends = [*self.stop, *ENDS]
        read, same = partial(self.read, input=input), partial(self.same, input=input)
        rationale, label, rest = read_answer(text, ends, self.answer_marker, read, same)
        if cut_short and not any(end in text for end in ends) and "\n" not in (rest or "").lstrip():
            return Answer(error="truncated", detail="the reply ended at the token limit, before a whole answer")
        if rest is None:
            return Answer(error="unparsed", detail=f"the reply does not say {self.answer_marker[0]!r}")
        if label is None:
            what = "two answers" if self.read(rest, input) else f"no {self.label_type} in {rest.strip()[:80]!r}"
            return Answer(rationale, error="label_invalid", detail=what)
        if rationale is None:
            return Answer(label=label, error="unparsed", detail=f"no rationale before {self.answer_marker[0]!r}")
        return Answer(rationale, label)

    def read(self, text: str, input: str) -> str | None:
        """The label in the text after a marker."""
        return read_label(text, self.label_type, self.labels, input)

    def same(self, a: str, b: str, input: str) -> bool:
        """Whether two labels are the same one."""
        return same_label(a, b, self.label_type, input)


def fill(template, **values):
    """The template with each {name} replaced; braces around anything else stay, also those in the values."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def load_prompt(path: str) -> Prompt:
    """The Prompt of a file. Raises ValueError, in one line, for one that cannot work; OSError if it cannot be read."""
    values = read_json(path)
    try:
        if not isinstance(values, dict):
            raise ValueError(f"a prompt file is one JSON object, this is {type(values).__name__}")
        if isinstance(values.get("answer_marker"), str):
            values["answer_marker"] = [values["answer_marker"]]
        known = Prompt.__annotations__.keys() - {"sha256"}
        for name in sorted(values.keys() - known):
            raise ValueError(f'unknown key "{name}"; a prompt file has {", ".join(sorted(known))}')
        for name in sorted(name for name in known - values.keys() if not hasattr(Prompt, name)):
            raise ValueError(f'"{name}" is missing')
        prompt = Prompt(**values, sha256=digest(path).hex())
        check(prompt)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return prompt


def check(prompt):
    """Raise ValueError unless each value has its type, each template its places and no others, and every exemplar reads
    back as its own rationale and label: a marker that does not fit is found before anything is paid for."""
    for name, kind in Prompt.__annotations__.items():
        value = getattr(prompt, name)
        if kind is str and not isinstance(value, str):
            raise ValueError(f'"{name}" must be a text, got {value!r}')
        if kind == list[str] and not (are_texts(value) and (value or name != "answer_marker")):
            raise ValueError(f'"{name}" must be a list of texts that are not blank, got {value!r}')
    if prompt.label_type not in LABEL_TYPES:
        raise ValueError(f'"label_type" must be one of {", ".join(LABEL_TYPES)}, got {prompt.label_type!r}')
    if (prompt.label_type == "class") != bool(prompt.labels):
        raise ValueError('"labels" goes with label_type "class", which needs it')
    if len(prompt.stop) > 4:
        raise ValueError(f'"stop" may have 4 texts, the most that servers take; it has {len(prompt.stop)}')
    parts = set(prompt.input_parts) or {"input"}
    answers = {"rationale", "label"}
    places = {"question": (parts, {"input", "hint"}), "answer": (answers, set()), "hint": (set(), {"label"})}
    for name, (needed, others) in places.items():
        found = set(re.findall(r"\{(\w+)\}", getattr(prompt, name)))
        for wrong in sorted(found - needed - others) + sorted(needed - found):
            what = "is missing from" if wrong in needed else "means nothing in"
            raise ValueError(f'{{{wrong}}} {what} "{name}"')
    for number, e in enumerate(prompt.exemplars if isinstance(prompt.exemplars, list) else [None], 1):
        if not (isinstance(e, dict) and e.keys() == {"input", "rationale", "label"} and are_texts([*e.values()])):
            raise ValueError(f"exemplar {number} must have input, rationale and label, texts that are not blank")
        try:
            prompt.ask(e["input"])
            read = prompt.parse(prompt.reply(e), e["input"])
        except ValueError as error:
            raise ValueError(f"exemplar {number}: {error}") from None
        if (read.rationale, read.label) != (e["rationale"], e["label"]):
            seen = read.detail or f"rationale {read.rationale!r}, label {read.label!r}"
            raise ValueError(f"exemplar {number}: its answer does not read back as itself ({seen})")


def are_texts(value):
    return isinstance(value, list | tuple) and all(isinstance(text, str) and text.strip() for text in value)
