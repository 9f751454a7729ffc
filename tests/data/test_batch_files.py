"""Batch files are accepted by those who read them, and replies in any form of the API are read."""

import json

import pytest
from teacher_stub import completed, error

from data import batch_files
from data.batch_files import Replies, custom_id, write_requests
from data.teacher import RequestError, Teacher

SHA = "0123456789abcdef" * 4
BODY = completed("Two.")


def test_files_are_cut_by_number_and_by_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_files, "MOST_REQUESTS", 3)
    requests = [(f"r{i}", {"prompt": "x"}) for i in range(7)]
    made = list(write_requests(tmp_path / "b.jsonl", requests, "completions"))
    assert [(path.name, count) for path, count in made] == [
        ("b.jsonl", 3),
        ("b-2.jsonl", 3),
        ("b-3.jsonl", 1),
    ]
    row = {"custom_id": "r6", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    line = (tmp_path / "b-3.jsonl").read_bytes()
    assert json.loads(line) == row
    monkeypatch.setattr(batch_files, "MOST_BYTES", 2 * len(line))
    assert [
        count for _, count in write_requests(tmp_path / "b.jsonl", requests, "completions")
    ] == [2, 2, 2, 1]


def test_an_id_has_at_most_64_characters_and_each_its_own():
    assert custom_id("r1", SHA) == "r1-0123456789ab"
    long = {custom_id("é" * 90 + str(i), SHA) for i in range(3)}
    assert len(long) == 3 and all(len(name) <= 64 and name.isascii() for name in long)


def replies(tmp_path, *lines, start=b""):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / "c.jsonl").write_bytes(start + text.encode())
    return Replies([str(tmp_path / "c.jsonl")])


@pytest.mark.parametrize(
    "response",
    [
        {"status_code": 200, "body": BODY},
        {"body": BODY},
        {"status_code": 200, "body": json.dumps(BODY)},
    ],
)
def test_a_reply_is_read_past_blank_lines_and_a_byte_order_mark(tmp_path, response):
    line = {"custom_id": "a", "response": response, "error": None}
    found = replies(tmp_path, line, "", "  ", line, start=b"\xef\xbb\xbf")
    teacher = Teacher("", "chat", [], 1)
    assert found.ask("a", {}, teacher).text == "Two." and found.ask("b", {}, teacher) is None


def test_an_error_of_the_row_is_raised_and_one_of_the_batch_is_no_reply(tmp_path):
    context = {"status_code": 400, "body": error("maximum context length is 9")}
    busy = {"status_code": 500, "body": error("busy")}
    found = replies(
        tmp_path,
        {"custom_id": "a", "response": context},
        {"custom_id": "b", "response": busy},
        {"custom_id": "c", "response": None, "error": {"message": "expired"}},
    )
    teacher = Teacher("", "chat", [], 1)
    with pytest.raises(RequestError, match="maximum context"):
        found.ask("a", {}, teacher)
    assert found.ask("b", {}, teacher) is found.ask("c", {}, teacher) is None


@pytest.mark.parametrize(
    "line", ['{"custom_id": "a", "result": {"type": "succeeded"}}', '{"id": 1}', "[1]"]
)
def test_another_form_is_refused(tmp_path, line):
    with pytest.raises(ValueError, match="c.jsonl:1: not a reply of OpenAI's batch API"):
        replies(tmp_path, line)
