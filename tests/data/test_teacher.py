"""Replies and refusals in the forms that servers give them; headers, keys and proxies."""

import gzip
import json
import ssl
import time
import zlib
from email.utils import formatdate

import pytest
from extracting import KEY, always, rows, run
from teacher_stub import Stub, completed, error

from data.teacher import RequestError, Teacher, retry_after

BODY = {
    "model": "m",
    "messages": [],
    "temperature": 0.0,
    "max_tokens": 9,
    "stop": ["x"],
    "response_format": {},
}


def read(content, status=200, headers={}, endpoint="chat"):  # noqa: B006
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    return Teacher("http://x/v1", endpoint, [], 1).read(status, headers, content, BODY)


def failure(content, status=200):
    with pytest.raises(RequestError) as caught:
        read(content, status)
    return caught.value


PLAIN = json.dumps(completed("Two.")).encode()


@pytest.mark.parametrize(
    "content, headers",
    [
        (PLAIN, {}),
        (b"\xef\xbb\xbf" + PLAIN, {}),
        (b"\n\n  " + PLAIN + b"\n", {}),
        (gzip.compress(PLAIN), {"Content-Encoding": "gzip"}),
        (zlib.compress(PLAIN), {"Content-Encoding": "deflate"}),
        (zlib.compress(PLAIN, wbits=-15), {"Content-Encoding": "deflate"}),
        (completed([{"type": "text", "text": "Tw"}, {"type": "text", "text": "o."}]), {}),
        (completed("Two.") | {"usage": None, "model": None}, {}),
        (PLAIN.replace(b'"index": 0', b'"logprobs": NaN'), {}),
    ],
)
def test_a_reply_is_read_in_any_wrapping(content, headers):
    assert read(content, headers=headers).text == "Two."


def test_usage_that_makes_no_sense_is_none():
    odd = {"prompt_tokens": 10**400, "completion_tokens": -1, "prompt_tokens_details": 7}
    assert read(completed("Two.") | {"usage": odd}).usage == {
        "prompt": 0,
        "completion": 0,
        "cached": 0,
    }


THINKING = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
    {"type": "text", "text": "Two."},
]


@pytest.mark.parametrize(
    "reply",
    [
        completed(THINKING),
        completed([{"type": "reasoning", "text": "Hm."}, {"type": "text", "text": "Two."}]),
        completed("Two.", reasoning_content="Hm."),
        completed("Two.", reasoning="Hm."),
    ],
)
def test_thoughts_beside_the_text_are_kept_apart(reply):
    assert (read(reply).text, read(reply).reasoning) == ("Two.", "Hm.")


@pytest.mark.parametrize(
    "finish", ["stop", "eos_token", "end_turn", "COMPLETE", "null", None, "", "odd"]
)
def test_a_whole_text_is_kept_whatever_the_reason_is_called(finish):
    assert not read(completed("Two.", finish)).cut_short


@pytest.mark.parametrize("finish", ["length", "MAX_TOKENS", "model_length", "max_output_tokens"])
def test_a_text_may_be_cut_short(finish):
    assert read(completed("Two", finish)).cut_short


FINISHES = {
    "content_filter": "row",
    "SAFETY": "row",
    "RECITATION": "row",
    "blocklist": "row",
    "odd": "row",
}
FINISHES |= {"error": "moment", "abort": "moment", "insufficient_system_resource": "moment"}


@pytest.mark.parametrize("finish", FINISHES)
def test_a_reply_without_text_fails_the_row_or_the_moment(finish):
    assert failure(completed(None, finish)).then == FINISHES[finish]


REFUSALS = [  # (status, content, then, words)
    (200, error("Too many", code=429), "pace", "429 from"),
    (200, error("Provider failed", code=502), "moment", "502 from"),
    (200, error("No credits", code=402), "run", "nothing left to spend"),
    (200, {"error": "Unexpected endpoint or method. (POST /chat/completions)"}, "run", "/v1"),
    (200, error("upstream is busy"), "moment", "upstream"),
    (400, [error("API key not valid.", status="INVALID_ARGUMENT")], "run", "$OPENAI_API_KEY"),
    (
        400,
        error("`stop` is deprecated for this model."),
        "run",
        """'{"stop": null}' leaves it out""",
    ),
    (
        422,
        {"detail": [{"loc": ["body", "stop"], "msg": "Extra inputs are not permitted"}]},
        "run",
        "stop",
    ),
    (
        400,
        error("The input (500 tokens) is longer than the model's context length."),
        "row",
        "context",
    ),
    (400, error("json_schema is unavailable for this model"), "run", "refuses response_format"),
    (413, "too large", "row", "413"),
    (400, error("Blocked", code="content_policy_violation"), "row", "Blocked"),
    (403, error("no"), "unclear", "is the key right?"),
    (429, error("no", code="insufficient_quota"), "run", "nothing left to spend"),
    (400, error("max_tokens is not supported"), "run", '"max_completion_tokens": 1000}'),
    (200, 'data: {"choices": []}\n\n', "run", "is a stream"),
    (422, {"detail": "odd"}, "unclear", "odd"),
    (429, [error("You exceeded your quota, check your billing")], "pace", "quota"),
]


@pytest.mark.parametrize("status, content, then, words", REFUSALS)
def test_a_refusal_means_what_it_says(status, content, then, words):
    found = failure(content, status)
    assert found.then == then and words in str(found) and "\n" not in str(found)


def test_control_characters_do_not_reach_the_terminal():
    assert str(failure(error("\x1b]0;owned\x07\x9b2J"), 422)).isprintable()


def test_retry_after_is_seconds_milliseconds_or_a_date():
    assert retry_after({"Retry-After": "1.5"}) == retry_after({"retry-after-ms": "1500"}) == 1.5
    assert 50 < retry_after({"Retry-After": formatdate(time.time() + 60, usegmt=True)}) <= 60
    assert retry_after({"Retry-After": "soon"}) is retry_after({}) is None


@pytest.mark.parametrize(
    "url, target",
    [
        (" http://x:1/v1/ \n", "http://x:1/v1/chat/completions"),
        ("https://x/v1/chat/completions?v=1", "https://x/v1/chat/completions?v=1"),
    ],
)
def test_a_base_url_may_be_typed_loosely(url, target):
    assert Teacher(url, "chat", [], 1).target == target


WRONG = {
    "ftp://x/v1": [],
    "x:1": [],
    "http://a..b": [],
    "http://me:secret@x/v1": [],
    "http://x/v1": ["key"],
}
WRONG |= {"http://x": ["key: $NOT_SET"], "http://y": ["key: a\x07b"]}


@pytest.mark.parametrize("url", WRONG)
def test_a_wrong_url_or_header_is_refused_without_quoting_a_secret(url):
    with pytest.raises(ValueError) as caught:
        Teacher(url, "chat", WRONG[url], 1)
    assert "secret" not in str(caught.value) and "--" in str(caught.value) + "--"


def test_headers_come_from_the_environment_and_secrets_are_hidden(files, capsys, monkeypatch):
    monkeypatch.setenv("AZURE_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "anything")  # a stand-in, which texts may have
    with Stub(always((422, {"detail": f"{KEY} is anything"}, {}), lambda q: "4 + 2" in q)) as stub:
        url = stub.url + "/chat/completions?api-version=2024-06-01"
        assert run(files, url, "--header api-key:$AZURE_KEY X-Title:mine") == 1
    assert stub.paths == {"/v1/chat/completions?api-version=2024-06-01"}
    sent = stub.requests[0][2]
    assert (sent["Api-Key"], sent["X-Title"], sent["Authorization"]) == (
        KEY,
        "mine",
        "Bearer anything",
    )
    assert rows(files)[0]["teacher"]["base_url"] == stub.url
    for text in [
        "".join(capsys.readouterr()),
        *(path.read_text("utf-8") for path in files.iterdir()),
    ]:
        assert KEY not in text


def test_a_proxy_is_used_with_its_login_except_for_hosts_that_no_proxy_names(files, monkeypatch):
    with Stub() as proxy:
        monkeypatch.setenv(
            "http_proxy", proxy.url.replace("//", "//me:se%40cret@").removesuffix("/v1")
        )
        assert run(files, "http://teacher.invalid/v1") == 0
        assert proxy.paths == {"http://teacher.invalid/v1/chat/completions"}
        assert {h["Proxy-Authorization"] for _, _, h, _ in proxy.requests} == {
            "Basic bWU6c2VAY3JldA=="
        }
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with Stub() as stub:
            assert (
                run(files, stub.url, "--overwrite") == 0
                and len(stub.requests) == len(proxy.requests) == 6
            )


@pytest.mark.parametrize("proxy", ["127.0.0.1:9", "http://127.0.0.1:9", "http://me:pw@127.0.0.1:9"])
def test_a_dead_proxy_is_named(files, capsys, monkeypatch, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    assert run(files, "http://teacher.invalid/v1", "--max-retries 0") == 3
    said = capsys.readouterr().err
    assert (
        "through the proxy 127.0.0.1:9: " in said
        and "is the proxy right?" in said
        and "me:pw" not in said
    )


def test_a_proxy_of_another_kind_or_without_login_is_the_proxys_fault(files, capsys, monkeypatch):
    monkeypatch.setenv("http_proxy", "socks5h://127.0.0.1:9")
    assert (
        run(files, "http://x/v1") == 2
        and "socks5h proxies are not supported" in capsys.readouterr().err
    )
    with Stub(always((407, "", {}))) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert (
            run(files, "http://x/v1") == 3 and "the proxy wants a login" in capsys.readouterr().err
        )


def test_a_certificate_that_is_not_trusted_ends_the_run():
    problem = ssl.SSLCertVerificationError(1, "failed")
    problem.verify_message = "self-signed certificate"
    found = Teacher("https://x", "chat", [], 1).connection_error(problem)
    assert found.then == "run" and "self-signed certificate); SSL_CERT_FILE" in str(found)
