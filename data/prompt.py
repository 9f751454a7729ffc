"""A prompt file: the few-shot exemplars of a task, how a question is put, how an answer is read.
data/README.md says how to write one."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from data.answers import CHOICES, Reading, marker_pattern, pick, read_answer, read_label, same_label
from data.files import open_regular, parse_json
from data.thoughts import markup_at_start

# Tokens that end a turn. A server whose chat template is not the model's lets them through as text.
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<|return|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "</s>",
)
LABEL_TYPES = ("choice", "class", "equation", "text")
PLACE = re.compile(r"\{(\w+)\}")  # in a template


@dataclass(frozen=True)
class Answer:
    """What a text says: a rationale and a label, or the kind of error and a message."""

    rationale: str | None = None
    label: str | None = None
    error: str | None = None  # "empty", "truncated", "unparsed", "label_invalid"
    detail: str = ""


@dataclass(frozen=True)
class Prompt:
    exemplars: list  # [{"input", "rationale", "label"}]
    question: str  # template:  "Q: {input}{hint}\nA:"
    label_type: str  # "choice" (of the lines "(a) park" of an input), "class", "equation", "text"
    answer: str = ""  # template:  " {rationale} So the answer is {label}."
    answer_marker: list[str] = ()  # before the label, the best first; or a single text
    labels: list[str] = ()  # of "class"
    schema: bool = False  # answers are JSON, {"rationale": ..., "label": ...}, and no `answer`
    rationale_first: bool = True  # else the label comes first
    stop: list[str] = ()  # what begins an invented next question; sent as `stop`, and cut off here
    instruction: str = ""  # said before the first exemplar
    hint: str = ""  # template, put for {hint} under --rationalize:  "\n(The answer is {label}.)"
    input_parts: list[str] = ()  # names, for use in `question`, of the parts of an input
    input_separator: str = "</s>"  # what divides an input into its parts
    sha256: str = ""  # of the file

    def chat(self, input: str, gold: str | None = None) -> list[dict[str, str]]:
        """The messages of a chat. With a `gold` label every question has the hint (--rationalize).

        The instruction is in the first user turn: some chat templates (Gemma's) have no system
        message.
        """
        messages = []
        for question, reply in self.turns(input, gold):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": reply.strip()})
        messages.pop()  # the reply that is asked for
        if self.instruction:
            messages[0]["content"] = f"{self.instruction}\n\n{messages[0]['content']}"
        return messages

    def completion(self, input: str, gold: str | None = None) -> str:
        """The text of a completion, which the teacher continues."""
        texts = [question + reply for question, reply in self.turns(input, gold)]
        if self.instruction:
            texts.insert(0, self.instruction)
        return "\n\n".join(texts)

    def turns(self, input: str, gold: str | None) -> list[tuple[str, str]]:
        """(question, answer) of each exemplar and, with an empty answer, of the row."""
        turns = []
        for exemplar in self.exemplars:
            shown_label = exemplar["label"] if gold is not None else None
            turns.append((self.ask(exemplar["input"], shown_label), self.reply(exemplar)))
        turns.append((self.ask(input, gold), ""))
        return turns

    def ask(self, input: str, gold: str | None = None) -> str:
        """The question for one input. Raises ValueError for an input that does not fit."""
        values = {"input": input.strip(), "hint": ""}
        if self.input_parts:
            parts = input.split(self.input_separator)
            if len(parts) != len(self.input_parts):
                wanted = f"{len(self.input_parts)} parts ({', '.join(self.input_parts)})"
                joined = f"joined by {self.input_separator!r}"
                raise ValueError(f"the prompt wants {wanted} {joined}, and finds {len(parts)}")
            for name, part in zip(self.input_parts, parts):
                values[name] = part.strip()
        if self.label_type == "choice" and not CHOICES.search(input):
            raise ValueError('the prompt wants choices, the input has no lines like "(a) park"')
        if gold is not None:
            values["hint"] = fill(self.hint, label=self.show(gold, input))
        return fill(self.question, **values)

    def reply(self, exemplar: dict[str, str]) -> str:
        label = self.show(exemplar["label"], exemplar["input"])
        if self.schema:
            said = {"rationale": exemplar["rationale"], "label": label}
            return json.dumps({name: said[name] for name in self.order()}, ensure_ascii=False)
        return fill(self.answer, rationale=exemplar["rationale"], label=label)

    def show(self, label: str, input: str) -> str:
        """A label as answers have it: a choice with its letter."""
        if self.label_type == "choice":
            choices = CHOICES.findall(input)
            picked = pick(label, choices)
            for letter, text in choices:
                if text == picked:
                    return f"({letter}) {text}"
        return label

    def order(self) -> tuple[str, str]:
        return ("rationale", "label") if self.rationale_first else ("label", "rationale")

    def response_format(self) -> dict[str, Any]:
        """The parameter that asks a server for answers under the schema, in this order."""
        label = {"type": "string"}
        if self.labels:
            label["enum"] = list(self.labels)
        kinds = {"rationale": {"type": "string"}, "label": label}
        schema = {
            "type": "object",
            "properties": {name: kinds[name] for name in self.order()},
            "required": list(self.order()),
            "additionalProperties": False,
        }
        named = {"name": "answer", "strict": True, "schema": schema}
        return {"type": "json_schema", "json_schema": named}

    def parse(self, text: str, input: str, cut_short: bool = False) -> Answer:
        """Read a teacher's text. cut_short: it ended at the token limit, so its end may be torn."""
        if not text.strip():
            return Answer(error="empty", detail="the reply has no text")
        if self.schema:
            found = self.read_json(text, input)
            whole = found.rest is not None
            marker = '{"rationale": ..., "label": ...}'
        else:
            found = self.read_text(text, input)
            whole = ended(found.rest) or any(end in text for end in (*self.stop, *ENDS))
            marker = self.answer_marker[0]
        if cut_short and not whole:
            what = "the reply ended at the token limit, before a whole answer"
            return Answer(error="truncated", detail=f"{what}; a larger --max-tokens may do")
        if found.rest is None:
            return Answer(error="unparsed", detail=f"the reply does not say {marker!r}")
        if found.label is None:
            what = f"no {self.kind()} in {found.rest.strip()[:80]!r}"
            if found.ambiguous:
                what = "the reply has two different answers"
            return Answer(found.rationale, error="label_invalid", detail=what)
        if not found.rationale:
            what = f"the reply has a label and no rationale ({marker!r})"
            return Answer(label=found.label, error="unparsed", detail=what)
        tag = markup_at_start(found.rationale)
        if tag:
            what = f"unknown markup at the beginning of the rationale: {tag}"
            return Answer(found.rationale, found.label, error="unparsed", detail=what)
        return Answer(found.rationale, found.label)

    def read_text(self, text: str, input: str) -> Reading:
        """Find a rationale and a label by the marker."""
        read = partial(self.read, input=input)
        same = partial(self.same, input=input)
        found = read_answer(text, [*self.stop, *ENDS], self.answer_marker, read, same)
        if not self.rationale_first and found.rest:
            found = replace(found, rationale=self.after_label(found.rest).strip())
        return found

    def read_json(self, text: str, input: str) -> Reading:
        """Find them in a JSON object, perhaps in a fence of Markdown."""
        found = re.search(r"\{.*\}", text, re.DOTALL)
        try:
            said = parse_json(found[0] if found else text, "the reply")
            rationale = said["rationale"].strip()
            label = said["label"]
            label = str(label) if type(label) is int else label.strip()
        except (ValueError, LookupError, TypeError, AttributeError):
            return Reading()
        return Reading(rationale, self.read(label, input), label)

    def after_label(self, rest: str) -> str:
        """What follows the label where it comes first; `answer` says what stands between them."""
        between = self.answer.partition("{label}")[2].partition("{rationale}")[0]
        separators = "|".join(re.escape(text) for text in (between, "\n") if text)
        found = re.search(separators, rest.lstrip())
        return rest.lstrip()[found.end() :] if found else ""

    def kind(self) -> str:
        """What a label is, for messages."""
        if self.labels:
            return f"class ({', '.join(self.labels)})"
        return self.label_type

    def has_marker(self, text: str) -> bool:
        """Whether a text seems to hold an answer."""
        if self.schema:
            return "{" in text
        pattern = "|".join(marker_pattern(marker) for marker in self.answer_marker)
        return bool(re.search(pattern, text, re.IGNORECASE))

    def read(self, text: str, input: str) -> str | None:
        """The label in the text after a marker."""
        if not self.rationale_first and not self.schema:
            text = text.removesuffix(self.after_label(text))
        return read_label(text, self.label_type, self.labels, input)

    def same(self, a: str, b: str, input: str) -> bool:
        """Whether two labels are the same one."""
        return same_label(a, b, self.label_type, input)


def ended(rest: str | None) -> bool:
    """Whether the text after a marker is a line that ended, with nothing behind it."""
    line, line_end, behind = (rest or "").lstrip().partition("\n")
    return bool(line and line_end) and not behind.strip()


def fill(template: str, **values: str) -> str:
    """The template with each {name} replaced. Other braces stay, also those in the values."""
    return PLACE.sub(lambda match: values.get(match[1], match[0]), template)


def load_prompt(path: str) -> Prompt:
    """The Prompt of a file. Raises OSError, or ValueError for a file that cannot work."""
    with open_regular(path) as file:
        content = file.read()
    values = parse_json(content, path)
    try:
        if not isinstance(values, dict):
            raise ValueError(f"a prompt file is one JSON object, this is {type(values).__name__}")
        if isinstance(values.get("answer_marker"), str):
            values["answer_marker"] = [values["answer_marker"]]
        check_values(values)
        prompt = Prompt(**values, sha256=hashlib.sha256(content).hexdigest())
        check_templates(prompt)
        for number, exemplar in enumerate(prompt.exemplars, 1):
            problem = problem_of(prompt, exemplar)
            if problem:
                raise ValueError(f"exemplar {number}: {problem}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return prompt


def check_values(values: dict[str, Any]) -> None:
    """Raise ValueError unless the keys are those of a prompt file and each value has its type."""
    fields = {field.name: field for field in dataclasses.fields(Prompt)}
    del fields["sha256"]
    for name in sorted(values.keys() - fields.keys()):
        raise ValueError(f'unknown key "{name}"; a prompt file has {", ".join(sorted(fields))}')
    for name, field in fields.items():
        value = values.get(name, field.default)
        if value is dataclasses.MISSING:
            raise ValueError(f'"{name}" is missing')
        if name in values and field.type == list[str] and not are_texts(value):
            raise ValueError(f'"{name}" must be a list of texts that are not blank, got {value!r}')
        if field.type in (str, list, bool) and not isinstance(value, field.type):
            raise ValueError(f'"{name}" must be a {field.type.__name__}, got {value!r}')


def are_texts(values: Any) -> bool:
    if not isinstance(values, list):
        return False
    return all(isinstance(text, str) and text.strip() for text in values)


def check_templates(prompt: Prompt) -> None:
    """Raise ValueError unless keys fit together and templates have the places they need."""
    if prompt.label_type not in LABEL_TYPES:
        known = ", ".join(LABEL_TYPES)
        raise ValueError(f'"label_type" must be one of {known}, got {prompt.label_type!r}')
    for name in ("answer", "answer_marker"):
        if not prompt.schema and not getattr(prompt, name):
            raise ValueError(f'"{name}" is missing')
    if (prompt.label_type == "class") != bool(prompt.labels):
        raise ValueError('"labels" goes with label_type "class", which needs it')
    if len(prompt.stop) > 4:
        raise ValueError(f'"stop" may have 4 texts, as servers allow; it has {len(prompt.stop)}')
    parts = set(prompt.input_parts) or {"input"}
    for name, needed, allowed in (
        ("question", parts, {"input", "hint"}),
        ("answer", set() if prompt.schema else {"rationale", "label"}, {"rationale", "label"}),
        ("hint", set(), {"label"}),
    ):
        found = set(PLACE.findall(getattr(prompt, name)))
        for place in sorted(found - needed - allowed):
            raise ValueError(f'{{{place}}} means nothing in "{name}"')
        for place in sorted(needed - found):
            raise ValueError(f'{{{place}}} is missing from "{name}"')


def problem_of(prompt: Prompt, exemplar: Any) -> str:
    """Why an exemplar is refused, or "". It must be read back as it is."""
    if not isinstance(exemplar, dict) or exemplar.keys() != {"input", "rationale", "label"}:
        return "it must have input, rationale and label"
    if not are_texts(list(exemplar.values())):
        return "input, rationale and label must be texts that are not blank"
    try:
        prompt.ask(exemplar["input"])
    except ValueError as error:
        return str(error)
    read = prompt.parse(prompt.reply(exemplar), exemplar["input"])
    if (read.rationale, read.label) == (exemplar["rationale"], exemplar["label"]):
        return ""
    if prompt.answer.lstrip().startswith('{"'):
        return 'answers in JSON are for "schema": true'
    if prompt.rationale_first and prompt.answer.find("{label}") < prompt.answer.find("{rationale}"):
        return 'the label comes first in "answer"; say so with "rationale_first": false'
    seen = read.detail or f"rationale {read.rationale!r}, label {read.label!r}"
    return f"its answer does not read back as itself ({seen})"
