"""Replies and refusals in the forms that servers give them; headers, keys and proxies."""

import gzip
import json

import pytest
from extracting import KEY, always, ask, rows, run
from teacher_stub import Stub, completed, error

from data.teacher import RequestError, Teacher

TEACHER = Teacher("http://x/v1", "chat", [], 1)
PLAIN = json.dumps(completed("Two.")).encode()
PARTS = [{"type": "text", "text": "Tw"}, {"type": "text", "text": "o."}]
THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
REPLIES = [b"\xef\xbb\xbf\n " + PLAIN, completed("Two.") | {"usage": None, "model": None}]
REPLIES += [completed("Two.", finish) for finish in ("end_turn", "COMPLETE", "null", None, "odd")]
REPLIES += [completed("Two.", reasoning="Hm."), completed("Two.", reasoning_content="Hm.")]
REPLIES += [completed(PARTS), completed([THOUGHT, *PARTS])]
CUT = [completed("Two.", finish) for finish in ("MAX_TOKENS", "model_length", "content_filter")]


def read(content, status=200):
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    return TEACHER.read(status, {}, content)


@pytest.mark.parametrize("content", REPLIES + CUT)
def test_a_reply_is_read_in_any_wrapping(content):
    reply = read(content)
    assert reply.text == "Two." and reply.cut_short == (content in CUT)
    assert reply.reasoning == ("Hm." if "Hm." in str(content) else "")


FAILURES = [  # (status, content, then)
    (200, completed(None, "SAFETY"), "row"),
    (200, completed(None, "error"), "moment"),
    (200, error("Too many", code=429), "pace"),
    (200, error("No credits", code=402), "run"),
    (200, {"choices": []}, "moment"),
    (400, [error("API key not valid.")], "unclear"),
    (422, {"detail": [{"loc": ["body", "stop"], "msg": "\x1b[2J no"}]}, "unclear"),
    (407, "", "run"),
    (429, error("no", code="insufficient_quota"), "run"),
]


@pytest.mark.parametrize("status, content, then", FAILURES)
def test_a_failure_means_what_it_says(status, content, then):
    with pytest.raises(RequestError) as caught:
        read(content, status)
    assert caught.value.then == then and str(caught.value).isprintable()


def test_headers_come_from_the_environment_and_secrets_are_hidden(files, capsys, monkeypatch):
    monkeypatch.setenv("AZURE_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "anything")  # a stand-in, which texts may have
    with Stub(always((422, {"detail": f"{KEY} is anything"}, {}), "4 + 2")) as stub:
        url = f"{stub.url}/chat/completions?api-version=1"
        assert run(files, url, "--header api-key:$AZURE_KEY") == 1
    sent = stub.requests[0]
    assert sent.path == "/v1/chat/completions?api-version=1"
    assert (sent.headers["api-key"], sent.headers["Authorization"]) == (KEY, "Bearer anything")
    assert rows(files)[0]["teacher"]["base_url"] == stub.url
    said = capsys.readouterr().err
    assert "[key] is anything" in said
    for text in [said, *(path.read_text("utf-8") for path in files.iterdir())]:
        assert KEY not in text


def test_a_compressed_reply_is_read(files):
    content = gzip.compress(PLAIN.replace(b"Two.", b"So. The answer is (2)."))
    ask(files, always((200, content, {"Content-Encoding": "gzip"})))
    assert rows(files)[0]["rationale"] == "So."


def test_a_proxy_is_used_except_for_hosts_that_no_proxy_names(files, monkeypatch):
    with Stub() as proxy:
        monkeypatch.setenv("http_proxy", proxy.host)
        assert run(files, "http://teacher.invalid/v1/ ", "--limit 3") == 0
    assert proxy.requests[0].path == "http://teacher.invalid/v1/chat/completions"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert ask(files).requests


def test_a_dead_proxy_is_named_and_one_of_another_kind_refused(files, capsys, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://me:pw@127.0.0.1:9")
    assert run(files, "http://teacher.invalid/v1", "--max-retries 0") == 3
    said = capsys.readouterr().err
    assert "through the proxy 127.0.0.1:9: " in said and "me:pw" not in said
    monkeypatch.setenv("http_proxy", "socks5h://127.0.0.1:9")
    assert run(files, "http://x/v1") == 2 and "a SOCKS proxy" in capsys.readouterr().err
