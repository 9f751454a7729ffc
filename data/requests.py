"""The request for a row, and how the reply to it is read."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from data.asking import Asked
from data.jsonl import Record
from data.prompt import Answer, Prompt
from data.teacher import Reply, RequestError
from data.thoughts import split_thoughts

RAW = 20_000  # characters of a reply that the errors file keeps


class Requests:
    def __init__(self, prompt: Prompt, settings: dict[str, Any], params: dict[str, Any]) -> None:
        """settings: model, endpoint, rationalize, keep, reasoning.
        params: of every request; one that is None is left out.
        Raises ValueError for settings that do not fit the prompt.
        """
        if settings["rationalize"] and "{hint}" not in prompt.question:
            raise ValueError('--rationalize needs {hint} in the prompt file\'s "question"')
        if prompt.schema and settings["endpoint"] != "chat":
            raise ValueError('a prompt file with "schema" needs --endpoint chat')
        self.prompt = prompt
        self.settings = settings
        defaults = {"stop": list(prompt.stop) or None, "stream": False}
        if prompt.schema:
            defaults["response_format"] = prompt.response_format()
        params = defaults | params
        self.params = {name: value for name, value in params.items() if value is not None}

    def body(self, input: str, label: str | None) -> dict[str, Any]:
        """The request for one input. label: gold, which --rationalize shows."""
        gold = label if self.settings["rationalize"] else None
        body = {"model": self.settings["model"]}
        if self.settings["endpoint"] == "chat":
            body["messages"] = self.prompt.chat(input, gold)
        else:
            body["prompt"] = self.prompt.completion(input, gold)
        return body | self.params

    def sha256(self, record: Record) -> str | None:
        """What makes two requests the same. None for a row that has a rationale, which is kept."""
        if record.rationale is not None:
            return None
        whole = self.body(record.input, record.label) | self.settings
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """The part of a row's `teacher` that is the same for all rows."""
        return self.settings | {"prompt_sha256": self.prompt.sha256, "params": self.params}

    def read(
        self, record: Record, body: dict[str, Any], warn: Callable[[str, str], None], reply: Reply
    ) -> Answer:
        """The Answer in a reply. Raises RequestError for a reply without a text."""
        if reply.model and reply.model != self.settings["model"]:
            what = f"asked for {self.settings['model']!r}, served by {reply.model!r}"
            warn("model", what)
        length = characters(body)
        if 0 < reply.usage["prompt"] * 8 < length:
            what = f"the server read {reply.usage['prompt']:,} tokens of {length:,} characters"
            warn("cut", f"{what}; if it cuts prompts, give it a larger context")
        text = without_echo(reply.text, body)
        if text != reply.text:
            warn("echo", "the server repeats what it was sent; that is taken off")
        thoughts, said = split_thoughts(text, self.prompt.has_marker)
        thoughts = "\n".join(each for each in (reply.reasoning, thoughts) if each)
        if not said.strip() and not thoughts and not reply.cut_short:
            raise RequestError("empty", "the reply has no text", "moment", reply.text)
        answer = self.prompt.parse(said, record.input, reply.cut_short)
        if answer.error == "empty":
            what = "the reply has thoughts and no answer"
            if reply.cut_short:
                what = "all tokens went into thoughts; a larger --max-tokens may do"
            elif self.prompt.has_marker(reply.reasoning):
                what = "the answer is in the reasoning field; the server's parser put it there"
            answer = replace(answer, detail=what)
        if answer.error:
            warn(answer.error, f"row {record.id!r}: {answer.error}: {answer.detail}")
        elif thoughts and self.settings["reasoning"] == "keep":
            answer = replace(answer, rationale=f"{thoughts}\n{answer.rationale}")
        return answer

    def row(self, record: Record, asked: Asked | None, url: str) -> Record:
        """The row with its answer or its error, and where it is from.

        asked: None for a row that is kept as it came. url: the teacher's.
        """
        if asked is None:
            return replace(record, teacher=None)
        answer = asked.answer
        correct = None
        if not answer.error and record.label is not None:
            correct = self.prompt.same(answer.label, record.label, record.input)
            if self.settings["keep"] == "correct" and not correct:
                what = f"--keep correct: the label {answer.label!r} is not the gold one"
                answer = Answer(error="incorrect", detail=what)
        teacher = self.provenance() | {
            "base_url": url,
            "request_sha256": self.sha256(record),
            "model_served": asked.model or None,
            "usage": {name: asked.usage[name] for name in ("prompt", "completion", "cached")},
            "attempts": asked.attempts,
            "latency_s": round(asked.seconds, 3),
            "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        other = record.other | {"correct": correct}
        other.pop("error", None)
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


def without_echo(text: str, body: dict[str, Any]) -> str:
    """The reply without what was sent, which some servers repeat first. White space may differ."""
    sent = [message["content"] for message in body.get("messages", [])] or [body["prompt"]]
    question = sent[-1].split("\n\n")[-1]
    for first, last in ((sent[0], sent[-1]), (sent[-1], sent[-1]), (question, question)):
        begins = re.match(r"\W*(\w+\W+)?" + loosely(first), text)
        ends = list(re.finditer(loosely(last), text)) if begins else []
        if ends:
            rest = text[ends[-1].end() :]
            return re.sub(r"^\s*(assistant|model)\b:?", "", rest, flags=re.IGNORECASE)
    return text


def loosely(text: str) -> str:
    """A pattern for a text whose white space may differ."""
    return r"\s+".join(re.escape(word) for word in text.split())


def characters(body: dict[str, Any]) -> int:
    """The length of the texts in a request."""
    texts = [message["content"] for message in body.get("messages", [])]
    return len(body.get("prompt", "")) + sum(len(text) for text in texts)
