"""extract.py against teachers that misbehave: nothing lost, nothing twice, one clear line for what cannot work."""

import dataclasses
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from teacher_stub import REPLIES, Stub, answer, completed

import extract
from data.jsonl import read_jsonl
from data.output import put_in_order
from data.settings import ExtractConfig

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-test-0123456789abcdef"
PROMPT = {
    "exemplars": [{"input": "What is 1 + 1?", "rationale": "1 and 1 more.", "label": "(1 + 1)"}],
    "question": "Q: {input}{hint}\nA:",
    "hint": " ({label})",
    "answer": " {rationale} The answer is {label}.",
    "answer_marker": "The answer is",
    "stop": ["\nQ:"],
    "label_type": "equation",
}
FAST = 0.01  # of the real pauses


@pytest.fixture(autouse=True)
def no_key_of_the_user(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def make_files(folder, rows=6):
    """in.jsonl and p.json; the gold label of every third row is another than the stub says."""
    lines = [{"id": f"r{i}", "input": f"What is {i} + 2?", "label": f"{i} + {2 + (i % 3 == 0)}"} for i in range(rows)]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "p.json").write_text(json.dumps(PROMPT))
    return folder


@pytest.fixture
def files(tmp_path):
    return make_files(tmp_path)


def arguments(folder, url, line=""):
    places = ["--input", folder / "in.jsonl", "--output", folder / "out.jsonl", "--prompt", folder / "p.json"]
    return [str(a) for a in [*places, "--model", "stub-1", "--base-url", url, *line.split()]]


def run(folder, url, line="", scale=FAST):
    return extract.main(arguments(folder, url, line), scale)


def rows(folder, name="out.jsonl"):
    path = folder / name
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def errors(folder):
    return rows(folder, "out.jsonl.errors.jsonl")


def always(action, when=lambda question: True):
    return lambda question, attempt: action if when(question) else "ok"


def once(*actions):
    """Each row's first requests are answered so, later ones well."""
    return lambda question, attempt: actions[attempt] if attempt < len(actions) else "ok"


# ---- A run that goes well -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_row_is_the_record_with_the_answer_and_where_it_is_from(files, capsys, endpoint):
    line = {"id": "odd", "input": "Ünï: what is 7 + 2?", "label": "9", "mine": {"a": [1]}, "correct": "old"}
    (files / "in.jsonl").write_text(json.dumps(line) + "\n" + '{"input": "What is 1 + 2?"}\n')
    with Stub() as stub:
        url = stub.url.replace("127", "user:hunter2hunter2@127")
        assert run(files, url, f'--endpoint {endpoint} --seed 5 --top-p 0.5 --extra-body {{"top_k":3}}') == 0
    first, second = rows(files)
    teacher = first.pop("teacher")
    assert first == {
        "id": "odd", "input": line["input"], "label": "9", "rationale": "7 and 2 more.", "teacher_label": "(7 + 2)",
        "mine": {"a": [1]}, "correct": True,
    }  # fmt: skip
    assert re.fullmatch("[0-9a-f]{64}", teacher["request_sha256"]) and len(teacher["prompt_sha256"]) == 64
    assert (teacher["model"], teacher["model_served"], teacher["base_url"]) == ("stub-1", "stub-1", stub.url)
    assert teacher["endpoint"] == endpoint and teacher["rationalize"] is False and teacher["attempts"] == 1
    params = {"temperature": 0.0, "max_tokens": 256, "top_p": 0.5, "seed": 5, "stop": ["\nQ:"], "top_k": 3}
    assert teacher["params"] == params | {"n": 1, "reasoning": "drop"}
    assert teacher["usage"] == {"prompt": 200, "completion": 20, "cached": 100} and teacher["latency_s"] >= 0
    assert teacher["version"] and teacher["created_at"].endswith("+00:00") and "samples" not in teacher
    assert second["id"] == "in-2" and second["correct"] is None
    for question, body, headers, _ in stub.requests:
        assert question.endswith("?\nA:") and headers["Authorization"].startswith("Basic ")
        assert body == {"model": "stub-1", **params} | {k: body[k] for k in ("messages", "prompt") if k in body}
    assert "hunter2" not in "".join(p.read_text() for p in files.iterdir()) + "".join(capsys.readouterr())


def test_what_is_printed(files, capsys):
    with Stub(always("no marker", lambda q: "4 + 2" in q)) as stub:
        assert run(files, stub.url, "--price-in 2 --price-out 50 --model other") == 1
    said = capsys.readouterr().err
    assert f"teacher: {stub.url}, chat, other; no key ($OPENAI_API_KEY is not set)" in said
    assert re.search(r"prompt:  \S+p.json \(sha256 [0-9a-f]{12}\), 1 exemplars", said)
    assert f"rows:    6 in {files / 'in.jsonl'}" in said
    assert said.count("warning: asked for 'other', served by 'stub-1'") == 1
    assert "5 ok, 1 unparsed, 0 failed, 0 retries" in said and "tok/s, $0.01" in said
    assert re.search(r"asked 6 rows in 0m0\ds: 5 ok, 1 failed \(unparsed 1\); 0 retries", said)
    assert "teacher right on 3 of 5 answered rows with a gold label (60.0%)" in said
    assert "tokens: 1,200 in (600 of them cached), 120 out; $0.01" in said
    assert f"{files / 'out.jsonl'}: 5 of 6 rows" in said
    assert "errors.jsonl: unparsed 1; --retry-failed asks failed rows again" in said


def test_a_prompt_cut_by_the_server_is_warned_of_once(files, capsys):
    (files / "in.jsonl").write_text(json.dumps({"input": "long " * 900 + "3 + 2?"}) + "\n")
    with Stub() as stub:
        assert run(files, stub.url) == 0
    assert capsys.readouterr().err.count("warning: the server read 200 tokens of 4,5") == 1


def test_train_reads_the_rows_as_they_are(files):
    from dss.config import parse_args
    from dss.rows import load_rows

    with Stub() as stub:
        assert run(files, stub.url) == 0
    assert [r.rationale for r in read_jsonl(files / "out.jsonl")][:2] == ["0 and 2 more.", "1 and 2 more."]
    for labels, wanted in (("gold", "1 + 2"), ("teacher", "(1 + 2)")):
        loaded = load_rows(parse_args(["--data", str(files / "out.jsonl"), "--labels", labels]))
        assert wanted in {r.label for r in loaded.train + loaded.validation} and loaded.metric == "equation"


def test_dry_run_sends_and_writes_nothing(files, capsys):
    before = sorted(files.iterdir())
    assert run(files, "http://127.0.0.1:1/v1", "--dry-run --price-in 1000 --price-out 1000") == 0
    shown = capsys.readouterr().out
    assert '"content": "Q: What is 0 + 2?\\nA:"' in shown and "rows: 6; requests: 6" in shown
    assert re.search(r"cost: about \$\d+\.\d\d, at most \$\d+\.\d\d", shown) and "at most 1,536" in shown
    assert sorted(files.iterdir()) == before


def test_the_fields_of_the_input_may_have_other_names_and_hide_nothing(files):
    line = {"key": 7, "question": "What is 7 + 2?", "gold": "9", "input": "mine", "label": 3}
    (files / "in.jsonl").write_text(json.dumps(line))
    with Stub() as stub:
        assert run(files, stub.url, "--id-field key --input-field question --label-field gold") == 0
    (row,) = rows(files)
    assert (row["id"], row["input"], row["label"]) == ("7", "What is 7 + 2?", "9")
    assert (row["original_input"], row["original_label"], row["correct"]) == ("mine", 3, True)


def test_limit_and_more_of_the_same_file_later(files, capsys):
    with Stub() as stub:
        assert run(files, stub.url, "--limit 2") == 0 and len(rows(files)) == 2
        assert run(files, stub.url) == 0 and [r["id"] for r in rows(files)] == [f"r{i}" for i in range(6)]
        assert run(files, stub.url, "--limit 2") == 0 and len(rows(files)) == 6
        assert "4 more in" in capsys.readouterr().err
    assert len(stub.requests) == 6


def test_connections_are_kept_alive_and_one_that_the_server_closed_is_made_anew(files):
    with Stub() as stub:
        assert run(files, stub.url, "--concurrency 2") == 0 and stub.connections <= 2
    closing = {"Connection": "close"}
    for stub in (Stub(idle=0.05), Stub(lambda q, attempt: (200, completed(answer(q)), closing))):
        with stub:  # llama.cpp closes after 5 s; the requests go out each 100 ms
            assert run(files, stub.url, "--concurrency 1 --overwrite --rpm 60", scale=0.1) == 0
        assert stub.connections == 6 and [r["teacher"]["attempts"] for r in rows(files)] == [1] * 6


def test_help_groups_the_flags_and_gives_each_default(capsys):
    with pytest.raises(SystemExit) as stop:
        extract.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and re.findall(r"^([a-z]+):$", text, re.MULTILINE) == [
        "options", "rows", "teacher", "sampling", "choice", "limits",
    ]  # fmt: skip
    words = " ".join(text.split())
    for field in dataclasses.fields(ExtractConfig):
        shown = "" if field.default in ("", None, False) else f"[{field.default}]"
        assert f"--{field.name.replace('_', '-')} " in words and shown in words
    assert "3 aborted, the teacher cannot go on; 130 interrupted" in words


# ---- Samples, gold labels, reasoning --------------------------------------------------------------------------------


def test_the_majority_of_n_samples_by_value_and_ties_go_to_the_first(files):
    said = ["One. The answer is (9).", "Two. The answer is (1 + 3).", "nothing", "Three. The answer is (2 + 2)."]
    with Stub(lambda question, attempt: completed(said[attempt])) as stub:
        assert run(files, stub.url, "--limit 1 --n 4 --temperature 0.7 --seed 10") == 0
    (row,) = rows(files)
    assert (row["rationale"], row["teacher_label"]) == ("Two.", "(1 + 3)")
    samples = row["teacher"]["samples"]
    assert [s.get("label") for s in samples] == ["(9)", "(1 + 3)", None, "(2 + 2)"]
    assert samples[2] == {"error": "unparsed", "raw": "nothing"}
    assert [body["seed"] for _, body, _, _ in stub.requests] == [10, 11, 12, 13] and "n" not in stub.requests[0][1]
    assert row["teacher"]["usage"]["completion"] == 80 and row["teacher"]["attempts"] == 4
    with Stub(lambda question, attempt: completed(said[attempt])) as stub:
        assert run(files, stub.url, "--limit 1 --n 2 --temperature 0.7 --seed 10 --overwrite") == 0
    assert rows(files)[0]["teacher_label"] == "(9)", "a tie"


def test_above_temperature_0_an_unusable_text_is_asked_for_again(files):
    with Stub(once("no marker", "empty")) as stub:
        assert run(files, stub.url, "--temperature 0.5 --limit 1") == 0
        assert rows(files)[0]["teacher"]["attempts"] == 3 and rows(files)[0]["teacher"]["usage"]["completion"] == 60
    with Stub(once("no marker")) as stub:
        assert run(files, stub.url, "--temperature 0.5 --limit 1 --seed 1 --overwrite") == 1, (
            "the same seed, the same text"
        )
        assert len(stub.requests) == 1


def test_keep_correct_leaves_wrong_rows_out_and_never_asks_them_again(files, capsys):
    with Stub() as stub:
        assert run(files, stub.url, "--keep correct") == 0
        assert [r["id"] for r in rows(files)] == ["r1", "r2", "r4", "r5"] and all(r["correct"] for r in rows(files))
        assert [(e["id"], e["error"]["kind"], e["correct"]) for e in errors(files)] == [
            ("r0", "incorrect", False),
            ("r3", "incorrect", False),
        ]
        assert run(files, stub.url, "--keep correct --retry-failed") == 0 and len(stub.requests) == 6
    assert "2 not right and left out, 0 failed" in capsys.readouterr().err


def test_rationalize_shows_the_gold_label_and_is_recorded(files):
    with Stub() as stub:
        assert run(files, stub.url, "--rationalize --limit 1") == 0
    messages = stub.requests[0][1]["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == [
        "Q: What is 1 + 1? ((1 + 1))\nA:",
        "Q: What is 0 + 2? (0 + 3)\nA:",
    ]
    assert rows(files)[0]["teacher"]["rationalize"] is True


@pytest.mark.parametrize("how", ["field", "tags", "closing tag"])
@pytest.mark.parametrize("reasoning", ["drop", "keep"])
def test_thoughts_stay_out_of_the_rationale_unless_asked_for(files, how, reasoning):
    reply = {
        "field": completed("Two. The answer is (2).", reasoning_content="Hm, the answer is 3?"),
        "tags": completed("<think>Hm, the answer is 3?</think>\n\nTwo. The answer is (2)."),
        "closing tag": completed("Hm, the answer is 3?</think>Two. The answer is (2)."),
    }[how]
    with Stub(always(reply)) as stub:
        assert run(files, stub.url, f"--limit 1 --reasoning {reasoning}") == 0
    wanted = "Two." if reasoning == "drop" else "Hm, the answer is 3?\nTwo."
    assert (rows(files)[0]["rationale"], rows(files)[0]["teacher_label"]) == (wanted, "(2)")


def test_thoughts_that_used_up_all_tokens_are_an_empty_answer_and_say_so(files):
    for reply in ("thoughts only", completed("<think>Let me see", "length")):
        with Stub(always(reply)) as stub:
            assert run(files, stub.url, "--limit 1 --overwrite") == 1
        (row,) = errors(files)
        assert row["error"]["kind"] == "empty" and "larger --max-tokens" in row["error"]["message"]
        assert "Let me see" in row["error"]["raw"]


# ---- Every way to fail ----------------------------------------------------------------------------------------------

RETRIED = [
    "408",
    "409",
    "429",
    "429 ms",
    "429 bare",
    "500",
    "503",
    "reset",
    "disconnect",
    "truncated",
    "truncated chunk",
]
RETRIED += ["not json", "html", "no choices", "error in 200", "stall", "late", "drip", "date"]


@pytest.mark.parametrize("action", RETRIED)
def test_what_may_pass_is_asked_again(files, action):
    patience = 0.8 if action in ("stall", "late", "drip") else 30
    with Stub(once(action)) as stub:
        assert run(files, stub.url, f"--limit 3 --timeout {patience}") == 0
    assert [r["teacher"]["attempts"] for r in rows(files)] == [2, 2, 2] and len(stub.requests) == 6


ROW_FAILS = {
    "context": "context_exceeded", "context, llama.cpp": "context_exceeded", "filter": "content_filter",
    "filtered": "content_filter", "refusal": "content_filter", "413": "http_413", "422": "http_422", "400": "http_400",
    "null": "empty", "empty": "empty", "cut short": "truncated", "no marker": "unparsed", "no sum": "label_invalid",
}  # fmt: skip


@pytest.mark.parametrize("action", ROW_FAILS)
def test_what_fails_a_row_is_not_asked_again_and_keeps_the_raw_text(files, action):
    with Stub(always(action, lambda q: "4 + 2" in q)) as stub:
        assert run(files, stub.url) == 1
        assert len(stub.requests) == 6 and [r["id"] for r in rows(files)] == ["r0", "r1", "r2", "r3", "r5"]
        (row,) = errors(files)
        assert (row["id"], row["input"], row["error"]["kind"]) == ("r4", "What is 4 + 2?", ROW_FAILS[action])
        assert row["rationale"] is row["teacher_label"] is row["correct"] is None and row["error"]["message"]
        content = REPLIES[action][1]
        text = content if isinstance(content, str) else str((content.get("choices") or [{}])[0].get("text") or "")
        assert text in row["error"]["raw"]
        assert run(files, stub.url) == 1 and len(stub.requests) == 6, (
            "it failed before: not asked without --retry-failed"
        )
        stub.behave = always("ok")
        assert run(files, stub.url, "--retry-failed") == 0 and len(stub.requests) == 7
        assert [r["id"] for r in rows(files)] == [f"r{i}" for i in range(6)] and not errors(files)
        assert run(files, stub.url) == 0 and len(stub.requests) == 7


@pytest.mark.parametrize("action, kind", [("truncated", "disconnect"), ("reset", "disconnect"), ("stall", "timeout")])
def test_a_reply_that_never_comes_whole_is_named_as_that(files, action, kind):
    with Stub(always(action, lambda q: "4 + 2" in q)) as stub:
        assert run(files, stub.url, "--max-retries 1 --timeout 0.3") == 1
    assert [(e["id"], e["error"]["kind"]) for e in errors(files)] == [("r4", kind)]


def test_retries_end_and_the_row_fails_with_its_last_reply(files):
    with Stub(always("html", lambda q: "4 + 2" in q)) as stub:
        assert run(files, stub.url, "--max-retries 2") == 1
        assert stub.attempts["Q: What is 4 + 2?\nA:"] == 3
    assert errors(files)[0]["error"]["raw"] == REPLIES["html"][1] and errors(files)[0]["error"]["kind"] == "bad_reply"
    assert errors(files)[0]["teacher"]["attempts"] == 3


ABORTS = {
    "401": "--api-key-env", "403": "--api-key-env", "404": "--model", "quota": "nothing left to spend", "402": "spend",
    "429 long": "a pause of 3600 s", "max_tokens": "use --max-tokens-field max_completion_tokens",
    "stop": "use --no-stop", "temperature": "use --temperature 1", "top_k": "--extra-body", "moved": "redirects to https://elsewhere.example/v1",
}  # fmt: skip


@pytest.mark.parametrize("action", ABORTS)
def test_what_cannot_pass_aborts_at_once(files, capsys, action):
    with Stub(always(action)) as stub:
        line = '--concurrency 1 --extra-body {"top_k":2}'
        assert run(files, stub.url, line) == 3 and len(stub.requests) == 1
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
    with Stub(always("500")) as stub:
        assert run(files, stub.url, "--max-retries 2 --concurrency 1") == 3 and len(stub.requests) == 3
    assert "oops" in capsys.readouterr().err


def test_too_many_failures_in_a_row_abort(tmp_path, capsys):
    make_files(tmp_path, 40)
    with Stub(always("no marker", lambda q: int(re.search(r"\d+", q)[0]) > 9)) as stub:
        assert run(tmp_path, stub.url, "--max-consecutive-failures 5 --concurrency 1") == 3
        assert len(rows(tmp_path)) == 10 and 5 <= len(errors(tmp_path)) <= 7
        assert "5 rows in a row without a usable answer; the last: the reply does not say" in capsys.readouterr().err
        assert (
            run(tmp_path, stub.url, "--max-consecutive-failures 0 --retry-failed") == 1 and len(errors(tmp_path)) == 30
        )


# ---- Pace -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["429", "429 ms", "503"])
def test_retry_after_pauses_every_worker_also_on_later_attempts(tmp_path, action):
    make_files(tmp_path, 100)
    slow = "Q: What is 3 + 2?\nA:"
    with Stub(lambda question, attempt: action if question == slow and attempt < 2 else "ok", latency=0.02) as stub:
        assert run(tmp_path, stub.url, "--concurrency 3", scale=0.7) == 0
    refused = [when for question, _, _, when in stub.requests if question == slow][:2]
    for when in refused:  # told to wait 1 s, which is 0.7 s here; at first some were in flight
        assert not [t for _, _, _, t in stub.requests if when + 0.25 < t < when + 0.7], "a request during the pause"


def test_rpm_spaces_the_requests(tmp_path):
    make_files(tmp_path, 12)
    with Stub() as stub:
        assert run(tmp_path, stub.url, "--rpm 60", scale=0.05) == 0  # one each 50 ms
    times = sorted(when for _, _, _, when in stub.requests)
    assert times[-1] - times[0] > 0.05 * 11 * 0.9


def test_a_pause_does_not_save_up_requests_for_a_burst(tmp_path):
    make_files(tmp_path, 8)
    with Stub(once("429")) as stub:
        assert run(tmp_path, stub.url, "--rpm 60 --limit 4", scale=0.2) == 0  # one each 200 ms, pauses of 200 ms
    times = sorted(when for _, _, _, when in stub.requests)
    assert min(b - a for a, b in pairwise(times)) > 0.05


def test_back_off_doubles_up_to_a_minute_with_jitter(monkeypatch):
    from data.endpoint import Pace

    pace, pauses = Pace(), []
    monkeypatch.setattr(pace, "sleep", pauses.append)
    for attempt in range(10):
        pace.back_off(attempt, None)
    for attempt, pause in enumerate(pauses):
        assert 0.75 * min(60, 0.5 * 2**attempt) <= pause <= min(60, 0.5 * 2**attempt)


def test_never_more_in_flight_than_concurrency(tmp_path):
    make_files(tmp_path, 60)
    for most in (1, 5):
        with Stub(once("stall"), latency=0.01) as stub:
            assert run(tmp_path, stub.url, f"--concurrency {most} --limit {4 * most} --timeout 0.3 --overwrite") == 0
        assert stub.most == most


# ---- Resume ---------------------------------------------------------------------------------------------------------


def test_nothing_left_to_do_sends_nothing(files, capsys):
    with Stub() as stub:
        assert run(files, stub.url) == 0
        before = (files / "out.jsonl").read_bytes()
        assert run(files, stub.url) == 0 and len(stub.requests) == 6
    assert (files / "out.jsonl").read_bytes() == before and "nothing left to ask" in capsys.readouterr().err
    assert run(files, "http://127.0.0.1:9/v1") == 0, "not even a teacher is needed, wherever it is"


@pytest.mark.parametrize(
    "line, words",
    [
        ("--max-tokens 99", "--max-tokens 256, not 99"),
        ("--max-tokens-field max_completion_tokens", "--max-tokens-field max_tokens"),
        ("--temperature 0.5", "--temperature 0.0, not 0.5"),
        ("--top-p 0.5", "--top-p unset, not 0.5"),
        ("--seed 1", "--seed unset, not 1"),
        ("--no-stop", "(--no-stop) stop texts ['\\nQ:'], not unset"),
        ("--model other", "--model stub-1, not other"),
        ("--endpoint completions", "--endpoint chat, not completions"),
        ('--extra-body {"top_k":1}', "--extra-body top_k unset, not 1"),
        ("--rationalize", "no --rationalize"),
        ("--reasoning keep", "--reasoning drop, not keep"),
        ("--n 2 --temperature 1", "--n 1, not 2"),
    ],
)
def test_a_setting_that_changes_requests_is_named_and_nothing_is_touched(files, capsys, line, words):
    with Stub() as stub:
        assert run(files, stub.url, "--limit 3") == 0
        before = (files / "out.jsonl").read_bytes()
        assert run(files, stub.url, line) == 2 and len(stub.requests) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"was made with {words}" in said or f"; {words}" in said
    assert (files / "out.jsonl").read_bytes() == before
    if line == "--max-tokens 99":
        with Stub() as stub:
            assert run(files, stub.url, f"{line} --overwrite") == 0 and len(stub.requests) == 6


def test_a_changed_prompt_file_or_row_is_named(files, capsys):
    with Stub() as stub:
        assert run(files, stub.url) == 0
        (files / "p.json").write_text(json.dumps(PROMPT | {"instruction": "Add."}))
        assert run(files, stub.url) == 2 and "another --prompt file (sha256 " in capsys.readouterr().err
        make_files(files)
        text = (files / "in.jsonl").read_text().replace("What is 3", "What was 3")
        (files / "in.jsonl").write_text(text)
        assert run(files, stub.url) == 2 and "another input in row 'r3'" in capsys.readouterr().err
        (files / "p.json").write_text(json.dumps(PROMPT | {"answer_marker": ["The answer is", "So it is"]}))
        make_files(files)
        assert run(files, stub.url) == 0 and len(stub.requests) == 6, "the same requests: what is done is done"


def test_failed_rows_may_be_asked_under_other_settings(files):
    with Stub(always("cut short")) as stub:
        assert run(files, stub.url) == 1 and len(errors(files)) == 6
        stub.behave = always("ok")
        assert run(files, stub.url, "--max-tokens 999") == 0 and not errors(files)
        assert len(rows(files)) == 6


def test_the_errors_file_can_be_the_input_of_another_run(files):
    with Stub(always("no marker")) as stub:
        assert run(files, stub.url) == 1
        (files / "out.jsonl.errors.jsonl").rename(files / "in.jsonl")
        stub.behave = always("ok")
        assert run(files, stub.url, "--max-tokens 999") == 0
    assert len(rows(files)) == 6 and all("error" not in r and r["rationale"] for r in rows(files))


@pytest.mark.parametrize("tail, rows_left", [(b'{"id": "r9", "inp', 3), (b"\x00\x00\x00", 3), (b"", 3), (None, 3)])
def test_a_torn_last_line_is_cut_off_and_reported(files, capsys, tail, rows_left):
    with Stub() as stub:
        assert run(files, stub.url, "--limit 3") == 0
        whole = (files / "out.jsonl").read_bytes()
        (files / "out.jsonl").write_bytes(whole[:-1] if tail is None else whole + tail)
        assert run(files, stub.url) == 0 and len(stub.requests) == 6
    assert [r["id"] for r in rows(files)] == [f"r{i}" for i in range(6)]
    assert (files / "out.jsonl").read_bytes().startswith(whole)
    assert ("torn by a crash was cut off" in capsys.readouterr().err) == bool(tail)


@settings(max_examples=20)
@given(share=st.floats(0, 1), cut_errors=st.booleans())
def test_wherever_a_crash_cuts_the_files_the_next_start_completes_them(tmp_path_factory, share, cut_errors):
    folder = make_files(tmp_path_factory.mktemp("cut"))
    with Stub(always("no marker", lambda q: int(re.search(r"\d+", q)[0]) < 2)) as stub:
        assert run(folder, stub.url) == 1
        before = rows(folder), errors(folder)
        path = folder / ("out.jsonl.errors.jsonl" if cut_errors else "out.jsonl")
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        assert run(folder, stub.url) == 1
    for was, now in zip(before, (rows(folder), errors(folder))):
        assert [lasting(row) for row in was] == [lasting(row) for row in now]


@given(names=st.lists(st.integers(0, 9)), order=st.permutations(range(10)), out=st.sets(st.integers(0, 9), max_size=4))
def test_lines_are_put_in_order_the_last_of_an_id_stays(tmp_path_factory, names, order, out):
    path = tmp_path_factory.mktemp("order") / "x.jsonl"
    path.write_text("".join(json.dumps({"id": str(name), "line": i}) + "\n" for i, name in enumerate(names)))
    known = [str(name) for name in order[:7]]  # the other three lie behind
    put_in_order(path, known, leave_out={str(name) for name in out})
    last = {str(name): i for i, name in enumerate(names) if name not in out}
    left = rows(path.parent, "x.jsonl")
    assert {row["id"]: row["line"] for row in left} == last and len(left) == len(last)
    assert [row["id"] for row in left][: len(last.keys() & set(known))] == [name for name in known if name in last]
    assert path.exists() == bool(last) and len(list(path.parent.iterdir())) == bool(last)


def test_a_second_process_is_refused(files, capsys):
    from data.output import locked

    with locked(files / "out.jsonl"):
        assert run(files, "http://127.0.0.1:9/v1") == 2
    assert "another process writes it" in capsys.readouterr().err
    with Stub() as stub:
        assert run(files, stub.url) == 0
    assert sorted(p.name for p in files.iterdir()) == ["in.jsonl", "out.jsonl", "p.json"], "no lock is left"


# ---- Wrong arguments and files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, words",
    [
        ("--n 3", "--n must be 1 at --temperature 0"),
        ("--concurrency 0", "--concurrency must be at least 1, got 0"),
        ("--temperature nan", "--temperature must be from 0 to 2"),
        ("--extra-body [1]", "--extra-body must be a JSON object"),
        ('--extra-body {"stream":true}', '--extra-body must be without "stream"'),
        ("--max_tokens 3", "unknown flag --max_tokens; did you mean --max-tokens?"),
        ("--api-key sk", "unknown flag --api-key; did you mean --api-key-env?"),
        ("--endpoint both", "invalid choice: 'both'"),
        ("--overwrite --retry-failed", "--retry-failed must be given without --overwrite"),
        ("--model ", "--model: expected one argument"),
        ("--base-url ftp://x/v1", "--base-url must be http(s)://HOST[:PORT][/PATH]"),
        ("--base-url http://a..b/v1", "--base-url must be http(s)://HOST[:PORT][/PATH]"),
        ("--base-url http://x/v1?key=abc", "--base-url must be http(s)://HOST[:PORT][/PATH]"),
        ("--prompt nowhere.json", "nowhere.json"),
        ("--input nowhere.jsonl", "nowhere.jsonl"),
        ("--output nowhere/out.jsonl", "--output must be in a directory that exists"),
        ("--input-field question", 'in.jsonl:1: there is no "question"; the line has id, input, label'),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_2(files, capsys, line, words):
    try:
        status = run(files, "http://127.0.0.1:9/v1", line)
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr().err
    assert status == 2 and words in said and said.count("\n") == 1 and re.match(r"\S+: ", said)
    assert sorted(p.name for p in files.iterdir()) == ["in.jsonl", "p.json"]


@pytest.mark.parametrize(
    "content, line, words",
    [
        ('{"id": "a", "input": "1 + 1"}\n{"id": "a", "input": "2 + 2"}', "", "the id 'a' is there twice"),
        ('{"input": "1 + 1"}\n{', "", "in.jsonl:2: not JSON"),
        ("", "", "there are no rows in it"),
        ('{"input": "1 + 1"}', "--rationalize", "row 'in-1' has no gold label, which --rationalize needs"),
        ('{"input": "1 + 1"}', "--keep correct", "has no gold label, which --keep correct needs"),
        ('{"input": "1 + 1"}', "--output {}/in.jsonl", "--output must be another file than --input"),
    ],
)
def test_a_wrong_input_is_found_before_anything_is_sent(files, capsys, content, line, words):
    (files / "in.jsonl").write_text(content)
    with Stub() as stub:
        try:
            status = run(files, stub.url, line.format(files))
        except SystemExit as stop:
            status = stop.code
        assert status == 2 and not stub.requests
    assert words in capsys.readouterr().err and (files / "in.jsonl").read_text() == content


@pytest.mark.parametrize("content", ['{"id": "a", "input": "b"}\n', '{"id": "a", "input": "b"}', "Dear Mia,", "a\nb"])
def test_a_file_that_is_not_ours_is_not_touched(files, capsys, content):
    """Not even its last line, which may look torn."""
    (files / "out.jsonl").write_text(content)
    assert run(files, "http://127.0.0.1:9/v1") == 2
    assert "out.jsonl:1: not a row that extract.py wrote" in capsys.readouterr().err
    assert (files / "out.jsonl").read_text() == content


def test_no_base_url(files, capsys, monkeypatch):
    line = [a for a in arguments(files, "X") if a not in ("--base-url", "X")]
    assert extract.main(line) == 2 and "give --base-url or set $OPENAI_BASE_URL" in capsys.readouterr().err
    with Stub() as stub:
        monkeypatch.setenv("OPENAI_BASE_URL", stub.url)
        assert extract.main(line) == 0


def test_half_a_surrogate_pair_is_written_and_read(files):
    (files / "in.jsonl").write_text('{"input": "\\ud800 What is 3 + 2?"}\n')
    with Stub(always(completed("\ud800 Three. The answer is (3 + 2)."))) as stub:
        assert run(files, stub.url) == 0
    assert [r.rationale for r in read_jsonl(files / "out.jsonl")] == ["? Three."]


# ---- The key --------------------------------------------------------------------------------------------------------


def test_the_key_is_in_no_file_and_no_output(tmp_path, capsys, monkeypatch):
    make_files(tmp_path, 12)
    monkeypatch.setenv("MY_KEY", KEY)
    escaped = json.dumps(completed(f"Your key is {KEY}. The answer is ({KEY}).")).replace("sk-", "\\u0073k-")
    echoes = [
        completed(f"Your key is {KEY}. The answer is (1 + 2)."),
        (200, escaped, {}),
        (200, f"<html>Bearer {KEY}</html>", {}),
        (422, {"detail": f"who sent {KEY}?"}, {}),
        (400, {"error": {"message": f"key {KEY}", "code": KEY}}, {}),
        completed(None, model=KEY, refusal=KEY) | {"model": KEY},
    ]
    with Stub(lambda q, attempt: echoes[int(re.search(r"\d+", q)[0]) % len(echoes)]) as stub:
        url = stub.url.replace("//", f"//me:{KEY}@")
        line = f'--api-key-env MY_KEY --max-retries 1 --extra-body {{"user":"{KEY}"}}'
        assert run(tmp_path, url, line) == 1
        assert all(headers["Authorization"] == f"Bearer {KEY}" for _, _, headers, _ in stub.requests)
        for status in (401, 404, 500, 400):
            stub.behave = always((status, {"error": {"message": f"bad key {KEY}", "param": KEY}}, {}))
            run(tmp_path, url, line + " --retry-failed --max-retries 0")
        stub.behave = always((302, "", {"Location": f"http://x/{KEY}"}))
        assert run(tmp_path, url, line + " --retry-failed") == 3
    said = "".join(capsys.readouterr())
    assert "[key]" in said and "key" in said
    for text in [said, *(p.read_text("utf-8") for p in tmp_path.iterdir())]:
        assert KEY not in text and KEY[4:] not in text


@pytest.mark.parametrize("key", ["sk-with space", "sk-with\nnewline", "sk-ünï"])
def test_a_key_that_cannot_be_sent_is_refused_without_quoting_it(files, capsys, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert run(files, "http://127.0.0.1:9/v1") == 2
    assert "sk-" not in (said := capsys.readouterr().err) and "the key has a space" in said


def test_a_stand_in_for_a_key_is_not_hidden_from_texts(files, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "more")
    with Stub() as stub:
        assert run(files, stub.url) == 0
    assert rows(files)[1]["rationale"] == "1 and 2 more."


# ---- Interruption ---------------------------------------------------------------------------------------------------


def start(folder, url, line=""):
    code = f"import sys, extract; sys.exit(extract.main(sys.argv[1:], {FAST}))"
    command = [sys.executable, "-c", code, *arguments(folder, url, line)]
    environment = os.environ | {"OPENAI_API_KEY": KEY}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_rows(folder, number, process):
    while process.poll() is None and not (
        (p := folder / "out.jsonl").exists() and p.read_bytes().count(b"\n") >= number
    ):
        time.sleep(0.005)


def lasting(row):
    """A row without what differs from run to run."""
    passing = ("created_at", "latency_s", "attempts")
    return row | {"teacher": {k: v for k, v in row["teacher"].items() if k not in passing}}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT between processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_ctrl_c_keeps_everything_that_is_finished_or_in_flight(tmp_path, number):
    make_files(tmp_path, 100)
    with Stub(latency=0.1) as stub:
        process = start(tmp_path, stub.url)
        wait_for_rows(tmp_path, 20, process)
        process.send_signal(number)
        said = process.communicate(timeout=20)[1]
        assert process.returncode == 130 and "interrupted; what was finished is kept" in said, said
        assert 20 <= len(rows(tmp_path)) == len(stub.requests) < 100, "each reply that was paid for is there"
        assert run(tmp_path, stub.url) == 0 and len(stub.requests) == 100
    assert [r["id"] for r in rows(tmp_path)] == [f"r{i}" for i in range(100)]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT between processes")
def test_the_second_ctrl_c_ends_at_once(tmp_path):
    make_files(tmp_path, 100)
    with Stub(always("stall", lambda q: int(re.search(r"\d+", q)[0]) > 20)) as stub:
        command = [sys.executable, ROOT / "extract.py", *arguments(tmp_path, stub.url)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        wait_for_rows(tmp_path, 21, process)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        clock = time.monotonic()
        said = process.communicate(timeout=20)[1]
        assert process.returncode == 130 and time.monotonic() - clock < 3
        assert said.endswith("extract.py: interrupted\n") and "Ctrl-C ends at once" in said
    assert len(rows(tmp_path)) == 21


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk_aborts_and_the_next_start_goes_on(tmp_path):
    make_files(tmp_path, 60)
    code = "import resource, sys, extract; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    code += "; sys.exit(extract.main(sys.argv[1:]))"
    with Stub() as stub:
        made = subprocess.run(
            [sys.executable, "-c", code, *arguments(tmp_path, stub.url)], cwd=ROOT, capture_output=True, text=True
        )
        assert made.returncode == 3 and "extract.py: aborted: [Errno 27]" in made.stderr, made.stderr
        assert "Traceback" not in made.stderr
        assert run(tmp_path, stub.url) == 0
    assert [r["id"] for r in rows(tmp_path)] == [f"r{i}" for i in range(60)]


def test_a_bug_of_ours_in_a_worker_is_raised_and_does_not_hang(files, monkeypatch):
    monkeypatch.setattr(extract, "parse", lambda *_: 1 / 0)
    with Stub() as stub, pytest.raises(ZeroDivisionError):
        run(files, stub.url)


@settings(max_examples=4)
@given(pauses=st.lists(st.floats(0.1, 0.9), min_size=1, max_size=3))
def test_after_any_kills_the_file_is_as_an_undisturbed_runs(tmp_path_factory, pauses):
    folder, calm = make_files(tmp_path_factory.mktemp("killed"), 60), make_files(tmp_path_factory.mktemp("calm"), 60)
    with Stub(always("no marker", lambda q: "7 + 2" in q), latency=0.03) as stub:
        for pause in pauses:
            process = start(folder, stub.url, "--concurrency 4")
            time.sleep(pause)
            process.kill()
            process.communicate()
        assert run(folder, stub.url, "--concurrency 4") == 1
        assert max(stub.attempts.values()) <= 1 + len(pauses), "at most what was in flight is asked again"
        assert run(calm, stub.url, "--concurrency 4") == 1
    assert [lasting(row) for row in rows(folder)] == [lasting(row) for row in rows(calm)]
    assert (
        [row["id"] for row in errors(folder)]
        == [row["id"] for row in errors(calm)]
        == ["r7", "r17", "r27", "r37", "r47", "r57"]
    )


BAD = ["429", "500", "503", "reset", "truncated", "not json", "html", "no choices", "429 ms", "disconnect", "stall"]
DEAD = ["null", "empty", "500", "not json", "no choices", "context", "cut short"]


def test_300_rows_a_teacher_that_fails_40_percent_and_three_kills(tmp_path):
    """Every answerable row once, in order, with its own rationale; the others in the errors file; the key nowhere."""
    make_files(tmp_path, 300)

    def number(question):
        return int(re.findall(r"\d+", question)[-2])

    def behave(question, attempt):
        i = number(question)
        if i % 25 == 7:
            return DEAD[i // 25 % len(DEAD)]
        draw = (i * 2654435761 + attempt * 40503) % 1000
        return BAD[draw % len(BAD)] if draw < 480 and attempt < 5 else "ok"

    said = []
    with Stub(behave, latency=0.01) as stub:
        for target in (60, 130, 210):
            process = start(tmp_path, stub.url, "--timeout 1")
            wait_for_rows(tmp_path, target, process)
            process.kill()
            said += process.communicate()
            assert process.returncode == -signal.SIGKILL
        process = start(tmp_path, stub.url, "--timeout 1")
        said += process.communicate(timeout=120)
        assert process.returncode == 1, said[-1]
        assert stub.most <= 8
        good = stub.actions["ok"] / stub.actions.total()
        assert 0.5 < good < 0.65 and set(stub.actions) == {*BAD, *DEAD, "ok"}, stub.actions
        asked = len(stub.requests)
        process = start(tmp_path, stub.url)
        said += process.communicate(timeout=60)
        assert process.returncode == 1 and len(stub.requests) == asked, "nothing left to ask, 12 rows failed"
    dead = [i for i in range(300) if i % 25 == 7]
    assert [r["id"] for r in rows(tmp_path)] == [f"r{i}" for i in range(300) if i not in dead]
    for row in rows(tmp_path):
        assert f"{row['rationale']} The answer is {row['teacher_label']}." == answer(row["input"])
    assert [e["id"] for e in errors(tmp_path)] == [f"r{i}" for i in dead]
    kinds = Counter(e["error"]["kind"] for e in errors(tmp_path))
    assert kinds == {"empty": 4, "http_500": 2, "bad_reply": 4, "context_exceeded": 1, "truncated": 1}
    assert all(
        e["error"]["raw"] for e in errors(tmp_path) if e["error"]["kind"] in ("http_500", "bad_reply", "truncated")
    )
    for text in [*filter(None, said), *(p.read_text("utf-8") for p in tmp_path.iterdir())]:
        assert KEY not in text


# ---- Speed and memory ----------------------------------------------------------------------------------------------


def capacity(url, workers, seconds):
    """Requests a second that a client which does nothing else gets from a server."""
    counts, end = [0] * workers, time.monotonic() + seconds
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 200}]})

    def work(number):
        connection = http.client.HTTPConnection(url.split("/")[2])
        while time.monotonic() < end:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            connection.getresponse().read()
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - start)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_20_000_rows_in_flat_memory_at_the_speed_of_the_teacher(tmp_path):
    """16 at a time, 80 ms each: 200 rows a second, every one with its fsync. About three minutes."""
    stub = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "teacher_stub.py", "0.08"], stdout=subprocess.PIPE, text=True
    )
    try:
        url, memory, rate = stub.stdout.readline().strip(), {}, 0.0
        for number in (2000, 20000):
            folder = tmp_path / str(number)
            folder.mkdir()
            make_files(folder, number)
            best = capacity(url, 16, 4)
            clock = time.monotonic()
            code = "import sys, extract; extract.main(sys.argv[1:]); print(open('/proc/self/status').read())"
            command = [sys.executable, "-c", code, *arguments(folder, url, "--concurrency 16")]
            made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            rate = number / (time.monotonic() - clock)
            memory[number] = int(re.search(r"VmHWM:\s+(\d+) kB", made.stdout)[1])  # the most it ever had
            best = (best + capacity(url, 16, 4)) / 2
            print(f"{number:,} rows: {rate:.1f} rows/s, {rate / best:.1%} of {best:.1f}; {memory[number]:,} kB")
            assert [r["id"] for r in rows(folder)] == [f"r{i}" for i in range(number)]
        assert rate > 0.9 * best
        assert memory[20000] - memory[2000] < 18000, "at most 1 kB a row: its id, and where its line lies"
    finally:
        stub.kill()
