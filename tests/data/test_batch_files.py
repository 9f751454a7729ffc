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

SETTINGS = {"model": "m", "endpoint": "chat", "rationalize": False, "keep": "all"}
PROMPT = load_prompt(ROOT / "data" / "prompts" / "toy.json")
REQUESTS = Requests(PROMPT, SETTINGS | {"reasoning": "drop"}, {})
ROWS = [Record("é" * 90 + str(i), f"Mia drew {i} plums. Mostly what?") for i in range(4)]
BODY = completed("It is late.")


@pytest.fixture
def names(tmp_path):
    """The custom ids of a file of requests."""
    assert write_batch(tmp_path / "b.jsonl", REQUESTS, ROWS) == 4
    return [line["custom_id"] for line in json_lines(tmp_path / "b.jsonl")]


def test_a_request_is_the_apis_and_an_id_has_at_most_64_characters(tmp_path, names):
    line = json_lines(tmp_path / "b.jsonl")[3]
    assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
    assert line["body"] == REQUESTS.body(ROWS[3])
    assert len(set(names)) == 4 and all(len(name) <= 64 for name in names)


def read(tmp_path, *lines, start=""):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / "c.jsonl").write_text(start + text)
    return read_replies([str(tmp_path / "c.jsonl")], REQUESTS, ROWS)


RESPONSES = [{"status_code": 200, "body": BODY}, {"body": BODY}]
RESPONSES.append({"status_code": 200, "body": json.dumps(BODY)})


@pytest.mark.parametrize("response", RESPONSES)
def test_a_reply_is_read_past_blank_lines_and_a_byte_order_mark(tmp_path, names, response):
    line = {"custom_id": names[1], "response": response}
    failed = {"custom_id": names[1], "response": {"status_code": 500, "body": {}}}
    replies = read(tmp_path, line, "", "  ", failed, start="\ufeff")
    (status, body) = replies.pop(names[1])
    assert (status, json.loads(body)) == (200, BODY) and not replies


FOREIGN = ['{"custom_id": "a", "result": {"type": "succeeded"}}', '{"id": 1}', "[1]"]


@pytest.mark.parametrize("line", FOREIGN)
def test_another_form_is_refused(tmp_path, line):
    with pytest.raises(ValueError, match="c.jsonl:1: not a reply of OpenAI's batch API"):
        read(tmp_path, line)
