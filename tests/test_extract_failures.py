"""extract.py against a teacher that fails in every way there is, and its pace."""

import re
import ssl
import threading
import time
from http.client import HTTPSConnection
from itertools import pairwise
from unittest.mock import Mock

import pytest
from extracting import always, ask, bucket, errors, make_files, once, r4, rows, run, wait_for_rows
from teacher_stub import DRIPS, REPLIES, Stub, answer, completed

from data.teacher.pace import Pace

RETRIED = ["408", "409", "429", "429 bare", "date", "500", "503", "reset", "disconnect", "truncated", "truncated chunk"]
RETRIED += ["not json", "no choices", "error in 200", "error at the end", "error in choice", "deep", "null", "empty"]
RETRIED += ["late", *DRIPS]


@pytest.mark.parametrize("action", RETRIED)
def test_what_may_pass_is_asked_again(files, action):
    """A 429 is no failure of the row."""
    patience = 0.8 if action in ("late", *DRIPS) else 30
    attempts = 1 if action.startswith("429") or action == "date" else 2
    stub = ask(files, once(action), f"--limit 3 --timeout {patience}")
    assert [r["teacher"]["attempts"] for r in rows(files)] == [attempts] * 3 and len(stub.requests) == 6


ROW_FAILS = {
    "context": "context_exceeded", "context, llama.cpp": "context_exceeded", "filter": "content_filter",
    "filtered": "content_filter", "refusal": "content_filter", "413": "http_413", "422": "http_422", "400": "http_400",
    "403": "http_403", "cut short": "truncated", "no marker": "unparsed", "no sum": "label_invalid",
}  # fmt: skip


@pytest.mark.parametrize("action", ROW_FAILS)
def test_what_fails_a_row_is_not_asked_again_and_keeps_the_raw_text(files, action):
    with Stub(always(action, r4)) as stub:
        assert run(files, stub.url) == 1
        assert len(stub.requests) == 6 + (action == "403"), "after a 403 one that was answered is asked once more"
        assert [r["id"] for r in rows(files)] == ["r0", "r1", "r2", "r3", "r5"]
        (row,) = errors(files)
        assert (row["id"], row["input"], row["error"]["kind"]) == ("r4", "What is 4 + 2?", ROW_FAILS[action])
        assert row["rationale"] is row["teacher_label"] is row["correct"] is None and row["error"]["message"]
        content = REPLIES[action][1] if action in REPLIES else "no"
        text = content if isinstance(content, str) else str((content.get("choices") or [{}])[0].get("text") or "")
        assert text in row["error"]["raw"]
        asked = len(stub.requests)
        assert run(files, stub.url) == 1 and len(stub.requests) == asked, "not asked again without --retry-failed"
        stub.behave = always("ok")
        assert run(files, stub.url, "--retry-failed") == 0 and len(stub.requests) == asked + 1
        assert [r["id"] for r in rows(files)] == [f"r{i}" for i in range(6)] and not errors(files)


NEVER = {"truncated": "disconnect", "reset": "disconnect", "stall": "timeout", "503": "http_503", "null": "empty"}
NEVER |= {"html": "bad_reply"}


@pytest.mark.parametrize("action, kind", NEVER.items())
def test_retries_end_and_the_row_fails_with_its_last_reply(files, action, kind):
    ask(files, always(action, r4), "--max-retries 1 --timeout 0.3", 1)
    (row,) = errors(files)
    assert (row["id"], row["error"]["kind"], row["teacher"]["attempts"]) == ("r4", kind, 2)
    assert action != "html" or row["error"]["raw"] == REPLIES["html"][1]


@pytest.mark.parametrize("reply", [completed("x" * 100_000), (422, "x" * 100_000, {})])
def test_of_a_huge_reply_only_the_beginning_is_kept(files, reply):
    ask(files, always(reply, r4), status=1)
    assert len(errors(files)[0]["error"]["raw"]) == 20_000


def test_usage_that_makes_no_sense_is_none(files):
    odd = {"prompt_tokens": 10**400, "completion_tokens": -1}
    ask(files, always(completed("Two. The answer is (2).") | {"usage": odd}), "--price-in 1")
    assert rows(files)[0]["teacher"]["usage"] == {"prompt": 0, "completion": 0, "cached": 0}


ABORTS = {
    "401": "--api-key-env", "403": "--api-key-env", "404": "--model", "quota": "nothing left to spend", "402": "spend",
    "429 long": "a pause of 3600 s", "max_tokens": "refuses max_tokens: try --max-tokens-field max_completion_tokens",
    "stop": "--no-stop", "temperature": "refuses temperature", "top_k": "refuses top_k", "moved": "redirects to https://elsewhere.example/v1",
}  # fmt: skip


@pytest.mark.parametrize("action", ABORTS)
def test_what_cannot_pass_aborts_at_once(files, capsys, action):
    assert len(ask(files, always(action), '--concurrency 1 --extra-body {"top_k":2}', 3).requests) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("extract.py: aborted: ") and ABORTS[action] in said and "the same command goes on" in said
    assert not errors(files), "the row did not fail; it will be asked again"


def test_an_abort_keeps_what_is_in_flight_and_the_next_start_goes_on(files):
    with Stub(always("quota", lambda q: "3 + 2" in q), latency=0.05) as stub:
        assert run(files, stub.url, "--concurrency 2") == 3
        before = {r["id"] for r in rows(files)}
        assert {"r0", "r1", "r2"} <= before and not errors(files)
        stub.behave = always("ok")
        assert run(files, stub.url) == 0
        assert all(stub.attempts[f"Q: What is {i} + 2?\nA:"] == 1 for i in range(6) if f"r{i}" in before)
    assert [r["id"] for r in rows(files)] == [f"r{i}" for i in range(6)]


def test_a_teacher_that_never_answers_aborts_after_the_first_rows_retries(files, capsys):
    assert run(files, "http://127.0.0.1:9/v1", "--max-retries 2 --timeout 2") == 3
    said = capsys.readouterr().err
    assert "aborted: http://127.0.0.1:9/v1: " in said and "is the teacher running there?" in said and not errors(files)
    assert len(ask(files, always("500"), "--max-retries 2 --concurrency 1", 3).requests) == 3


def test_too_many_failures_in_a_row_abort(tmp_path, capsys):
    make_files(tmp_path, 40)
    with Stub(always("no marker", lambda q: int(re.search(r"\d+", q)[0]) > 9)) as stub:
        assert run(tmp_path, stub.url, "--max-consecutive-failures 5 --concurrency 1") == 3
        assert len(rows(tmp_path)) == 10 and 5 <= len(errors(tmp_path)) <= 8
        assert "5 rows in a row without a usable answer; the last: the reply does not say" in capsys.readouterr().err
        assert run(tmp_path, stub.url, "--max-consecutive-failures 0 --retry-failed") == 1
        assert len(errors(tmp_path)) == 30


FINISH = {"stop": 1, "eos": 1, None: 1, "length": 0, "MAX_TOKENS": 0, "abort": 0, "tool_calls": 0, "SAFETY": 0}


@pytest.mark.parametrize("finish, kept", FINISH.items())
def test_a_text_that_was_cut_short_is_no_row(files, finish, kept):
    reply = completed("Three more. The answer is (3 + 2)", finish)
    ask(files, always(reply, r4), "--max-retries 1", 1 - kept)
    assert len(rows(files)) == 5 + kept


def test_interim_responses_are_no_replies(tmp_path):
    """http.client takes a 102 for the reply; the real one then answered the next row."""
    assert ask(make_files(tmp_path, 30), always("interim"), "--concurrency 2").connections <= 2
    assert all(f"{r['rationale']} The answer is {r['teacher_label']}." == answer(r["input"]) for r in rows(tmp_path))


def test_control_characters_of_a_teacher_do_not_reach_the_terminal(files, capsys):
    evil = "\x1b]0;owned\x07\x9b2J"
    with Stub(always((422, {"detail": evil}, {}), r4)) as stub:
        assert run(files, stub.url, "--max-consecutive-failures 1 --concurrency 1") == 3
        stub.behave = always(completed("Two. The answer is (2).") | {"model": evil})
        assert run(files, stub.url, "--retry-failed") == 0
        stub.behave = always((401, evil, {}))
        assert run(files, stub.url, "--overwrite") == 3
    said = capsys.readouterr().err
    assert "owned" in said and not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f]", said)


def test_a_certificate_that_is_not_trusted_aborts_at_once_and_says_what_to_set(files, capsys, monkeypatch):
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "self-signed certificate"
    monkeypatch.setattr(HTTPSConnection, "connect", Mock(side_effect=error))
    assert run(files, "https://127.0.0.1:9/v1") == 3
    assert "self-signed certificate); SSL_CERT_FILE can name" in capsys.readouterr().err


def test_a_teacher_that_is_gone_is_waited_for(tmp_path, capsys):
    make_files(tmp_path, 60)
    with Stub(latency=0.01) as stub:

        def restart():
            wait_for_rows(tmp_path, 20)
            stub.__exit__()
            time.sleep(1)
            stub.__enter__()

        thread = threading.Thread(target=restart)
        thread.start()
        assert run(tmp_path, stub.url, "--max-retries 2") == 0 and not errors(tmp_path)
        thread.join()
    said = capsys.readouterr().err
    assert said.count("the teacher is gone (") == said.count("the teacher is back") == 1 and "--patience" in said
    assert [r["id"] for r in rows(tmp_path)] == [f"r{i}" for i in range(60)]


@pytest.mark.parametrize("action", ["500", "503", "reset", "429 bare"])
def test_patience_ends_and_nothing_is_recorded_against_the_rows(tmp_path, capsys, action):
    make_files(tmp_path, 40)
    with Stub(lambda q, attempt: action if stub.actions["ok"] >= 10 else "ok") as stub:
        line = "--max-consecutive-failures 2 --patience 30"
        assert run(tmp_path, stub.url, line) == 3 and not errors(tmp_path)
        assert "no answer for" in capsys.readouterr().err
        stub.behave = always("ok")
        assert run(tmp_path, stub.url, line) == 0 and len(rows(tmp_path)) == 40


@pytest.mark.parametrize("action", ["429", "429 ms", "503"])
def test_retry_after_pauses_every_worker_also_on_later_attempts(tmp_path, action):
    slow = "Q: What is 3 + 2?\nA:"
    behave = lambda question, attempt: action if question == slow and attempt < 2 else "ok"
    stub = ask(make_files(tmp_path, 40), behave, "--concurrency 3", scale=0.7, latency=0.02)
    refused = [when for question, _, _, when in stub.requests if question == slow][:2]
    for when in refused:  # told to wait 1 s, which is 0.7 s here; at first some were in flight
        assert not [t for _, _, _, t in stub.requests if when + 0.25 < t < when + 0.7], "a request during the pause"


@pytest.mark.parametrize("workers", [8, 64])
@pytest.mark.parametrize("retry_after", [False, True])
def test_a_429_is_the_servers_pace_and_costs_no_row_anything(tmp_path, workers, retry_after):
    """A bucket of 120 requests a minute and 10 at once, 50 times as fast."""
    limit = bucket(2 * 50, 10, {"Retry-After": "1"} if retry_after else {})
    ask(make_files(tmp_path, 60), limit, f"--max-retries 0 --concurrency {workers}", scale=0.02, latency=0.005)
    assert [r["teacher"]["attempts"] for r in rows(tmp_path)] == [1] * 60


def test_rpm_spaces_the_requests_and_a_pause_does_not_save_up_a_burst(tmp_path):
    stub = ask(make_files(tmp_path, 8), once("429"), "--rpm 60 --limit 2", scale=0.2)  # 200 ms apart, pauses of 200 ms
    times = sorted(when for _, _, _, when in stub.requests)
    assert min(b - a for a, b in pairwise(times)) > 0.05 and times[-1] - times[0] > 0.2 * 3 * 0.9


def test_back_off_doubles_up_to_a_minute_with_jitter(monkeypatch):
    pace, pauses = Pace(), []
    monkeypatch.setattr(pace, "sleep", pauses.append)
    for attempt in range(1, 11):
        pace.back_off(attempt, None)
    for attempt, pause in enumerate(pauses, 1):
        assert 0.75 * min(60, 0.25 * 2**attempt) <= pause <= min(60, 0.25 * 2**attempt)


def test_never_more_in_flight_than_concurrency(tmp_path):
    make_files(tmp_path, 60)
    for most in (1, 5):
        line = f"--concurrency {most} --limit {4 * most} --overwrite"
        assert ask(tmp_path, once("500"), line, latency=0.01).most == most
