"""The request for a row, and how the reply to it is read."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from data.asking import Asked
from data.jsonl import Record
from data.prompt import Answer, Exemplar, Prompt
from data.teacher import Reply, RequestError
from data.thoughts import split_thoughts

RAW = 20_000  # characters of a reply that the errors file holds


class Requests:
    def __init__(self, prompt: Prompt, settings: dict[str, Any], params: dict[str, Any]) -> None:
        """settings: model, endpoint, rationalize, keep, reasoning.
        params: of every request; one that is None is left out.
        Raises ValueError for settings that do not fit the prompt.
        """
        if settings["rationalize"] and "{hint}" not in prompt.question:
            raise ValueError('--rationalize needs {hint} in the prompt file\'s "question"')
        self.prompt = prompt
        self.settings = settings
        defaults = {"stop": prompt.stop or None, "stream": False}
        if prompt.schema:
            defaults["response_format"] = prompt.response_format()
        params = defaults | params
        self.params = {name: value for name, value in params.items() if value is not None}

    def body(self, record: Record | Exemplar) -> dict[str, Any]:
        """The request for a row. Under --rationalize the teacher sees the gold label."""
        gold = record.label if self.settings["rationalize"] else None
        body = {"model": self.settings["model"]}
        if self.settings["endpoint"] == "chat":
            body["messages"] = self.prompt.chat(record.input, gold)
        else:
            body["prompt"] = self.prompt.completion(record.input, gold)
        return body | self.params

    def sha256(self, record: Record) -> str:
        """What makes two requests the same."""
        whole = self.body(record) | self.settings
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def read(self, record: Record, warn: Callable[[str, str], None], reply: Reply) -> Answer:
        """The Answer in a reply. Raises RequestError for a reply without a text."""
        sent = texts_sent(self.body(record))
        length = sum(len(text) for text in sent)
        if 0 < reply.usage["prompt"] * 8 < length:
            what = f"the server read {reply.usage['prompt']:,} tokens of {length:,} characters"
            warn("cut", f"{what}; if it cuts prompts, give it a larger context")
        text = reply.text
        echo = re.match(repetition(sent[-1]), text, re.IGNORECASE)
        if echo:
            warn("echo", "the server repeats what it was sent; that is taken off")
            text = text[echo.end() :]
        thoughts, said = split_thoughts(text)
        thoughts = f"{reply.reasoning}\n{thoughts}".strip()
        if not (said.strip() or thoughts or reply.cut_short):
            raise RequestError("empty", "the reply has no text", "moment", reply.text)
        answer = self.prompt.parse(said, record.input, reply.cut_short)
        if answer.error == "empty":
            what = "all tokens went into thoughts; a larger --max-tokens may do"
            if not reply.cut_short:
                what = "the server's parser took the whole answer for thoughts (reasoning)"
            answer = replace(answer, detail=what)
        if answer.error:
            warn(answer.error, f"row {record.id!r}: {answer.error}: {answer.detail}")
        elif thoughts and self.settings["reasoning"] == "keep":
            answer = replace(answer, rationale=f"{thoughts}\n{answer.rationale}")
        return answer

    def row(self, record: Record, asked: Asked, url: str) -> Record:
        """The row with its answer or its error, and where it is from. url: the teacher's."""
        answer = asked.answer
        correct = None
        if not answer.error and record.label is not None:
            correct = self.prompt.same(answer.label, record.label, record.input)
            if self.settings["keep"] == "correct" and not correct:
                what = f"--keep correct: the label {answer.label!r} is not the gold one"
                answer = Answer(error="incorrect", detail=what)
        teacher = self.settings | {
            "params": self.params,
            "base_url": url,
            "request_sha256": self.sha256(record),
            "model_served": asked.model or None,
            "usage": dict(asked.usage),
            "attempts": asked.attempts,
        }
        other = record.other | {"correct": correct}
        other.pop("error", None)  # of an input that is an errors file
        if answer.error:
            raw = asked.raw[:RAW]
            other["error"] = {"kind": answer.error, "message": answer.detail, "raw": raw}
            answer = Answer()
        return replace(
            record,
            rationale=answer.rationale,
            teacher_label=answer.label,
            teacher=teacher,
            other=other,
        )


def texts_sent(body: dict[str, Any]) -> list[str]:
    """The texts in a request."""
    if "prompt" in body:
        return [body["prompt"]]
    return [message["content"] for message in body["messages"]]


def repetition(sent: str) -> str:
    """A pattern for a text that a server repeats, in which white space may differ, with the names
    of roles around it.
    """
    words = r"\s+".join(re.escape(word) for word in sent.split())
    return rf"\W*(\w+\W+)?{words}(\s*(assistant|model)\b:?)?"
