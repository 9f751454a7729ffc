"""Batch files: requests and replies as JSONL, in the form of OpenAI's batch API, Together's and vLLM's `run_batch`.

    request  {"custom_id": "ID-HASH-SAMPLE", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    reply    {"custom_id": ..., "response": {"status_code": 200, "body": {...}}, "error": null}

HASH is the first 12 digits of the request's hash, so that replies to other requests are known as such.
"""

import json

from data.files import parse_json
from data.teacher.endpoint import Reply, RequestError, Teacher, read_reply


def custom_id(name: str, request_hash: str, sample: int) -> str:
    return f"{name}-{request_hash[:12]}-{sample}"


class Replies:
    """The replies of batch files, asked for as a Teacher is. In memory is only where each lies."""

    def __init__(self, paths: list[str], teacher: Teacher):
        """Raises OSError, or ValueError for a line that is no reply."""
        self.places, self.teacher = {}, teacher  # custom id -> (file, where its line begins)
        for path in paths:
            offset = 0
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    try:
                        identity, status, _ = parse(line)
                    except (ValueError, LookupError, TypeError, AttributeError):
                        what = 'not a reply of a batch, which has a "custom_id" and a "response"'
                        raise ValueError(f"{path}:{number}: {what}") from None
                    if identity not in self.places or status == 200:  # no error hides an answer
                        self.places[identity] = path, offset
                    offset += len(line)

    def ask(self, body: dict, identity: str) -> Reply:
        """The reply to one request. Raises RequestError."""
        if identity not in self.places:
            raise RequestError("missing", "the batch files have no reply", "retry")
        path, offset = self.places[identity]
        with open(path, "rb") as file:
            file.seek(offset)
            _, status, content = parse(file.readline())
        if not status:
            raise RequestError("missing", "the batch has no response", "retry")
        return read_reply(status, {}, json.dumps(content), body, self.teacher)


def parse(line):
    """(custom id, status, body) of a line; without a response the status is 0."""
    row = parse_json(line, "a reply")
    response = row.get("response") or {"status_code": 0, "body": None}
    if not isinstance(row["custom_id"], str):
        raise TypeError
    return row["custom_id"], int(response["status_code"]), response["body"]
