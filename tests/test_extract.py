"""extract.py as a user meets it: rows, what is printed, samples, wrong arguments, and the key."""

import json
import re

import pytest
from extracting import KEY, PROMPT, ROOT, always, arguments, ask, errors, lasting, make_files, once, r4, rows, run
from teacher_stub import REPLIES, Stub, answer, completed

import extract


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_row_is_the_record_with_the_answer_and_where_it_is_from(files, endpoint):
    line = {"id": "odd", "input": "Ünï: what is 7 + 2?", "label": "9", "mine": {"a": [1]}, "correct": "old"}
    (files / "in.jsonl").write_text(json.dumps(line) + "\n" + '{"input": "What is 1 + 2?"}\n')
    stub = ask(files, line=f'--endpoint {endpoint} --seed 5 --top-p 0.5 --extra-body {{"top_k":3}}')
    first, second = rows(files)
    teacher = first.pop("teacher")
    assert first == {
        "id": "odd", "input": line["input"], "label": "9", "rationale": "7 and 2 more.", "teacher_label": "(7 + 2)",
        "mine": {"a": [1]}, "correct": True,
    }  # fmt: skip
    assert re.fullmatch("[0-9a-f]{64}", teacher["request_sha256"]) and len(teacher["prompt_sha256"]) == 64
    assert (teacher["model"], teacher["model_served"], teacher["base_url"]) == ("stub-1", "stub-1", stub.url)
    assert (teacher["endpoint"], teacher["keep"], teacher["rationalize"]) == (endpoint, "all", False)
    params = {"temperature": 0.0, "max_tokens": 256, "top_p": 0.5, "seed": 5, "stop": ["\nQ:"], "top_k": 3}
    assert teacher["params"] == params | {"reasoning": "drop"}
    assert teacher["usage"] == {"prompt": 200, "completion": 20, "cached": 100} and teacher["latency_s"] >= 0
    assert teacher["version"] and teacher["created_at"].endswith("+00:00") 
    assert second["id"] == "in-2" and second["correct"] is None
    for question, body, headers, _ in stub.requests:
        assert question.endswith("?\nA:") and "Authorization" not in headers
        assert body == {"model": "stub-1", **params} | {k: body[k] for k in ("messages", "prompt") if k in body}


def test_what_is_printed(files, capsys):
    stub = ask(files, always("no marker", r4), "--price-in 2 --price-out 50 --model other", 1)
    said = capsys.readouterr().err
    assert f"teacher: {stub.url}, chat, other; no key ($OPENAI_API_KEY is not set)" in said
    assert re.search(r"prompt:  \S+p.json \(sha256 [0-9a-f]{12}\), 1 exemplars", said)
    assert f"rows:    6 in {files / 'in.jsonl'}" in said
    assert said.count("warning: asked for 'other', served by 'stub-1'") == 1
    assert "5 ok, 1 left out, 0 retries" in said and "tok/s; $0.01" in said
    assert all(len(line) < 80 for line in re.findall(r"\d/6 [^\r\n]*", said)), "the bar"
    assert re.search(r"asked 6 rows in 0m0\ds: 5 ok, 1 left out \(unparsed 1\); 0 retries", said)
    assert "teacher right on 3 of 5 answered rows with a gold label (60.0%)" in said
    assert "tokens: 1,200 in (600 cached), 120 out; $0.01" in said
    assert f"{files / 'out.jsonl'}: 5 of 6 rows" in said
    assert "errors.jsonl: unparsed 1; --retry-failed asks again" in said


def test_a_prompt_cut_by_the_server_is_warned_of_once(files, capsys):
    (files / "in.jsonl").write_text(json.dumps({"input": "long " * 900 + "3 + 2?"}) + "\n")
    ask(files)
    assert capsys.readouterr().err.count("warning: the server read 200 tokens of 4,5") == 1


def test_train_reads_the_rows_as_they_are(files):
    from dss.config import parse_args
    from dss.rows import load_rows

    ask(files)
    for labels, wanted in (("gold", "1 + 2"), ("teacher", "(1 + 2)")):
        loaded = load_rows(parse_args(["--data", str(files / "out.jsonl"), "--labels", labels]))
        assert wanted in {r.label for r in loaded.train + loaded.validation} and loaded.metric == "equation"


def test_dry_run_sends_and_writes_nothing(files, capsys):
    before = sorted(files.iterdir())
    assert run(files, "http://127.0.0.1:1/v1", "--dry-run --price-in 1000 --price-out 1000") == 0
    shown = capsys.readouterr().out
    assert '"content": "Q: What is 0 + 2?\\nA:"' in shown and "rows: 6; requests: 6" in shown
    assert re.search(r"tokens: about \d+ in, and \d+ out .*; \$\d\.\d\d", shown)
    assert sorted(files.iterdir()) == before


def test_connections_are_kept_alive_and_one_that_the_server_closed_is_made_anew(files):
    assert ask(files, line="--concurrency 2").connections <= 2
    closing = {"Connection": "close"}
    for stub in (Stub(idle=0.02), Stub(lambda q, attempt: (200, completed(answer(q)), closing))):
        with stub:  # llama.cpp closes after 5 s; the requests go out each 200 ms
            assert run(files, stub.url, "--concurrency 1 --overwrite --rpm 60", scale=0.2) == 0
        assert stub.connections == 6 and [r["teacher"]["attempts"] for r in rows(files)] == [1] * 6


def test_above_temperature_0_an_unusable_text_is_asked_for_again(files):
    ask(files, once("no marker", "empty"), "--temperature 0.5 --limit 1")
    assert rows(files)[0]["teacher"]["attempts"] == 3 and rows(files)[0]["teacher"]["usage"]["completion"] == 60
    stub = ask(files, once("no marker"), "--temperature 0.5 --limit 1 --seed 1 --overwrite", 1)
    assert len(stub.requests) == 1, "the same seed, the same text"


def test_keep_correct_leaves_wrong_rows_out_and_never_asks_them_again(files, capsys):
    stub = ask(files, line="--keep correct")
    assert [r["id"] for r in rows(files)] == ["r1", "r2", "r4", "r5"] and all(r["correct"] for r in rows(files))
    assert [(e["id"], e["error"]["kind"]) for e in errors(files)] == [("r0", "incorrect"), ("r3", "incorrect")]
    assert run(files, stub.url, "--keep correct --retry-failed") == 0, "though the teacher is gone"
    assert "4 ok, 2 left out (incorrect 2)" in capsys.readouterr().err


def test_rationalize_shows_the_gold_label_and_is_recorded(files):
    stub = ask(files, line="--rationalize --limit 1")
    asked = [m["content"] for m in stub.requests[0][1]["messages"] if m["role"] == "user"]
    assert asked == ["Q: What is 1 + 1? ((1 + 1))\nA:", "Q: What is 0 + 2? (0 + 3)\nA:"]
    assert rows(files)[0]["teacher"]["rationalize"] is True


HM = "Hm, the answer is 3?"
THOUGHTS = [f"<think>{HM}</think>\n\n", f"{HM}</think>", f"<thinking>{HM}</thinking>", f"[THINK]{HM}[/THINK]", ""]
THOUGHTS += [f"<|channel|>analysis<|message|>{HM}<|end|><|start|>assistant<|channel|>final<|message|>"]


@pytest.mark.parametrize("thought", THOUGHTS)
def test_thoughts_stay_out_of_the_rationale_unless_asked_for(files, thought):
    field = {} if thought else {"reasoning_content": HM}
    reply = completed(thought + "Two. The answer is (2).", **field)
    for reasoning, wanted in (("drop", "Two."), ("keep", f"{HM}\nTwo.")):
        ask(files, always(reply), f"--limit 1 --overwrite --reasoning {reasoning}")
        assert (rows(files)[0]["rationale"], rows(files)[0]["teacher_label"]) == (wanted, "(2)")


def test_thoughts_that_used_up_all_tokens_are_an_empty_answer_and_say_so(files):
    for reply in ("thoughts only", completed("<think>Let me see", "length")):
        ask(files, always(reply), "--limit 1 --overwrite", 1)
        (row,) = errors(files)
        assert row["error"]["kind"] == "empty" and "larger --max-tokens" in row["error"]["message"]
        assert "Let me see" in row["error"]["raw"]


def test_a_rationale_that_a_row_has_is_kept_and_only_the_others_are_asked_for(files, capsys):
    lines = [json.loads(line) for line in (files / "in.jsonl").read_text().splitlines()]
    lines[1] |= {"rationale": "Mine.", "mine": 1, "correct": ["yes"]}
    lines[4] |= {"rationale": "Ours."}
    (files / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Stub() as stub:
        assert run(files, stub.url, "--dry-run") == 0 and "rows: 4; requests: 4" in capsys.readouterr().out
        assert run(files, stub.url) == run(files, stub.url) == 0 and len(stub.requests) == 4
        assert "2 of them with a rationale, which is kept" in capsys.readouterr().err
        assert [r["id"] for r in rows(files)] == [f"r{i}" for i in range(6)]
        for i in (1, 4):
            assert rows(files)[i] == lines[i] | {"teacher_label": None, "teacher": None}
        assert run(files, stub.url, "--replace") == 2 and "was made with no --replace" in capsys.readouterr().err
        assert run(files, stub.url, "--replace --overwrite") == 0 and len(stub.requests) == 10
    assert all(r["teacher"] and r["rationale"] not in ("Mine.", "Ours.") for r in rows(files))


def test_gold_labels_that_no_answer_can_have_are_named_before_anything_is_sent(files, capsys):
    task = PROMPT | {"label_type": "class", "labels": ["positive", "negative"]}
    task["exemplars"] = [task["exemplars"][0] | {"label": "positive"}]
    (files / "p.json").write_text(json.dumps(task))
    lines = [{"input": "one", "label": "pos"}, {"input": "two", "label": "Negative"}, {"input": "three", "label": 0}]
    (files / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(files, "http://127.0.0.1:9/v1", "--dry-run") == 0
    said = capsys.readouterr().err
    assert "warning: 2 gold labels match none of the prompt's class labels (positive, negative)" in said
    assert "for example '0' in row 'in-3'" in said
    (files / "p.json").write_text((ROOT / "data" / "prompts" / "cqa.json").read_text())
    assert run(files, "http://127.0.0.1:9/v1") == 2
    assert "row 'in-1': the prompt wants choices, the input has no lines" in capsys.readouterr().err


def run_batch(requests, replies, answer_to):
    """A batch API: each request gets a line of the replies, in another order. Returns the requests."""
    lines = [json.loads(line) for path in requests for line in path.read_text().splitlines()]
    made = filter(None, map(answer_to, reversed(lines)))
    replies.write_text("".join(json.dumps(line) + "\n" for line in made))
    return lines


def batch_answer(line):
    assert line["method"] == "POST" and line["url"] == "/v1/chat/completions"
    body = completed(answer(line["body"]["messages"][-1]["content"]))
    return {"custom_id": line["custom_id"], "response": {"status_code": 200, "body": body}, "error": None}


def test_batch_files_give_the_rows_that_asking_gives(files, capsys):
    def faulty(line):
        reply = {"custom_id": line["custom_id"], "response": None, "error": {"message": "expired"}}
        context = {"status_code": 400, "body": REPLIES["context"][1]}
        other = {"r1": None, "r2": reply, "r4": reply | {"response": context}}
        return other.get(line["custom_id"].split("-")[0], batch_answer(line))

    again, line = files / "b.jsonl", f"--batch-requests {files}/b.jsonl"
    assert run(files, "", f"{line} --batch-rows 4") == 0
    lines = run_batch([again, files / "b-2.jsonl"], files / "c.jsonl", faulty)
    assert [len(p.read_text().splitlines()) for p in (again, files / "b-2.jsonl")] == [4, 2]
    assert re.fullmatch("r0-[0-9a-f]{12}", lines[0]["custom_id"])
    assert run(files, "", f"--batch-replies {files}/c.jsonl") == 1
    assert "2 rows have no reply yet" in capsys.readouterr().err
    assert [r["id"] for r in rows(files)] == ["r0", "r3", "r5"]
    assert [e["error"]["kind"] for e in errors(files)] == ["context_exceeded"]
    assert run(files, "", line) == 0
    assert [json.loads(line)["custom_id"][:3] for line in again.read_text().splitlines()] == ["r1-", "r2-"]
    run_batch([again], files / "d.jsonl", batch_answer)
    assert run(files, "", f"--batch-replies {files}/c.jsonl {files}/d.jsonl") == 1
    make_files(files / "asked")
    ask(files / "asked", always("context", r4), status=1)
    for asked, read in zip(rows(files / "asked") + errors(files / "asked"), rows(files) + errors(files)):
        asked["teacher"]["base_url"] = ""
        asked.get("error", {}).pop("message", None), read.get("error", {}).pop("message", None)
        assert lasting(asked) == lasting(read)


def test_replies_to_other_requests_are_refused(files, capsys):
    line = "--temperature 1 --seed 5 --limit 2"
    assert run(files, "", f"{line} --batch-requests {files}/b.jsonl") == 0
    run_batch([files / "b.jsonl"], files / "c.jsonl", batch_answer)
    for other in ("--temperature 1 --seed 6 --limit 2", "--temperature 1 --seed 5 --limit 1"):
        assert run(files, "", f"{other} --batch-replies {files}/c.jsonl") == 2
        assert "replies are to requests that these settings and rows do not make" in capsys.readouterr().err
    assert run(files, "", f"{line} --batch-replies {files}/c.jsonl") == 0
    for content in ("{", '{"id": 1}', '{"custom_id": "x", "response": {"status_code": "?"}}'):
        (files / "c.jsonl").write_text(content)
        assert run(files, "", f"{line} --batch-replies {files}/c.jsonl") == 2
        assert "c.jsonl:1: not a reply of a batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, words",
    [
        ("--concurrency 0", "--concurrency must be at least 1, got 0"),
        ("--extra-body [1]", "--extra-body must be a JSON object"),
        ('--extra-body {"stream":true}', '--extra-body must be without "stream"'),
        ("--api-key sk", "unknown flag --api-key; did you mean --api-key-env?"),
        ("--overwrite --retry-failed", "--retry-failed must be left out beside --overwrite"),
        ("--base-url ftp://x/v1", "--base-url must be http(s)://HOST[:PORT][/PATH]"),
        ("--base-url http://a..b/v1", "--base-url must be http(s)://HOST[:PORT][/PATH]"),
        ("--base-url http://x/v1?key=abc", "--base-url must not hold a key"),
        ("--base-url http://me:secret@x/v1", "a password or key goes into --header"),
        ("--header api-key:123", "--header api-key: a key must not stand on the command line"),
        ("--header X-Id:sk-123456", "--header X-Id: a key must not stand on the command line"),
        ("--header api-key:$NOT_SET", "the environment variable NOT_SET is not set"),
        ("--header api-key", "--header must be 'NAME: VALUE' or 'NAME: $VARIABLE'"),
        ("--batch-requests b --batch-replies c", "--batch-replies must be left out beside --batch-requests"),
        ("--input /dev/null", "/dev/null: not a regular file"),
        ("--prompt nowhere.json", "nowhere.json"),
        ("--output nowhere/out.jsonl", "--output must be in a directory that exists"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_2(files, refused, line, words):
    said = refused(extract.main, *arguments(files, "http://127.0.0.1:9/v1", line))
    assert words in said and re.match(r"\S+: ", said)
    assert sorted(p.name for p in files.iterdir()) == ["in.jsonl", "p.json"]


A, B = '{"id": "a", "input": "1 + 1"}', '{"id": "a", "input": "2 + 2"}'
BARE, NOT_OURS = '{"input": "1 + 1"}', "out.jsonl:1: not a row that extract.py wrote"


@pytest.mark.parametrize(
    "name, content, line, words",
    [
        ("in.jsonl", f"{A}\n{B}", "", "the id 'a' is there twice"),
        ("in.jsonl", BARE + "\n{", "", "in.jsonl:2: not JSON"),
        ("in.jsonl", "", "", "there are no rows in it"),
        ("in.jsonl", BARE, "--rationalize", "row 'in-1' has no gold label, which --rationalize needs"),
        ("in.jsonl", BARE, "--keep correct", "has no gold label, which --keep correct needs"),
        ("in.jsonl", BARE, "--output {}/in.jsonl", "--output must be another file than --input"),
        ("out.jsonl", A + "\n", "", NOT_OURS),
        ("out.jsonl", A, "", NOT_OURS),  # not even its last line is cut off, which may look torn
        ("out.jsonl", "Dear Mia,", "", NOT_OURS),
        ("out.jsonl", "a\nb", "", NOT_OURS),
    ],
)
def test_a_wrong_file_is_found_before_anything_is_sent_and_not_touched(files, refused, name, content, line, words):
    (files / name).write_text(content)
    assert words in refused(extract.main, *arguments(files, "http://127.0.0.1:9/v1", line.format(files)))
    assert (files / name).read_text() == content


def test_no_base_url(files, capsys, monkeypatch):
    assert run(files, "") == 2 and "give --base-url or set $OPENAI_BASE_URL" in capsys.readouterr().err
    with Stub() as stub:
        monkeypatch.setenv("OPENAI_BASE_URL", stub.url)
        assert run(files, "") == 0


def test_half_a_character_from_the_teacher_is_replaced_and_in_the_input_refused(files, refused):
    (files / "in.jsonl").write_text('{"input": "What is 3 + 2?"}\n')
    ask(files, always(completed("\ud800 Three. The answer is (3 + 2).")))
    assert rows(files)[0]["rationale"] == "? Three."
    (files / "in.jsonl").write_text('{"input": "\\ud800 What is 3 + 2?"}\n')
    assert "in.jsonl:1:" in refused(extract.main, *arguments(files, "http://127.0.0.1:9/v1"))


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
        assert run(tmp_path, stub.url, f'--api-key-env MY_KEY --extra-body {{"user":"{KEY}"}}') == 2
        line = "--api-key-env MY_KEY --max-retries 1 --header X-Other:${MY_KEY}"
        assert run(tmp_path, stub.url, line) == 1
        assert all(headers["Authorization"] == f"Bearer {KEY}" for _, _, headers, _ in stub.requests)
        for status in (401, 404, 500, 400):
            stub.behave = always((status, {"error": {"message": f"bad key {KEY}", "param": KEY}}, {}))
            run(tmp_path, stub.url, line + " --retry-failed --max-retries 0")
        stub.behave = always((302, "", {"Location": f"http://x/{KEY}"}))
        assert run(tmp_path, stub.url, line + " --retry-failed") == 3
    said = "".join(capsys.readouterr())
    assert "[key]" in said and "key" in said
    for text in [said, *(p.read_text("utf-8") for p in tmp_path.iterdir())]:
        assert KEY not in text and KEY[4:] not in text


@pytest.mark.parametrize("key", ["sk-with space", "sk-with\nnewline", "sk-ünï"])
def test_a_key_that_cannot_be_sent_is_refused_without_quoting_it(files, capsys, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert run(files, "http://127.0.0.1:9/v1") == 2
    assert "sk-" not in (said := capsys.readouterr().err) and "has a space" in said


@pytest.mark.parametrize("key", ["more", "anything"])
def test_a_stand_in_for_a_key_is_not_hidden_from_texts(files, monkeypatch, key):
    """LiteLLM's own README says OPENAI_API_KEY=anything."""
    line = {"id": "anything-1", "input": "anything: what is 1 + 2?", "anything": 3}
    (files / "in.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with Stub(always(completed("1 and 2 more than anything. The answer is (1 + 2)."))) as stub:
        assert run(files, stub.url) == run(files, stub.url) == 0 and len(stub.requests) == 1
    (row,) = rows(files)
    assert {name: row[name] for name in line} == line and row["rationale"] == "1 and 2 more than anything."


def test_headers_come_from_the_environment_and_a_query_goes_with_every_request(files, monkeypatch, capsys):
    monkeypatch.setenv("AZURE_KEY", KEY)
    with Stub(always((422, {"detail": f"{KEY} is bad"}, {}), r4)) as stub:
        url = stub.url + "/chat/completions?api-version=2024-06-01"
        assert run(files, url, "--header api-key:$AZURE_KEY X-Title:mine") == 1
        assert stub.paths == {"/v1/chat/completions?api-version=2024-06-01"}
        assert all((h["api-key"], h["X-Title"]) == (KEY, "mine") for _, _, h, _ in stub.requests)
    assert rows(files)[0]["teacher"]["base_url"] == f"{stub.url}?api-version=2024-06-01"
    for text in ["".join(capsys.readouterr()), *(p.read_text("utf-8") for p in files.iterdir())]:
        assert KEY not in text


def test_a_proxy_is_used_except_for_hosts_that_no_proxy_names(files, monkeypatch):
    with Stub() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//me:secret12@"))
        assert run(files, "http://teacher.invalid/v1") == 0
        assert proxy.paths == {"http://teacher.invalid/v1/chat/completions"}
        assert {h["Proxy-Authorization"] for _, _, h, _ in proxy.requests} == {"Basic bWU6c2VjcmV0MTI="}
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with Stub() as stub:
            assert run(files, stub.url, "--overwrite") == 0 and len(stub.requests) == len(proxy.requests) == 6
