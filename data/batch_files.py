"""Batch files of OpenAI's batch API: requests to upload, and the replies that come back."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from data.asking import Asked, Asker
from data.files import parse_json, replacing
from data.jsonl import Record, read_lines, to_line
from data.prompt import Answer
from data.requests import Requests
from data.teacher import PATHS, RequestError

MOST_REQUESTS = 50_000  # in one file
MOST_BYTES = 190_000_000  # of one file; 200 MB are accepted
LONGEST_ID = 64  # characters of a custom_id


def custom_id(row_id: str, request_sha256: str) -> str:
    """The id of a request. Its hash tells replies to other requests apart."""
    name = f"{row_id}-{request_sha256[:12]}"
    if len(name) > LONGEST_ID:
        row_hash = hashlib.sha256(row_id.encode("utf-8", "replace")).hexdigest()
        name = f"{row_hash[:40]}-{request_sha256[:12]}"
    return name


def write_batch(
    path: str, requests: Requests, rows: Iterable[Record], say: Callable[[str], None]
) -> int:
    """Write the requests for rows into F.jsonl, F-2.jsonl, ..., and say how to go on."""
    lines = []
    size = 0
    number = 1
    for record in rows:
        if record.rationale is not None:
            continue
        line = to_line(
            {
                "custom_id": custom_id(record.id, requests.sha256(record)),
                "method": "POST",
                "url": "/v1" + PATHS[requests.settings["endpoint"]],
                "body": requests.body(record.input, record.label),
            }
        ).encode()
        if lines and (len(lines) == MOST_REQUESTS or size + len(line) + 1 > MOST_BYTES):
            write_file(path, number, lines, say)
            number += 1
            lines = []
            size = 0
        lines.append(line)
        size += len(line) + 1
    write_file(path, number, lines, say)
    say("next: the same command with --batch-replies FILE in place of --batch-requests")
    return 0


def write_file(path: str, number: int, lines: list[bytes], say: Callable[[str], None]) -> None:
    name = Path(path)
    if number > 1:
        name = name.with_stem(f"{name.stem}-{number}")
    with replacing(name) as file:
        file.writelines(line + b"\n" for line in lines)
    say(f"{name}: {len(lines):,} requests")


class Replies:
    """The replies in batch files, held in memory. A line is

    {"custom_id": "ID-HASH", "response": {"status_code": 200, "body": {...}}, "error": null}
    """

    def __init__(self, paths: Iterable[str], requests: Requests, rows: Iterable[Record]) -> None:
        """Raises OSError, or ValueError for a line that is no reply to a request for these rows."""
        self.by_id: dict[str, tuple[int, bytes]] = {}  # custom id -> (status, body); 0: no response
        for path in paths:
            with open(path, "rb") as file:
                for where, _, line in read_lines(file, path):
                    if line.strip():
                        self.add(line, where)
        known = {custom_id(r.id, requests.sha256(r)) for r in rows if r.rationale is None}
        foreign = sorted(self.by_id.keys() - known)
        if foreign:
            what = f"{len(foreign):,} replies, such as {foreign[0]!r}, are to requests"
            raise ValueError(f"{path}: {what} that these settings and rows do not make")

    def add(self, line: str, where: str) -> None:
        row = parse_json(line, where)
        try:
            identity, status, content = read_reply_line(row)
        except (LookupError, TypeError, ValueError, AttributeError):
            form = '{"custom_id": ..., "response": {"status_code": ..., "body": ...}}'
            raise ValueError(f"{where}: not a reply of OpenAI's batch API, {form}") from None
        if identity not in self.by_id or status == 200:  # an error does not replace an answer
            self.by_id[identity] = (status, content)

    def read(
        self, requests: Requests, asker: Asker, todo: Iterable[Record]
    ) -> Iterator[list[Record]]:
        """Yield the rows with their answers, each alone. Rows without a reply stay to be asked."""
        for record in todo:
            if record.rationale is not None:
                yield [requests.row(record, None, "")]
                continue
            identity = custom_id(record.id, requests.sha256(record))
            status, content = self.by_id.get(identity, (0, b""))
            if not status:
                continue
            body = requests.body(record.input, record.label)
            try:
                reply = asker.teacher.read(status, {}, content, body)
                asker.pay(reply.usage)
                answer = requests.read(record, body, asker.warn, reply)
                asked = Asked(answer, reply.text, reply.model, usage=Counter(reply.usage))
            except RequestError as error:
                if error.then not in ("row", "unclear"):
                    continue  # the batch failed here, not the row
                asked = Asked(Answer(error=error.kind, detail=str(error)), error.raw)
            yield [requests.row(record, asked, "")]


def read_reply_line(row: Any) -> tuple[str, int, bytes]:
    """(custom id, status or 0, body) of a line. Raises LookupError, ... for another form."""
    identity = row["custom_id"]
    if not isinstance(identity, str) or not row.keys() & {"response", "error"}:
        raise TypeError
    response = row.get("response")
    if response is None:
        return identity, 0, b""
    content = response["body"]
    if not isinstance(content, str):
        content = json.dumps(content)
    return identity, int(response.get("status_code", 200)), content.encode()
