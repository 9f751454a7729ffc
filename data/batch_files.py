"""Batch files of OpenAI's batch API: requests to upload, and the replies that come back."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from data.asking import Asked, Asker
from data.files import parse_json
from data.jsonl import Record, read_lines, write_jsonl
from data.prompt import Answer
from data.requests import Requests
from data.teacher import PATHS, RequestError

NO_REPLY = (500, b"")  # as if the server had failed


def custom_id(record: Record, requests: Requests) -> str:
    """The id of a row's request, of at most 64 characters: what is accepted. The hash tells rows
    apart, and replies to other requests.
    """
    whole = f"{record.id} {requests.sha256(record)}"
    return f"{record.id[:40]}-{hashlib.sha256(whole.encode()).hexdigest()[:20]}"


def write_batch(path: str, requests: Requests, rows: Iterable[Record]) -> int:
    """Write the requests for rows into a file. Returns their number."""
    lines = []
    for record in rows:
        lines.append(
            {
                "custom_id": custom_id(record, requests),
                "method": "POST",
                "url": "/v1" + PATHS[requests.settings["endpoint"]],
                "body": requests.body(record),
            }
        )
    write_jsonl(path, lines)
    return len(lines)


def read_replies(
    paths: Iterable[str], requests: Requests, rows: Iterable[Record]
) -> dict[str, tuple[int, bytes]]:
    """{custom id: (status, body)} of the replies in files. A line is

        {"custom_id": "ID-HASH", "response": {"status_code": 200, "body": {...}}, "error": null}

    Raises OSError, or ValueError for a line that is no reply to a request for these rows.
    """
    replies: dict[str, tuple[int, bytes]] = {}
    known = {custom_id(row, requests) for row in rows}
    for path in paths:
        with open(path, "rb") as file:
            for where, _, line in read_lines(file, path):
                if not line.strip():
                    continue
                identity, status, content = read_reply_line(parse_json(line, where), where)
                if identity not in known:
                    what = f"a reply to {identity!r}, a request that these settings and rows"
                    raise ValueError(f"{where}: {what} do not make")
                if identity not in replies or status == 200:  # an error does not replace an answer
                    replies[identity] = (status, content)
    return replies


def answers(
    replies: dict[str, tuple[int, bytes]], requests: Requests, asker: Asker, todo: Iterable[Record]
) -> Iterator[Record]:
    """Yield the rows with their answers. Rows without a reply stay to be asked."""
    for record in todo:
        status, content = replies.get(custom_id(record, requests), NO_REPLY)
        try:
            reply = asker.teacher.read(status, {}, content)
            asker.pay(reply.usage)
            answer = requests.read(record, asker.warn, reply)
            asked = Asked(answer, reply.text, reply.model, usage=Counter(reply.usage))
        except RequestError as error:
            if error.then not in ("row", "unclear"):
                continue  # the batch failed here, not the row
            asked = Asked(Answer(error=error.kind, detail=str(error)), error.raw)
        yield requests.row(record, asked, "")


def read_reply_line(row: Any, where: str) -> tuple[str, int, bytes]:
    """(custom id, status, body) of a line. Raises ValueError for another form."""
    try:
        response = row["response"]
        if response is None:  # with an error: expired, for one
            return row["custom_id"], *NO_REPLY
        content = response["body"]
        if not isinstance(content, str):
            content = json.dumps(content)
        return row["custom_id"], response.get("status_code", 200), content.encode()
    except (LookupError, TypeError, AttributeError):
        form = '{"custom_id": ..., "response": {"status_code": ..., "body": ...}}'
        raise ValueError(f"{where}: not a reply of OpenAI's batch API, {form}") from None
