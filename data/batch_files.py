"""Batch files in the form of OpenAI's batch API: requests to upload, and the replies that come
back.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data.files import parse_json, replacing
from data.jsonl import read_lines, to_line
from data.teacher import PATHS, Reply, RequestError, Teacher

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


def write_requests(
    path: Path, requests: Iterable[tuple[str, dict]], endpoint: str
) -> Iterator[tuple[Path, int]]:
    """Write (custom id, body) into F.jsonl, F-2.jsonl, ...; yield each file and its number of
    requests.
    """
    lines = []
    size = 0
    number = 0
    for identity, body in requests:
        row = {
            "custom_id": identity,
            "method": "POST",
            "url": f"/v1{PATHS[endpoint]}",
            "body": body,
        }
        line = to_line(row).encode() + b"\n"
        if lines and (len(lines) == MOST_REQUESTS or size + len(line) > MOST_BYTES):
            number += 1
            yield write_file(path, number, lines)
            lines = []
            size = 0
        lines.append(line)
        size += len(line)
    if lines:
        yield write_file(path, number + 1, lines)


def write_file(path: Path, number: int, lines: list[bytes]) -> tuple[Path, int]:
    name = path.with_stem(f"{path.stem}-{number}") if number > 1 else path
    with replacing(name) as file:
        file.writelines(lines)
    return name, len(lines)


class Replies:
    """The replies in batch files, held in memory. A line is

    {"custom_id": "ID-HASH", "response": {"status_code": 200, "body": {...}}, "error": null}
    """

    def __init__(self, paths: Iterable[str]) -> None:
        """Raises OSError, or ValueError for a line that is no reply."""
        self.by_id: dict[str, tuple[int, bytes]] = {}  # custom id -> (status, body); 0: no response
        for path in paths:
            with open(path, "rb") as file:
                for where, _, line in read_lines(file, path):
                    if line.strip():
                        self.add(line, where)

    def add(self, line: str, where: str) -> None:
        row = parse_json(line, where)
        try:
            identity, status, content = read_reply_line(row)
        except (LookupError, TypeError, ValueError, AttributeError):
            form = '{"custom_id": ..., "response": {"status_code": ..., "body": ...}}'
            raise ValueError(f"{where}: not a reply of OpenAI's batch API, {form}") from None
        if identity not in self.by_id or status == 200:  # an error does not replace an answer
            self.by_id[identity] = (status, content)

    def ask(self, identity: str, body: dict, teacher: Teacher) -> Reply | None:
        """The reply to one request, None if there is none yet. Raises RequestError for one that
        failed.
        """
        status, content = self.by_id.get(identity, (0, b""))
        if not status:
            return None
        try:
            return teacher.read(status, {}, content, body)
        except RequestError as error:
            if error.then in ("row", "unclear"):
                raise
            return None  # the batch failed here, not the row


def read_reply_line(row: Any) -> tuple[str, int, bytes]:
    """(custom id, status or 0, body) of a line. Raises LookupError, TypeError, ... for another
    form.
    """
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
