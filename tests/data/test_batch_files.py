"""Batch files are accepted by those who read them, and replies in any form of the API are read."""

import json

import pytest
from running import ROOT
from teacher_stub import completed, error

from data import batch_files
from data.asking import Asker
from data.batch_files import Replies, custom_id, write_batch
from data.jsonl import Record
from data.prompt import load_prompt
from data.requests import Requests
from data.teacher import Teacher

SETTINGS = {"model": "m", "endpoint": "chat", "rationalize": False, "keep": "all"}
PROMPT = load_prompt(ROOT / "data" / "prompts" / "toy.json")
REQUESTS = Requests(PROMPT, SETTINGS | {"reasoning": "drop"}, {})
ROWS = [Record(f"r{i}", f"Mia drew {i} plums. Mostly what?") for i in range(7)]
BODY = completed(PROMPT.reply(PROMPT.exemplars[0]))


def test_files_are_cut_by_number_and_by_bytes(tmp_path, monkeypatch):
    def numbers():
        said = []
        write_batch(str(tmp_path / "b.jsonl"), REQUESTS, ROWS, said.append)
        return [line.split("/")[-1] for line in said[:-1]]

    monkeypatch.setattr(batch_files, "MOST_REQUESTS", 3)
    assert numbers() == ["b.jsonl: 3 requests", "b-2.jsonl: 3 requests", "b-3.jsonl: 1 requests"]
    line = (tmp_path / "b-3.jsonl").read_bytes()
    row = json.loads(line)
    assert (row["method"], row["url"]) == ("POST", "/v1/chat/completions")
    assert row["body"] == REQUESTS.body(ROWS[6].input, None)
    monkeypatch.setattr(batch_files, "MOST_BYTES", 2 * len(line))
    assert [text.split()[1] for text in numbers()] == ["2", "2", "2", "1"]


def test_an_id_has_at_most_64_characters_and_each_its_own():
    sha = "0123456789abcdef" * 4
    assert custom_id("r1", sha) == "r1-0123456789ab"
    long = {custom_id("é" * 90 + str(i), sha) for i in range(3)}
    assert len(long) == 3 and all(len(name) <= 64 and name.isascii() for name in long)


def read(tmp_path, *lines, start=b""):
    """{id: the row} of replies, in whose lines "rN" stands for the custom id of row N."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    for row in ROWS:
        text = text.replace(f'"{row.id}"', f'"{custom_id(row.id, REQUESTS.sha256(row))}"')
    (tmp_path / "c.jsonl").write_bytes(start + text.encode())
    replies = Replies([str(tmp_path / "c.jsonl")], REQUESTS, ROWS)
    quiet = lambda *_: ""
    asker = Asker(Teacher("", "chat", [], 1), {}, 0, 0, quiet, quiet)
    return {row.id: row for (row,) in replies.read(REQUESTS, asker, ROWS)}


RESPONSES = [{"status_code": 200, "body": BODY}, {"body": BODY}]
RESPONSES.append({"status_code": 200, "body": json.dumps(BODY)})


@pytest.mark.parametrize("response", RESPONSES)
def test_a_reply_is_read_past_blank_lines_and_a_byte_order_mark(tmp_path, response):
    line = {"custom_id": "r1", "response": response, "error": None}
    rows = read(tmp_path, line, "", "  ", line, start=b"\xef\xbb\xbf")
    assert list(rows) == ["r1"] and rows["r1"].rationale == PROMPT.exemplars[0]["rationale"]


def test_an_error_of_the_row_fails_it_and_one_of_the_batch_is_no_reply(tmp_path):
    context = {"status_code": 400, "body": error("maximum context length is 9")}
    busy = {"status_code": 500, "body": error("busy")}
    rows = read(
        tmp_path,
        {"custom_id": "r1", "response": context},
        {"custom_id": "r2", "response": busy},
        {"custom_id": "r3", "response": None, "error": {"message": "expired"}},
    )
    assert [(name, row.other["error"]["kind"]) for name, row in rows.items()] == [
        ("r1", "context_exceeded")
    ]


FOREIGN = ['{"custom_id": "a", "result": {"type": "succeeded"}}', '{"id": 1}', "[1]"]


@pytest.mark.parametrize("line", FOREIGN)
def test_another_form_is_refused(tmp_path, line):
    with pytest.raises(ValueError, match="c.jsonl:1: not a reply of OpenAI's batch API"):
        read(tmp_path, line)
