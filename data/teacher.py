"""An OpenAI-compatible teacher over HTTP: a request, its reply, and what a failure means.

Every request has a connection of its own, so a reply cannot belong to another request. Proxies and
certificates are urllib's. Keys go into headers and nowhere else; `hide` removes them from what a
server says.
"""

import json
import os
import re
import ssl
import urllib.request
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import SplitResult, urlsplit

from data.cli import one_line

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
HINTS = {  # by status
    401: "is the key right? It is read from $OPENAI_API_KEY, or given with --header",
    402: "nothing left to spend",
    407: "the proxy wants a login: http://USER:PASSWORD@HOST:PORT",
}
HINT = (  # of any other 4xx
    "are --base-url (which usually ends in /v1), --endpoint, --model, key and parameters right? "
    """--extra-body '{"NAME": null}' leaves a parameter out"""
)
FAILED = r"error|abort|cancel|fail|insufficient|overload|timeout"  # finish reasons
CUT_SHORT = r"length|limit|incomplete|max_|filter"  # finish reasons
USUAL = rf"stop|eos|end|complete|null|.*({CUT_SHORT})"  # finish reasons


class RequestError(Exception):
    """Why there is no usable reply.

    kind: what the failure is counted as. raw: what the server sent. wait: seconds of its
    Retry-After.
    then: what follows from it:
        "row"      this row cannot be answered (filtered)
        "unclear"  the row's failure if the teacher answers others, else the run's (another 4xx)
        "moment"   a later attempt may be answered (no connection, 5xx, timeout, an empty reply)
        "pace"     a later attempt may be answered, and this was none (429)
        "run"      no request can be answered (key, credit, proxy)
    """

    def __init__(
        self, kind: str, message: str, then: str, raw: str = "", wait: float = 0.0
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.then = then
        self.raw = raw
        self.wait = wait


@dataclass(frozen=True)
class Reply:
    text: str
    reasoning: str  # from a field of its own; "" where there is none
    cut_short: bool  # it did not end by itself
    model: str | None  # that served it, as the server says
    usage: dict[str, int]  # tokens: prompt, completion


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """A response of any status is returned. No redirect is followed: the request would arrive
    without its body, and the key at another host.
    """

    def http_response(self, _: Any, response: Any) -> Any:
        return response

    https_response = http_response


class Teacher:
    """One endpoint, for any number of threads."""

    def __init__(
        self, base_url: str, endpoint: str, headers: Iterable[str], timeout: float
    ) -> None:
        """The arguments are those of extract.py. Raises ValueError, which quotes no secret."""
        self.timeout = timeout
        parts = read_url(base_url)
        self.url = parts._replace(query="").geturl()
        self.target = parts._replace(path=parts.path + PATHS[endpoint]).geturl()
        self.place = self.url
        proxy = find_proxy(parts)
        if proxy:
            self.place += f" through the proxy {proxy}"
        self.headers = {"Content-Type": "application/json", "User-Agent": "dss-extract"}
        self.secrets: list[str] = []
        if os.environ.get("OPENAI_API_KEY", "").strip():
            self.add_header("Authorization: Bearer $OPENAI_API_KEY")
        for header in headers:
            self.add_header(header)
        https = urllib.request.HTTPSHandler(context=ssl.create_default_context())
        self.opener = urllib.request.build_opener(AnyStatus, https)

    def add_header(self, header: str) -> None:
        """Add `NAME: VALUE`, where $VARIABLE in the value is the environment's, and a secret."""
        name, _, text = header.partition(":")
        for variable in re.findall(r"\$\{?(\w+)", text):
            if not os.environ.get(variable):
                what = f"the environment variable {variable} is not set"
                raise ValueError(f"--header {name}: {what}")
        value = os.path.expandvars(text.strip()).strip()
        if not value:
            raise ValueError("--header must be 'NAME: VALUE' or 'NAME: $VARIABLE'")
        self.headers[name.strip().title()] = value
        if "$" in text:  # short words, such as the stand-ins EMPTY or ollama, may be in texts
            self.secrets += [word for word in value.split() if len(word) >= 12]

    def hide(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "[key]")
        return text

    def ask(self, body: dict) -> Reply:
        """Send one request. Raises RequestError."""
        content = json.dumps(body).encode()
        request = urllib.request.Request(self.target, content, self.headers)
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                raw = response.read()
            if "Content-Encoding" in response.headers:  # gzip or deflate, though not asked for
                raw = zlib.decompress(raw, wbits=47)
        except (OSError, ValueError, HTTPException, zlib.error) as error:
            problem = getattr(error, "reason", error)  # URLError has the system's error inside
            if isinstance(problem, TimeoutError):
                what = f"no reply within {self.timeout:g} s (--timeout)"
                raise self.error("timeout", what, "moment") from None
            what = self.hide(one_line(problem)) or type(problem).__name__
            raise self.error("disconnect", f"{what}; is it running there?", "moment") from None
        return self.read(response.status, response.headers, raw)

    def error(
        self, kind: str, what: str, then: str, raw: str = "", wait: float = 0.0
    ) -> RequestError:
        return RequestError(kind, f"{self.place}: {what}", then, raw, wait)

    def read(self, status: int, headers: Mapping[str, str], raw: bytes) -> Reply:
        """The reply in a response. Raises RequestError."""
        text = self.hide(raw.decode("utf-8-sig", "replace"))
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        error = find_error(content)
        if not 200 <= status < 300:
            raise self.refusal(status, headers, text, error)
        try:
            choice = content["choices"][0]
            message = choice.get("message") or choice
            said = message.get("content") or message.get("text") or message.get("refusal")
            said, thoughts = read_content(said)
            field = message.get("reasoning_content") or message.get("reasoning")
            counts = content.get("usage") or {}
            usage = {name: counts.get(f"{name}_tokens") or 0 for name in ("prompt", "completion")}
        except (LookupError, TypeError, AttributeError):
            if error:
                code = str(error.get("code"))
                status = int(code) if re.fullmatch(r"[45]\d\d", code) else status
                raise self.refusal(status, headers, text, error) from None
            what = f"the reply is no completion: {one_line(text)[:100]!r}"
            raise self.error("bad_reply", what, "moment", text) from None
        reasoning = whole_characters(field) or thoughts
        finish = str(choice.get("finish_reason") or "stop").lower()
        if re.search(FAILED, finish):
            what = f"the reply ended in an error (finish_reason {finish})"
            raise self.error("bad_reply", what, "moment", text)
        if not (said or reasoning or re.match(USUAL, finish)):
            what = f"the teacher held the reply back (finish_reason {finish})"
            raise self.error("content_filter", what, "row", text)
        return Reply(
            text=said,
            reasoning=reasoning.strip(),
            cut_short=bool(re.search(CUT_SHORT, finish)),
            model=content.get("model"),
            usage=usage,
        )

    def refusal(
        self, status: int, headers: Mapping[str, str], text: str, error: dict
    ) -> RequestError:
        """What an error of the server means."""
        message = error.get("message") or error or text or "no message"
        if not isinstance(message, str):
            message = json.dumps(message)
        what = f"status {status}: {one_line(message)[:300]}"
        if error.get("code") == "insufficient_quota":  # with status 429
            status = 402
        kind = f"http_{status}"
        if status in (401, 402, 407):
            return self.error(kind, f"{what}; {HINTS[status]}", "run", text)
        if status in (408, 409, 429) or status >= 500:
            then = "pace" if status == 429 else "moment"
            seconds = headers.get("Retry-After", "")
            return self.error(kind, what, then, text, float(seconds) if seconds.isdigit() else 0.0)
        return self.error(kind, f"{what}; {HINTS.get(status, HINT)}", "unclear", text)


def read_url(base_url: str) -> SplitResult:
    """A base URL in its parts. Raises ValueError."""
    parts = urlsplit(base_url.strip())
    if base_url and (parts.scheme not in ("http", "https") or "@" in parts.netloc):
        form = "http(s)://HOST[:PORT][/PATH][?QUERY], such as http://localhost:11434/v1"
        raise ValueError(f"--base-url must be {form}; a key goes into --header 'NAME: $VARIABLE'")
    path = re.sub("/+$|/(chat/)?completions/*$", "", parts.path)
    return parts._replace(path=path, fragment="")


def find_proxy(parts: SplitResult) -> str:
    """The HOST:PORT of the proxy that urllib will use for a URL, or "". Raises ValueError for a
    SOCKS proxy.
    """
    proxy = urllib.request.getproxies().get(parts.scheme, "")
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return ""
    if proxy.startswith("socks"):
        what = "a SOCKS proxy, which is not supported; http://[USER:PASSWORD@]HOST:PORT is"
        raise ValueError(f"the environment names {what}; NO_PROXY excepts hosts")
    return re.sub(r"^.*(//|@)|/$", "", proxy)


def read_content(content: Any) -> tuple[str, str]:
    """(text, thoughts) of a message's content, which is a text, null, or a list of parts."""
    if not isinstance(content, list):
        return whole_characters(content), ""
    text = ""
    thoughts = ""
    for part in content:
        said, _ = read_content(part.get("text") or part.get("thinking"))
        if re.search("think|reason", str(part.get("type"))):
            thoughts += said
        else:
            text += said
    return text, thoughts


def find_error(content: Any) -> dict[str, Any]:
    """The fields of the error in a reply, in whatever form it came; {} if there is none."""
    if isinstance(content, list) and content:
        content = content[0]  # as Gemini sends it
    if isinstance(content, dict):
        for key in ("error", "detail", "message"):
            error = content.get(key)
            if error:
                return error if isinstance(error, dict) else {"message": error}
    return {}


def whole_characters(text: Any) -> str:
    """A text without lone surrogates, which UTF-8 cannot hold. "" for what is no text."""
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""
