"""Batch files: the requests of a run as JSONL, and the replies to them, in the form of OpenAI's batch API.

    request  {"custom_id": "ID-HASH-SAMPLE", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    reply    {"custom_id": ..., "response": {"status_code": 200, "body": {...}}, "error": null}

Together's batch API and vLLM's `run_batch` read and write the same. HASH is the first 12 digits of the request's hash,
so that replies to other requests are known as such.
"""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from data.files import parse_json, replacing
from data.jsonl import RecordError, to_line
from data.teacher.endpoint import Reply, RequestError, Teacher, read_reply, shown


def custom_id(name: str, request_hash: str, sample: int) -> str:
    return f"{name}-{request_hash[:12]}-{sample}"


def write_requests(path: str, requests: Iterable[tuple[str, dict]], url: str, most: int) -> list[tuple[Path, int]]:
    """Write (custom id, body) pairs, at most `most` a file: F.jsonl, F-2.jsonl, ... Returns files and row counts."""
    path, requests, files = Path(path), iter(requests), []
    while part := list(islice(requests, most)):
        name = path.with_stem(f"{path.stem}-{len(files) + 1}") if files else path
        with replacing(name) as file:
            for identity, body in part:
                line = {"custom_id": identity, "method": "POST", "url": url, "body": body}
                file.write(to_line(line).encode() + b"\n")
        files.append((name, len(part)))
    return files


class Replies:
    """The replies of batch files, asked for as a Teacher is. In memory is only where each lies."""

    def __init__(self, paths: list[str], teacher: Teacher):
        """Raises OSError, or RecordError for a line that is no reply."""
        self.places, self.teacher = {}, teacher  # custom id -> (file, where its line begins)
        for path in paths:
            with open(path, "rb") as file:
                offset = 0
                for number, line in enumerate(file, 1):
                    try:
                        identity, response, _ = parse(line)
                    except (ValueError, LookupError, TypeError, AttributeError):
                        what = 'not a reply of a batch, which has a "custom_id" and a "response"'
                        raise RecordError(f"{path}:{number}: {what}") from None
                    if identity not in self.places or response.get("status_code") == 200:  # no error hides an answer
                        self.places[identity] = path, offset
                    offset += len(line)

    def ask(self, body: dict, identity: str) -> Reply:
        """The reply to one request. Raises RequestError."""
        if identity not in self.places:
            raise RequestError("missing", "the batch files have no reply", "retry")
        path, offset = self.places[identity]
        with open(path, "rb") as file:
            file.seek(offset)
            _, response, error = parse(file.readline())
        if not response:
            raise RequestError("missing", f"the batch has no response: {shown(error)[:200]}", "retry")
        return read_reply(int(response["status_code"]), {}, json.dumps(response["body"]), body, self.teacher)


def parse(line):
    """(custom id, response or {}, error) of a line."""
    row = parse_json(line, "a reply")
    response = row.get("response") or {}
    if not isinstance(row["custom_id"], str) or response and not (int(response["status_code"]) and "body" in response):
        raise ValueError
    return row["custom_id"], response, row.get("error")
