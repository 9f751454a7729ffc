"""A prompt file: the few-shot exemplars of a task, how a question is put, how an answer is read.
data/README.md says how to write one."""

import dataclasses
import json
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from data.answers import (
    CHOICES,
    Reading,
    class_key,
    pick,
    read_answer,
    read_label,
    same_label,
)
from data.files import parse_json, read_json
from data.thoughts import markup_at_start

# Tokens that end a turn. A server whose chat template is not the model's lets them through as text.
ENDS = ["<|im_end|>", "<|eot_id|>", "<|end|>", "<|return|>", "<|endoftext|>", "<end_of_turn>"]
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
class Exemplar:
    input: str
    rationale: str
    label: str


@dataclass(frozen=True)
class Prompt:
    question: str  # template:  "Q: {input}{hint}\nA:"
    label_type: str  # "choice" (of the lines "(a) park" of an input), "class", "equation", "text"
    exemplars: list  # of {"input", "rationale", "label"}
    answer: str = ""  # template:  " {rationale} So the answer is {label}."
    answer_marker: list = ()  # before the label, the best first
    labels: list = ()  # of "class"
    schema: bool = False  # answers are JSON, {"rationale": ..., "label": ...}, and no `answer`
    rationale_first: bool = True  # else the label comes first
    stop: list = ()  # what begins an invented next question; sent as `stop`, and cut off here
    instruction: str = ""  # said before the first exemplar
    hint: str = ""  # template, put for {hint} under --rationalize:  "\n(The answer is {label}.)"
    input_parts: list = ()  # names, for use in `question`, of the parts of "premise</s>hypothesis"

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
            shown_label = exemplar.label if gold is not None else None
            turns.append((self.ask(exemplar.input, shown_label), self.reply(exemplar)))
        turns.append((self.ask(input, gold), ""))
        return turns

    def ask(self, input: str, gold: str | None = None) -> str:
        """The question for one input. Raises ValueError for an input that does not fit."""
        values = {"input": input.strip(), "hint": ""}
        if self.input_parts:
            parts = [part.strip() for part in input.split("</s>")]
            if len(parts) != len(self.input_parts):
                names = ", ".join(self.input_parts)
                raise ValueError(f"the prompt wants {names} joined by </s>, and finds {len(parts)}")
            values |= dict(zip(self.input_parts, parts))
        if gold is not None:
            values["hint"] = fill(self.hint, label=self.show(gold, input))
        return fill(self.question, **values)

    def reply(self, exemplar: Exemplar) -> str:
        said = {"rationale": exemplar.rationale, "label": self.show(exemplar.label, exemplar.input)}
        if self.schema:
            return json.dumps({name: said[name] for name in self.order()}, ensure_ascii=False)
        return fill(self.answer, **said)

    def show(self, label: str, input: str) -> str:
        """A label as answers have it: a choice with its letter."""
        if self.label_type == "choice":
            choices = CHOICES.findall(input)
            picked = pick(label, choices)
            for letter, text in choices:
                if text == picked:
                    return f"({letter}) {text}"
        return label

    def order(self) -> list[str]:
        return ["rationale", "label"] if self.rationale_first else ["label", "rationale"]

    def response_format(self) -> dict[str, Any]:
        """The parameter that asks a server for answers under the schema, in this order."""
        label = {"type": "string"}
        if self.labels:
            label["enum"] = self.labels
        kinds = {"rationale": {"type": "string"}, "label": label}
        schema = {
            "type": "object",
            "properties": {name: kinds[name] for name in self.order()},
            "required": self.order(),
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
            whole = ended(found.rest) or any(end in text for end in [*self.stop, *ENDS])
            marker = self.answer_marker[0]
        error = None
        detail = ""
        if cut_short and not whole:
            error = "truncated"
            detail = "the reply ended before a whole answer; a larger --max-tokens may do"
        elif found.rest is None:
            error = "unparsed"
            detail = f"the reply does not say {marker!r}"
        elif found.ambiguous:
            error = "label_invalid"
            detail = "the reply has two different answers"
        elif found.label is None:
            error = "label_invalid"
            kind = ", ".join(self.labels) or self.label_type
            detail = f"no label ({kind}) in {found.rest.strip()[:80]!r}"
        elif not found.rationale:
            error = "unparsed"
            detail = f"the reply has a label and no rationale ({marker!r})"
        elif markup_at_start(found.rationale):
            error = "unparsed"
            detail = f"unknown markup before the rationale: {markup_at_start(found.rationale)}"
        return Answer(found.rationale, found.label, error, detail)

    def read_text(self, text: str, input: str) -> Reading:
        """Find a rationale and a label by the marker."""
        read = partial(self.read, input=input)
        same = partial(self.same, input=input)
        found = read_answer(text, [*self.stop, *ENDS], self.answer_marker, read, same)
        if not self.rationale_first and found.rest:
            found = replace(found, rationale=self.split_at_label(found.rest)[1])
        return found

    def read_json(self, text: str, input: str) -> Reading:
        """Find them in a JSON object, perhaps in a fence of Markdown."""
        try:
            found = re.search(r"\{.*\}", text, re.DOTALL)
            said = parse_json(found[0], "the reply")
            rationale = said["rationale"].strip()
            label = said["label"]
            label = str(label) if isinstance(label, int) else label.strip()
        except (ValueError, LookupError, TypeError, AttributeError):
            return Reading()
        return Reading(rationale, self.read(label, input), label)

    def split_at_label(self, rest: str) -> tuple[str, str]:
        """The label and what follows it, where the label comes first. `answer` says what stands
        between them, or else a line ends.
        """
        between = self.answer.partition("{label}")[2].partition("{rationale}")[0]
        label, *after = re.split(rf"{re.escape(between)}|\n", rest.lstrip(), maxsplit=1)
        return label, "".join(after).strip()

    def read(self, text: str, input: str) -> str | None:
        """The label in the text after a marker."""
        if not self.rationale_first and not self.schema:
            text, _ = self.split_at_label(text)
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
    values = read_json(path)
    try:
        marker = values.get("answer_marker")
        if isinstance(marker, str):
            values["answer_marker"] = [marker]
        values["exemplars"] = [Exemplar(**exemplar) for exemplar in values["exemplars"]]
        prompt = Prompt(**values)
        check(prompt)
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a prompt file: {error}") from None
    return prompt


def check(prompt: Prompt) -> None:
    """Raise ValueError unless the keys fit together and every exemplar is read back as it is."""
    for field in dataclasses.fields(Prompt):
        value = getattr(prompt, field.name)
        if not isinstance(value, field.type | type(field.default)):
            raise ValueError(f'"{field.name}" must be a {field.type.__name__}, got {value!r}')
    if prompt.label_type not in LABEL_TYPES:
        known = ", ".join(LABEL_TYPES)
        raise ValueError(f'"label_type" must be one of {known}, got {prompt.label_type!r}')
    if not prompt.schema and not prompt.answer_marker:
        raise ValueError('"answer_marker" is missing')
    if (prompt.label_type == "class") != bool(prompt.labels):
        raise ValueError('"labels" goes with label_type "class", which needs it')
    if len({class_key(label) for label in prompt.labels}) < len(prompt.labels):
        raise ValueError('"labels" must differ in more than case, spaces, "_" and "-"')
    wanted = set(prompt.input_parts) or {"input"}
    places = set(PLACE.findall(prompt.question)) - {"hint"}
    if places != wanted:
        what = f"places for {', '.join(sorted(wanted))}"
        raise ValueError(f'"question" must have {what} (and hint), it has {sorted(places)}')
    for number, exemplar in enumerate(prompt.exemplars, 1):
        read = prompt.parse(prompt.reply(exemplar), exemplar.input)
        prompt.ask(exemplar.input)
        if (read.rationale, read.label) != (exemplar.rationale, exemplar.label):
            seen = read.detail or f"rationale {read.rationale!r}, label {read.label!r}"
            raise ValueError(f"exemplar {number} is not read back as it is ({seen})")
