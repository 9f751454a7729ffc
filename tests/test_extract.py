"""The whole of extract.py against a stub teacher: rows, what is printed, the three kinds of
failure, and continuing after any end."""

import json
import os
import re
import signal
import time
from unittest.mock import Mock

import pytest
from extracting import (
    KEY,
    NOWHERE,
    PROMPT,
    always,
    arguments,
    ask,
    errors,
    make_files,
    once,
    rows,
    run,
    start,
)
from running import json_lines, wait_until
from teacher_stub import Stub, answer, completed, error

import extract
from data.jsonl import write_jsonl

SEVEN = completed("Seven." + "x" * 30_000)  # no marker
R4 = "4 + 2"  # of the row r4


def ids(found):
    return [row["id"] for row in found]


def kinds(folder):
    return {row["id"]: row["error"]["kind"] for row in errors(folder)}


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_row_is_the_record_with_the_answer_and_where_it_is_from(files, endpoint):
    line = {"id": 7, "input": "Ünï: what is 7 + 2?", "label": "9", "mine": {"a": [1]}}
    failed = {"error": {"kind": "empty"}}  # as in an errors file
    (files / "in.jsonl").write_text(json.dumps(line | failed))
    extra = '{"top_k":3,"stop":null,"max_tokens":null,"max_completion_tokens":9}'
    stub = ask(files, line=f"--endpoint {endpoint} --extra-body {extra}")
    (row,) = rows(files)
    teacher = row.pop("teacher")
    answered = {"rationale": "7 and 2 more.", "teacher_label": "(7 + 2)", "correct": True}
    assert row == line | {"id": "7"} | answered
    params = {"temperature": 0.0, "stream": False, "top_k": 3, "max_completion_tokens": 9}
    assert teacher["params"] == params, "null leaves a parameter out"
    assert teacher["usage"] == {"prompt": 200, "completion": 20}
    assert (teacher["model_served"], teacher["base_url"]) == ("stub-1", stub.url)
    (request,) = stub.requests
    del request.body["messages" if endpoint == "chat" else "prompt"]
    assert request.question.endswith("?\nA:") and "Authorization" not in request.headers
    assert request.body == {"model": "stub-1", **params}


def test_what_is_printed(files, capsys):
    same = completed("So. The answer is (1).")
    behave = lambda question, attempt: SEVEN if R4 in question else same
    stub = ask(files, behave, "--price-in 2 --price-out 50", 1)
    said = capsys.readouterr().err
    for words in (
        f"teacher: {stub.url}, chat, stub-1",
        f"rows: 6 in {files / 'in.jsonl'}",
        "warning: row 'r4': unparsed: the reply does not say 'The answer is'",
        "5 of 5 rows have the same rationale",
        "tokens: 1,200 in, 120 out; $0.01",
        "errors.jsonl: {'unparsed': 1}; --retry-failed asks failed rows again",
    ):
        assert said.count(words) == 1, words


def test_dry_run_sends_and_writes_nothing(files, capsys):
    assert run(files, NOWHERE, "--dry-run --price-in 1000 --price-out 1000") == 0
    assert re.search(r"Q: What is 0 [\s\S]*requests: 6; .*; \$\d\.\d\d", capsys.readouterr().out)
    assert len(list(files.iterdir())) == 2


def test_keep_correct_leaves_wrong_rows_out_and_never_asks_them_again(files):
    stub = ask(files, line="--keep correct")
    assert ids(rows(files)) == ["r1", "r2", "r4", "r5"] and all(r["correct"] for r in rows(files))
    assert kinds(files) == {"r0": "incorrect", "r3": "incorrect"}
    assert run(files, stub.url, "--keep correct --retry-failed") == 0, "though the teacher is gone"


def test_a_row_that_has_a_rationale_is_copied(files):
    line = {"id": "mine", "input": "What is 9 + 2?", "label": None, "rationale": "Mine."}
    line["error"] = "a key of the user's"
    with (files / "in.jsonl").open("a") as file:
        file.write(json.dumps(line))
    stub = ask(files)
    assert len(stub.requests) == 6 and run(files, NOWHERE) == 0, "nothing is left to ask"
    assert rows(files)[6] == line | {"teacher_label": None, "teacher": None}


def test_batch_files_give_the_rows_that_asking_gives(files, refused):
    refusal = error("maximum context length")
    assert run(files, NOWHERE, f"--batch-requests {files}/b.jsonl") == 0
    replies = []
    for request in json_lines(files / "b.jsonl"):
        question = request["body"]["messages"][-1]["content"]
        response = {"body": completed(answer(question))}
        if R4 in question:
            response = {"status_code": 400, "body": refusal}
        replies.append({"custom_id": request["custom_id"], "response": response})
    expired = replies[5] | {"response": None}
    write_jsonl(files / "c.jsonl", [expired, *replies[4::-1]])
    read = f"--batch-replies {files}/c.jsonl"
    other = arguments(files, NOWHERE, f"{read} --temperature 1")
    assert "a request that these settings and rows do not make" in refused(extract.main, *other)
    assert run(files, NOWHERE, read) == 1 and ids(rows(files)) == ["r0", "r1", "r2", "r3"]
    write_jsonl(files / "c.jsonl", replies)
    assert run(files, NOWHERE, read) == 1 and kinds(files) == {"r4": "http_400"}
    ask(make_files(files / "asked"), always((400, refusal, {}), R4), status=1)
    for row, asked in zip(rows(files), rows(files / "asked"), strict=True):
        asked["teacher"]["base_url"] = ""
        assert row == asked


# The three kinds of failure.


MOMENTS = [503, "disconnect", "cut off", "late", (200, b"{'choices'", {}), completed(None)]


@pytest.mark.parametrize("action", MOMENTS)
def test_a_failure_of_the_moment_is_asked_again(files, action):
    stub = ask(files, once(action), "--limit 3 --timeout 0.6")
    assert [r["teacher"]["attempts"] for r in rows(files)] == [2] * 3 and len(stub.requests) == 6


@pytest.mark.parametrize("workers", [1, 4])
def test_a_row_that_outlasts_its_retries_fails_and_the_others_go_on(files, workers):
    ask(files, always("disconnect", R4), f"--max-retries 1 --concurrency {workers}", 1)
    assert len(rows(files)) == 5 and [e["teacher"]["attempts"] for e in errors(files)] == [2]


def test_a_failed_row_is_asked_again_only_with_retry_failed_and_has_its_raw_text(files):
    ask(files, always(SEVEN, R4), status=1)
    (row,) = errors(files)
    assert row["error"]["kind"] == "unparsed" and row["rationale"] is None
    assert row["error"]["raw"].startswith("Seven.x") and len(row["error"]["raw"]) == 20_000
    assert not ask(files, status=1).requests
    assert len(ask(files, line="--retry-failed").requests) == 1
    assert ids(rows(files)) == [f"r{i}" for i in range(6)] and not errors(files)


def test_a_429_is_waited_for_by_64_threads_and_is_no_attempt(tmp_path):
    ask(make_files(tmp_path, 70), once(429, 429), "--max-retries 0 --concurrency 64")
    assert [r["teacher"]["attempts"] for r in rows(tmp_path)] == [1] * 70


def test_retry_after_pauses_every_thread(tmp_path):
    busy = (503, error("busy"), {"Retry-After": "80"})  # 0.8 s here
    behave = lambda question, attempt: busy if "is 3 +" in question and not attempt else "ok"
    stub = ask(make_files(tmp_path, 50), behave, latency=0.1)  # which takes 0.7 s
    start = next(request.time for request in stub.requests if "is 3 +" in request.question)
    assert not [r for r in stub.requests if start + 0.35 < r.time < start + 0.8]


@pytest.mark.parametrize("action", [429, "disconnect"])
def test_while_nobody_is_answered_no_row_fails_and_patience_ends(files, capsys, action):
    with Stub(lambda q, attempt: action if len(stub.requests) > 3 else "ok") as stub:
        assert run(files, stub.url, "--patience 30 --max-retries 4") == 3
    assert "nobody was answered for 30 s (--patience)" in capsys.readouterr().err
    assert not errors(files) and len(rows(files)) == 3
    ask(files)
    assert len(rows(files)) == 6


ENDS = [  # (reply, requests, words); 2 requests: whether others are answered, an exemplar shows
    ((401, error("bad key"), {}), 1, "$OPENAI_API_KEY"),
    ((429, error("later"), {"Retry-After": "3600"}), 1, "a pause of 3600 s"),
    ((400, error("`stop` is deprecated for this model"), {}), 2, '{"NAME": null}'),
    ({"error": "Unexpected endpoint. (POST /chat/completions)"}, 2, "ends in /v1"),
]


@pytest.mark.parametrize("reply, requests, words", ENDS)
def test_what_cannot_pass_ends_the_run_at_once(files, capsys, reply, requests, words):
    assert len(ask(files, always(reply), "--concurrency 1", 3).requests) == requests
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("extract.py: aborted: ") and words in said
    assert "the same command goes on" in said and not errors(files), "no row has failed"


def test_an_unknown_4xx_is_the_rows_if_others_are_answered(files):
    ask(files, always(418, "0 + 2"), "--concurrency 1", 1)
    assert kinds(files) == {"r0": "http_418"} and len(rows(files)) == 5


def test_max_cost_ends_the_asking_and_keeps_what_is_in_flight(tmp_path, capsys):
    make_files(tmp_path, 50)
    line = "--price-in 1000 --price-out 5000 --concurrency 4 --max-cost 3"  # $0.30 a request
    stub = ask(tmp_path, line=line, status=3, latency=0.02)
    assert 10 <= len(stub.requests) == len(rows(tmp_path)) <= 13 and not errors(tmp_path)
    assert "has reached --max-cost" in capsys.readouterr().err


# Continuing.


def test_what_changes_a_request_is_refused_and_nothing_is_touched(files, refused):
    ask(files, line="--limit 3")
    before = (files / "out.jsonl").read_bytes()
    others = ["--max-tokens 9", '--extra-body {"stop":null}', "--endpoint completions"]
    for line in (*others, "--rationalize", "--keep correct", ""):
        if not line:
            (files / "p.json").write_text(json.dumps(PROMPT | {"instruction": "Add."}))
        said = refused(extract.main, *arguments(files, NOWHERE, line))
        assert "row 'r0' was asked with other settings, prompt file or input" in said
        assert (files / "out.jsonl").read_bytes() == before


def test_failed_rows_are_asked_again_under_other_settings(files):
    ask(files, always(completed("It is", "length")), status=1)
    assert set(kinds(files).values()) == {"truncated"}
    ask(files, line="--max-tokens 999")
    assert len(rows(files)) == 6 and not errors(files)


def test_wherever_a_crash_cuts_the_output_the_next_start_completes_it(files):
    ask(files)
    content = (files / "out.jsonl").read_bytes()
    for share in (0.03, 0.4, 0.72, 0.999):
        (files / "out.jsonl").write_bytes(content[: int(share * len(content))])
        ask(files)
        assert ids(rows(files)) == [f"r{i}" for i in range(6)]


def test_ctrl_c_keeps_everything_that_is_in_flight(tmp_path, capsys):
    def behave(question, attempt):
        if len(stub.requests) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return "ok"

    make_files(tmp_path, 60)
    with Stub(behave, latency=0.05) as stub:
        assert run(tmp_path, stub.url) == 130
        assert "interrupted; what was finished is in the files" in capsys.readouterr().err
        assert 20 <= len(rows(tmp_path)) == len(stub.requests) < 60, "each reply paid for is there"
        assert run(tmp_path, stub.url) == 0 and len(stub.requests) == len(rows(tmp_path)) == 60


def test_the_second_ctrl_c_ends_at_once(tmp_path):
    with Stub(latency=9) as stub:
        process = start(make_files(tmp_path), stub.url)
        wait_until(lambda: stub.requests)
        process.send_signal(signal.SIGINT)
        time.sleep(1.1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=5)[1]
    assert process.returncode == 130 and said.endswith("extract.py: interrupted\n")


def test_a_full_disk_ends_the_run_and_the_next_start_goes_on(files, capsys, monkeypatch):
    full = Mock(side_effect=OSError(28, "No space left"))
    monkeypatch.setattr(extract, "append", full)
    ask(files, status=3)
    assert "extract.py: aborted: [Errno 28] No space left" in capsys.readouterr().err
    monkeypatch.undo()
    ask(files)


def test_150_rows_a_teacher_that_fails_40_percent_and_two_kills(tmp_path):
    """Every answerable row once, in order, with its own rationale; the key nowhere."""
    make_files(tmp_path, 150)
    cut = completed("3 more. The", "length")
    dead = {7: completed(None), 32: 500, 82: (200, b"<html>", {}), 107: cut}

    def behave(question, attempt):
        if len(stub.requests) in (80, 180):
            process.kill()
        i = int(re.findall(r"\d+", question)[-2])
        draw = (i * 2654435761 + attempt * 40503) % 1000
        if i in dead or draw > 480 or attempt >= 5:
            return dead.get(i, "ok")
        return (429, *MOMENTS)[draw % 7]

    said = []
    with Stub(behave, latency=0.01) as stub:
        for status in (-signal.SIGKILL, -signal.SIGKILL, 1):
            process = start(tmp_path, stub.url, "--timeout 0.8")
            said.append(process.communicate()[1])
            assert process.returncode == status, said
        asked = len(stub.requests)
        assert run(tmp_path, stub.url) == 1 and len(stub.requests) == asked, "nothing left to ask"
    assert ids(rows(tmp_path)) == [f"r{i}" for i in range(150) if i not in dead]
    for row in rows(tmp_path):
        assert f"{row['rationale']} The answer is {row['teacher_label']}." == answer(row["input"])
    assert list(kinds(tmp_path)) == [f"r{i}" for i in dead]
    assert set(kinds(tmp_path).values()) == {"empty", "http_500", "bad_reply", "truncated"}
    for text in [*said, *(path.read_text("utf-8") for path in tmp_path.iterdir())]:
        assert KEY not in text
