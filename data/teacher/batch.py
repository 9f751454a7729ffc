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

from data.files import replacing
from data.jsonl import RecordError, to_line
from data.teacher.endpoint import Address, Reply, RequestError, read_reply, shown


def custom_id(name: str, request_hash: str, sample: int) -> str:
    return f"{name}-{request_hash[:12]}-{sample}"


def write_requests(path: str, requests: Iterable[tuple[str, dict]], endpoint: str, most: int) -> list[tuple[Path, int]]:
    """Write (custom id, body) pairs, at most `most` a file: F.jsonl, F-2.jsonl, ... Returns files and row counts."""
    url = "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"
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
    """The replies of batch files, by custom id. In memory is only where each lies."""

    def __init__(self, paths: list[str], address: Address):
        """Raises OSError, or RecordError for a line that is no reply."""
        self.files, self.places, self.address = [open(path, "rb") for path in paths], {}, address
        for file, path in zip(self.files, paths):
            offset = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    identity, response, _ = self.parse(line, f"{path}:{number}")
                    good = response.get("status_code") == 200
                    if good or identity not in self.places:  # an error never hides an answer
                        self.places[identity] = file, offset, f"{path}:{number}"
                offset += len(line)

    def parse(self, line, where):
        """(custom id, response, error) of a line. Raises RecordError."""
        try:
            row = json.loads(line)
            identity, response = row["custom_id"], row.get("response") or {}
            if isinstance(identity, str) and isinstance(response, dict):
                return identity, response, row.get("error")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass
        raise RecordError(f'{where}: not a reply of a batch, which has a "custom_id" and a "response"')

    def ask(self, body: dict, identity: str) -> Reply:
        """The reply to one request. Raises RequestError."""
        if identity not in self.places:
            raise RequestError("missing", "the batch files have no reply", "retry")
        file, offset, where = self.places[identity]
        file.seek(offset)
        _, response, error = self.parse(file.readline(), where)
        if not response:
            raise RequestError("missing", f"the batch has no response: {shown(error)[:200]}", "retry")
        status = response.get("status_code")
        status = status if isinstance(status, int) else 200
        return read_reply(status, {}, json.dumps(response.get("body")), body, self.address)

    def close(self):
        for file in self.files:
            file.close()
