"""extract.py: rows, what is printed, the three kinds of failure, and continuing after any end."""

import json
import re
import signal
import threading
import time
from collections import Counter

import pytest
from extracting import (
    KEY,
    NOWHERE,
    PROMPT,
    always,
    arguments,
    ask,
    errors,
    lasting,
    make_files,
    once,
    rows,
    run,
    start,
    wait_for_rows,
)
from running import json_lines
from teacher_stub import Stub, answer, completed, error

import extract

SEVEN = completed("Seven.")  # no marker
R4 = "4 + 2"  # of the row r4


def ids(found):
    return [row["id"] for row in found]


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_row_is_the_record_with_the_answer_and_where_it_is_from(files, endpoint):
    line = {"id": 7, "input": "Ünï: what is 7 + 2?", "label": "9", "mine": {"a": [1]}}
    (files / "in.jsonl").write_text(json.dumps(line) + '\n{"input": "What is 1 + 2?"}\n')
    extra = '{"top_k":3,"stop":null,"max_tokens":null,"max_completion_tokens":9}'
    stub = ask(files, line=f"--endpoint {endpoint} --extra-body {extra}")
    first, second = rows(files)
    teacher = first.pop("teacher")
    answered = {"rationale": "7 and 2 more.", "teacher_label": "(7 + 2)", "correct": True}
    assert first == line | {"id": "7"} | answered
    assert second["id"] == "in-2" and second["correct"] is None
    params = {"temperature": 0.0, "stream": False, "top_k": 3, "max_completion_tokens": 9}
    assert teacher["params"] == params, "null leaves a parameter out"
    assert teacher["usage"] == {"prompt": 200, "completion": 20}
    assert (teacher["model_served"], teacher["base_url"]) == ("stub-1", stub.url)
    for question, body, headers, _ in stub.requests:
        del body["messages" if endpoint == "chat" else "prompt"]
        assert question.endswith("?\nA:") and "Authorization" not in headers
        assert body == {"model": "stub-1", **params}


def test_what_is_printed(files, capsys):
    stub = ask(files, always(SEVEN, R4), "--price-in 2 --price-out 50", 1)
    said = capsys.readouterr().err
    for words in (
        f"teacher: {stub.url}, chat, stub-1",
        f"rows: 6 in {files / 'in.jsonl'}",
        "warning: row 'r4': unparsed: the reply does not say 'The answer is'",
        "asked now: 5 ok, 1 left out",
        "tokens: 1,200 in, 120 out; $0.01",
        "errors.jsonl: {'unparsed': 1}; --retry-failed asks failed rows again",
    ):
        assert said.count(words) == 1, words


def test_one_answer_for_all_is_said(files, capsys):
    ask(files, always(completed("It is so. The answer is (1 + 1).")))
    assert "6 of 6 rows have the same rationale" in capsys.readouterr().err


def test_dry_run_sends_and_writes_nothing(files, capsys):
    assert run(files, NOWHERE, "--dry-run --price-in 1000 --price-out 1000") == 0
    assert re.search(r"Q: What is 0 [\s\S]*requests: 6; .*; \$\d\.\d\d", capsys.readouterr().out)
    assert len(list(files.iterdir())) == 2


def test_keep_correct_leaves_wrong_rows_out_and_never_asks_them_again(files):
    stub = ask(files, line="--keep correct")
    assert ids(rows(files)) == ["r1", "r2", "r4", "r5"] and all(r["correct"] for r in rows(files))
    assert [e["error"]["kind"] for e in errors(files)] == ["incorrect"] * 2
    assert run(files, stub.url, "--keep correct --retry-failed") == 0, "though the teacher is gone"


def test_a_row_that_has_a_rationale_is_copied(files):
    line = {"id": "mine", "input": "What is 9 + 2?", "label": None, "rationale": "Mine."}
    line["error"] = "a key of the user's"
    with (files / "in.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    stub = ask(files)
    assert len(stub.requests) == 6 and run(files, NOWHERE) == 0, "nothing is left to ask"
    assert rows(files)[6] == line | {"teacher_label": None, "teacher": None}


def test_the_rows_of_an_errors_file_can_be_asked_anew(files):
    ask(files, always(SEVEN), status=1)
    (files / "out.jsonl.errors.jsonl").rename(files / "in.jsonl")
    ask(files)
    assert len(rows(files)) == 6 and not errors(files) and "error" not in rows(files)[0]


def test_batch_files_give_the_rows_that_asking_gives(files, refused):
    context = {"status_code": 400, "body": error("maximum context length")}

    def answer_all(**faulty):
        lines = []
        for request in json_lines(files / "b.jsonl"):
            body = completed(answer(request["body"]["messages"][-1]["content"]))
            reply = {"custom_id": request["custom_id"], "response": {"body": body}}
            lines.append(json.dumps(reply | faulty.get(reply["custom_id"][:2], {})) + "\n")
        (files / "c.jsonl").write_text("".join(reversed(lines)))

    write, read = f"--batch-requests {files}/b.jsonl", f"--batch-replies {files}/c.jsonl"
    assert run(files, NOWHERE, write) == 0
    answer_all(r1={"response": None, "error": {"message": "expired"}}, r4={"response": context})
    other = arguments(files, NOWHERE, f"{read} --temperature 1")
    assert "a request that these settings and rows do not make" in refused(extract.main, *other)
    assert run(files, NOWHERE, read) == 1 and ids(rows(files)) == ["r0", "r2", "r3", "r5"]
    assert [(e["id"], e["error"]["kind"]) for e in errors(files)] == [("r4", "http_400")]
    assert run(files, NOWHERE, write) == 0
    answer_all()
    assert run(files, NOWHERE, read) == 1, "r4 has failed"
    ask(make_files(files / "asked"), always((400, context["body"], {}), R4), status=1)
    assert [lasting(row) for row in rows(files / "asked")] == [lasting(row) for row in rows(files)]


A = '{"id": "a", "input": "1 + 1"}'
NOT_OURS = "out.jsonl:1: not a row that extract.py wrote"


@pytest.mark.parametrize(
    "name, content, line, words",
    [
        ("in.jsonl", f"{A}\n{A}", "", "row 'a': another row has this id"),
        ("in.jsonl", A, "--rationalize", "row 'a' has no gold label, which --rationalize"),
        ("in.jsonl", A, "--output {}/in.jsonl", "--output must be another file"),
        ("in.jsonl", A, "--max-cost 3 --price-in 1", "--max-cost must be given with --price-in"),
        ("out.jsonl", A + "\n", "", NOT_OURS),
        ("out.jsonl", A, "", NOT_OURS),  # it may look torn, but it is not ours
        ("out.jsonl", "Dear Mia,", "", NOT_OURS),
    ],
)
def test_a_wrong_file_is_found_before_anything_is_sent_and_not_touched(
    files, refused, name, content, line, words
):
    (files / name).write_text(content)
    assert words in refused(extract.main, *arguments(files, NOWHERE, line.format(files)))
    assert (files / name).read_text() == content


# The three kinds of failure.


MOMENTS = [408, 503, "disconnect", "cut off", "late", (200, "{'choices'", {}), completed(None)]


@pytest.mark.parametrize("action", MOMENTS)
def test_a_failure_of_the_moment_is_asked_again(files, action):
    stub = ask(files, once(action), "--limit 3 --timeout 0.6")
    assert [r["teacher"]["attempts"] for r in rows(files)] == [2] * 3 and len(stub.requests) == 6


@pytest.mark.parametrize("workers, action", [(1, 503), (4, "disconnect"), (4, completed(None))])
def test_a_row_that_outlasts_its_retries_fails_and_the_others_go_on(files, action, workers):
    ask(files, always(action, R4), f"--max-retries 1 --concurrency {workers}", 1)
    assert ids(rows(files)) == ["r0", "r1", "r2", "r3", "r5"]
    assert [(e["id"], e["teacher"]["attempts"]) for e in errors(files)] == [("r4", 2)]


def test_a_failed_row_is_asked_again_only_with_retry_failed_and_has_its_raw_text(files):
    with Stub(always(completed("Seven." + "x" * 30_000), R4)) as stub:
        assert run(files, stub.url) == run(files, stub.url) == 1 and len(stub.requests) == 6
        (row,) = errors(files)
        assert row["error"]["kind"] == "unparsed" and row["rationale"] is None
        assert row["error"]["raw"].startswith("Seven.x") and len(row["error"]["raw"]) == 20_000
        stub.behave = always("ok")
        assert run(files, stub.url, "--retry-failed") == 0 and len(stub.requests) == 7
    assert ids(rows(files)) == [f"r{i}" for i in range(6)] and not errors(files)


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "1"}])
def test_a_429_is_waited_for_and_is_no_attempt(tmp_path, headers):
    busy = (429, error("slow down"), headers)
    ask(make_files(tmp_path, 20), once(busy, busy), "--max-retries 0")
    assert [r["teacher"]["attempts"] for r in rows(tmp_path)] == [1] * 20


def test_retry_after_pauses_every_thread(tmp_path):
    slow = "Q: What is 3 + 2?\nA:"
    busy = (503, error("busy"), {"Retry-After": "100"})  # 1 s here
    behave = lambda question, attempt: busy if question == slow and not attempt else "ok"
    stub = ask(make_files(tmp_path, 40), behave, latency=0.02)
    when = next(when for question, _, _, when in stub.requests if question == slow)
    assert not [t for _, _, _, t in stub.requests if when + 0.4 < t < when + 1]


@pytest.mark.parametrize("action", [503, 429, "disconnect"])
def test_while_nobody_is_answered_no_row_fails_and_patience_ends(tmp_path, capsys, action):
    make_files(tmp_path, 40)
    with Stub(lambda q, attempt: action if stub.actions["ok"] >= 10 else "ok") as stub:
        assert run(tmp_path, stub.url, "--patience 30 --max-retries 4") == 3
        assert "nobody was answered for 30 s (--patience)" in capsys.readouterr().err
        assert not errors(tmp_path)
        stub.behave = always("ok")
        assert run(tmp_path, stub.url) == 0 and len(rows(tmp_path)) == 40


def test_a_teacher_that_is_gone_for_a_while_is_waited_for(tmp_path, capsys):
    make_files(tmp_path, 60)
    with Stub(latency=0.01) as stub:

        def restart():
            wait_for_rows(tmp_path, 20)
            stub.__exit__()
            time.sleep(0.5)
            stub.__enter__()

        thread = threading.Thread(target=restart)
        thread.start()
        assert run(tmp_path, stub.url, "--max-retries 2") == 0 and not errors(tmp_path)
        thread.join()
    assert "the teacher answers nobody; waiting for it" in capsys.readouterr().err
    assert len(rows(tmp_path)) == 60


ENDS = [  # (reply, requests, words); 2 requests: whether others are answered, an exemplar shows
    ((401, error("bad key"), {}), 1, "$OPENAI_API_KEY"),
    ((429, error("later"), {"Retry-After": "3600"}), 1, "a pause of 3600 s"),
    ((308, "", {"Location": "https://else.example/v1"}), 2, "are --base-url"),
    ((400, error("`stop` is deprecated for this model"), {}), 2, '{"NAME": null}'),
    ((200, {"error": "Unexpected endpoint. (POST /chat/completions)"}, {}), 2, "ends in /v1"),
]


@pytest.mark.parametrize("reply, requests, words", ENDS)
def test_what_cannot_pass_ends_the_run_at_once(files, capsys, reply, requests, words):
    assert len(ask(files, always(reply), "--concurrency 1", 3).requests) == requests
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("extract.py: aborted: ") and words in said
    assert "the same command goes on" in said and not errors(files), "no row has failed"


def test_an_unknown_4xx_is_the_rows_if_others_are_answered(files):
    ask(files, always((418, error("I am a teapot"), {}), "0 + 2"), "--concurrency 1", 1)
    assert [e["error"]["kind"] for e in errors(files)] == ["http_418"] and len(rows(files)) == 5


def test_max_cost_ends_the_asking_and_keeps_what_is_in_flight(tmp_path, capsys):
    make_files(tmp_path, 50)
    line = "--price-in 1000 --price-out 5000 --concurrency 4"  # $0.30 a request
    with Stub(latency=0.02) as stub:
        assert run(tmp_path, stub.url, f"{line} --max-cost 3") == 3
        assert 10 <= len(stub.requests) == len(rows(tmp_path)) <= 13 and not errors(tmp_path)
        assert "has reached --max-cost" in capsys.readouterr().err
        assert run(tmp_path, stub.url, line) == 0 and len(stub.requests) == 50


def test_answers_under_a_schema_are_asked_for_and_read(files):
    task = {key: PROMPT[key] for key in ("exemplars", "question", "label_type")}
    (files / "p.json").write_text(json.dumps(task | {"schema": True}))
    stub = ask(files, always(completed('{"rationale": "So.", "label": "(4 + 2)"}')))
    assert all(b["response_format"]["type"] == "json_schema" for _, b, _, _ in stub.requests)
    assert {(r["rationale"], r["teacher_label"]) for r in rows(files)} == {("So.", "(4 + 2)")}


# Continuing.


def change_prompt(files):
    (files / "p.json").write_text(json.dumps(PROMPT | {"instruction": "Add."}))


def change_input(files):
    text = (files / "in.jsonl").read_text()
    (files / "in.jsonl").write_text(text.replace("What is 0", "What was 0"))


SETTINGS = ["--max-tokens 9", '--extra-body {"stop":null}', "--endpoint completions"]
SETTINGS += ["--rationalize", "--keep correct", change_prompt, change_input]


@pytest.mark.parametrize("change", SETTINGS)
def test_what_changes_a_request_is_refused_and_nothing_is_touched(files, refused, change):
    url = ask(files, line="--limit 3").url
    before = (files / "out.jsonl").read_bytes()
    line = ""
    if isinstance(change, str):
        line = change
    else:
        change(files)
    said = refused(extract.main, *arguments(files, url, line))
    assert "row 'r0' was asked with other settings, prompt file or input" in said
    assert (files / "out.jsonl").read_bytes() == before


def test_failed_rows_are_asked_again_under_other_settings(files):
    ask(files, always(completed("It is", "length")), status=1)
    assert {e["error"]["kind"] for e in errors(files)} == {"truncated"}
    ask(files, line="--max-tokens 999")
    assert len(rows(files)) == 6 and not errors(files)


@pytest.mark.parametrize("share", [0.03, 0.4, 0.72, 0.999])
def test_wherever_a_crash_cuts_the_output_the_next_start_completes_it(files, share):
    with Stub(always(SEVEN, R4)) as stub:
        assert run(files, stub.url) == 1
        before = rows(files)
        content = (files / "out.jsonl").read_bytes()
        (files / "out.jsonl").write_bytes(content[: int(share * len(content))])
        assert run(files, stub.url) == 1
    assert [lasting(row) for row in before] == [lasting(row) for row in rows(files)]


def test_the_first_ctrl_c_keeps_everything_that_is_in_flight(tmp_path):
    with Stub(latency=0.1) as stub:
        process = start(make_files(tmp_path, 100), stub.url)
        wait_for_rows(tmp_path, 20, process)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[1]
        assert process.returncode == 130 and "interrupted; what was finished is in" in said, said
        assert 20 <= len(rows(tmp_path)) == len(stub.requests) < 100, "each reply paid for is there"
        assert run(tmp_path, stub.url) == 0 and len(stub.requests) == 100
    assert len(rows(tmp_path)) == 100


def test_the_second_ctrl_c_ends_at_once(tmp_path):
    with Stub(latency=5) as stub:
        process = start(make_files(tmp_path), stub.url)
        while not stub.requests:
            time.sleep(0.05)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(1.1)
        said = process.communicate(timeout=2)[1]
    assert process.returncode == 130 and said.endswith("extract.py: interrupted\n")


def test_a_full_disk_ends_the_run_and_the_next_start_goes_on(tmp_path):
    with Stub() as stub:
        before = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
        process = start(make_files(tmp_path, 60), stub.url, before=before)
        said = process.communicate()[1]
        assert process.returncode == 3 and "extract.py: aborted: [Errno 27]" in said, said
        assert run(tmp_path, stub.url) == 0
    assert ids(rows(tmp_path)) == [f"r{i}" for i in range(60)]


BAD = [429, 500, 503, "disconnect", "cut off", "late", completed(" ")]
BAD += [(200, "<html>proxy</html>", {}), (200, {"choices": []}, {})]
DEAD = [completed(None), 500, (200, "{'choices'", {}), completed("3 more. The answer", "length")]


def test_150_rows_a_teacher_that_fails_40_percent_and_two_kills(tmp_path):
    """Every answerable row once, in order, with its own rationale; the key nowhere."""
    make_files(tmp_path, 150)

    def behave(question, attempt):
        i = int(re.findall(r"\d+", question)[-2])
        if i % 25 == 7:
            return DEAD[i // 25 % len(DEAD)]
        draw = (i * 2654435761 + attempt * 40503) % 1000
        return BAD[draw % len(BAD)] if draw < 480 and attempt < 5 else "ok"

    said = []
    with Stub(behave, latency=0.01) as stub:
        for target in (40, 90):
            process = start(tmp_path, stub.url, "--timeout 0.8")
            wait_for_rows(tmp_path, target, process)
            process.kill()
            said.append(process.communicate()[1])
            assert process.returncode == -signal.SIGKILL
        process = start(tmp_path, stub.url, "--timeout 0.8")
        said.append(process.communicate(timeout=120)[1])
        assert process.returncode == 1, said[-1]
        asked = len(stub.requests)
        assert run(tmp_path, stub.url) == 1 and len(stub.requests) == asked, "nothing left to ask"
    dead = [i for i in range(150) if i % 25 == 7]
    assert ids(rows(tmp_path)) == [f"r{i}" for i in range(150) if i not in dead]
    for row in rows(tmp_path):
        assert f"{row['rationale']} The answer is {row['teacher_label']}." == answer(row["input"])
    assert ids(errors(tmp_path)) == [f"r{i}" for i in dead]
    kinds = Counter(e["error"]["kind"] for e in errors(tmp_path))
    assert kinds == {"empty": 2, "http_500": 2, "bad_reply": 1, "truncated": 1}
    for text in [*said, *(path.read_text("utf-8") for path in tmp_path.iterdir())]:
        assert KEY not in text
