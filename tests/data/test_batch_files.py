"""Batch files are accepted by those who read them, and replies in any form of the API are read.
What follows from a reply is in test_extract.py.
"""

import json

import pytest
from running import ROOT, json_lines
from teacher_stub import completed

from data.batch_files import read_replies, write_batch
from data.jsonl import Record
from data.prompt import load_prompt
from data.requests import Requests

PROMPT = load_prompt(ROOT / "data" / "prompts" / "toy.json")
REQUESTS = Requests(PROMPT, {"model": "m", "endpoint": "chat", "rationalize": False}, {})
ROWS = [Record("é" * 90 + str(i), f"Mia drew {i} plums. Mostly what?") for i in range(2)]
BODY = completed("It is late.")


@pytest.fixture
def requests(tmp_path):
    """The lines of a file of requests."""
    write_batch(tmp_path / "b.jsonl", REQUESTS, ROWS)
    return json_lines(tmp_path / "b.jsonl")


def test_a_request_is_the_apis_and_an_id_has_at_most_64_characters(requests):
    names = [line.pop("custom_id") for line in requests]
    assert names[0] != names[1] and all(len(name) <= 64 for name in names)
    body = REQUESTS.body(ROWS[1])
    assert requests[1] == {"method": "POST", "url": "/v1/chat/completions", "body": body}


def read(tmp_path, text):
    (tmp_path / "c.jsonl").write_text(text)
    return read_replies([str(tmp_path / "c.jsonl")], REQUESTS, ROWS)


def test_a_reply_is_read_past_blank_lines_and_a_byte_order_mark(tmp_path, requests):
    lines = []
    for status, body in ((200, json.dumps(BODY)), (500, {})):
        response = {"status_code": status, "body": body}
        lines.append(json.dumps({"custom_id": requests[1]["custom_id"], "response": response}))
    ((status, body),) = read(tmp_path, "\ufeff" + "\n\n  \n".join(lines)).values()
    assert (status, json.loads(body)) == (200, BODY)


@pytest.mark.parametrize("line", ['{"custom_id": "a", "result": {}}', '{"id": 1}', "[1]"])
def test_another_form_is_refused(tmp_path, line):
    with pytest.raises(ValueError, match="c.jsonl:1: not a reply of OpenAI's batch API"):
        read(tmp_path, line)
