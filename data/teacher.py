"""An OpenAI-compatible teacher over HTTP: a request, its reply, and what a failure means.

Every request has a connection of its own, so a reply cannot belong to another request. Proxies and
certificates are urllib's. Keys go into headers and nowhere else; `hide` removes them from what a
server says.
"""

import email.utils
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.client import HTTPException, IncompleteRead
from typing import Any
from urllib.parse import urlsplit

USAGE = {
    "prompt": "usage.prompt_tokens",
    "completion": "usage.completion_tokens",
    "cached": "usage.prompt_tokens_details.cached_tokens",
}
PATHS = {"chat": "/chat/completions", "completions": "/completions"}
KEY = "is the key right? It is read from $OPENAI_API_KEY, or given with --header"
HINTS = {
    401: KEY,
    402: "nothing left to spend",
    403: KEY,
    404: "are --base-url (which usually ends in /v1), --endpoint and --model right?",
    407: "the proxy wants a login: http://USER:PASSWORD@HOST:PORT",
}
WRONG_KEY = r"api[ _-]?key|unauthori[sz]ed|authenticat|credential"
UNSUPPORTED = (
    r"not support|unsupported|unavailable|deprecated|unrecogni[sz]ed|unknown|unexpected"
    r"|not permitted|not allowed|extra inputs|forbidden|invalid"
)
MEANT = {  # the status that an error with status 200 means by its words, if it has no number
    429: r"rate.?limit|too many requests",
    402: r"insufficient|credit|balance",
    401: WRONG_KEY,
    404: r"endpoint|route|not.?found",
}
TOO_LONG = (
    r"context.{0,20}(length|size|window)|maximum.{0,20}context|too many tokens|too long|longer than"
)
FILTERED = r"filter|safety|moderation|content_policy|content management policy"
HELD_BACK = r"filter|block|policy|safety|recitation|prohibit|sensitive|spii|refus"  # finish reasons
FAILED = r"error|abort|cancel|fail|insufficient|overload|timeout"  # finish reasons
CUT = r"length|limit|incomplete|max_?(output_)?tokens"  # finish reasons
USUAL = rf"stop|eos|end|complete|null|none|.*({CUT})"  # finish reasons


class RequestError(Exception):
    """Why there is no usable reply.

    kind: what the failure is counted as. raw: what the server sent. wait: seconds of its
    Retry-After.
    then: what follows from it:
        "row"      this row cannot be answered (too long, filtered)
        "unclear"  the row's failure if the teacher answers others, else the run's (another 4xx)
        "moment"   a later attempt may be answered (no connection, 5xx, timeout, an empty reply)
        "pace"     a later attempt may be answered, and this was none (429)
        "run"      no request can be answered (key, model, a refused parameter)
    """

    def __init__(
        self, kind: str, message: str, then: str, raw: str = "", wait: float | None = None
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
    cut_short: bool  # it ended at the token limit
    model: str  # that served it, as the server says
    usage: dict[str, int]  # tokens: prompt, completion, cached (of the prompt)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive without its body."""

    def redirect_request(self, *_: Any) -> None:
        return None


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
        self.headers = {"Content-Type": "application/json", "User-Agent": "dss-extract"}
        self.secrets: list[str] = []
        if os.environ.get("OPENAI_API_KEY", "").strip():
            headers = ["Authorization: Bearer $OPENAI_API_KEY", *headers]
        for header in headers:
            self.add_header(header)
        proxy = find_proxy(parts.scheme, parts.netloc)
        self.opener = urllib.request.build_opener(
            NoRedirect,
            urllib.request.ProxyHandler({parts.scheme: proxy} if proxy else {}),
            urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        )
        self.place = self.url
        self.question = "is the teacher running there?"
        if proxy:
            self.place += f" through the proxy {proxy.rpartition('/')[2].rpartition('@')[2]}"
            self.question = "is the proxy right?"

    def add_header(self, header: str) -> None:
        """Add `NAME: VALUE`, where $VARIABLE in the value is the environment's, and a secret."""
        name, _, text = header.partition(":")
        for variable in re.findall(r"\$\{?(\w+)", text):
            if not os.environ.get(variable):
                what = f"the environment variable {variable} is not set"
                raise ValueError(f"--header {name}: {what}")
        value = os.path.expandvars(text.strip()).strip()
        if not value or not re.fullmatch(r"[\w-]+", name.strip()):
            raise ValueError("--header must be 'NAME: VALUE' or 'NAME: $VARIABLE'")
        if not value.isascii() or not value.isprintable():
            raise ValueError(f"--header {name}: its value has a character that cannot be sent")
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
        until = time.monotonic() + self.timeout
        try:
            try:
                response = self.opener.open(request, timeout=self.timeout)
            except urllib.error.HTTPError as error:
                response = error  # it is a response as well
            with response:
                raw = read_whole(response, until)
            return self.read(response.status, response.headers, raw, body)
        except (OSError, HTTPException, zlib.error) as error:
            problem = getattr(error, "reason", error)  # URLError has the system's error inside
        raise self.connection_error(problem)

    def connection_error(self, problem: object) -> RequestError:
        if isinstance(problem, TimeoutError):
            what = f"no whole reply within {self.timeout:g} s (--timeout)"
            return self.error("timeout", what, "moment")
        if isinstance(problem, ssl.SSLCertVerificationError):
            what = f"untrusted certificate ({problem.verify_message})"
            what += "; SSL_CERT_FILE can name a file with those to trust"
            return self.error("certificate", what, "run")
        if "Tunnel connection failed: 407" in str(problem):
            return self.error("http_407", HINTS[407], "run")
        what = str(problem) or type(problem).__name__
        return self.error("disconnect", f"{what}; {self.question}", "moment")

    def error(self, kind: str, what: str, then: str, raw: str = "") -> RequestError:
        return RequestError(kind, f"{self.place}: {what}", then, raw)

    def read(self, status: int, headers: Mapping[str, str], raw: bytes, body: dict) -> Reply:
        """The reply in a response. Raises RequestError.

        body: the request, whose parameters may be refused.
        """
        text = self.hide(decode(raw, headers))
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        if not 200 <= status < 300:
            raise self.refusal(status, headers, text, error_in(content, text), body)
        try:
            choice = content["choices"][0]
            message = choice.get("message") or choice.get("delta") or choice
            said, thoughts = read_content(message.get("content", message.get("text")))
            field = message.get("reasoning_content") or message.get("reasoning")
        except (LookupError, TypeError, AttributeError):
            raise self.no_reply(headers, text, content, body) from None
        reasoning = whole_characters(field) or thoughts
        finish = one_line(choice.get("finish_reason") or "stop").lower()
        if message.get("refusal") and not said:
            finish = "refusal"
        self.check_finish(finish, choice.get("error"), said or reasoning, text)
        return Reply(
            text=whole_characters(said),
            reasoning=reasoning.strip(),
            cut_short=bool(re.search(CUT, finish)),
            model=whole_characters(content.get("model")),
            usage=read_usage(content),
        )

    def check_finish(self, finish: str, error: object, said: str, text: str) -> None:
        """Raise RequestError for a finish reason that leaves no answer."""
        if error or re.search(FAILED, finish):
            what = f"the reply ended in an error: {one_line(error or finish)[:200]}"
            raise self.error("bad_reply", what, "moment", text)
        if re.search(HELD_BACK, finish) or not (said or re.match(USUAL, finish)):
            what = f"the teacher held the reply back (finish_reason {finish})"
            raise self.error("content_filter", what, "row", text)

    def no_reply(
        self, headers: Mapping[str, str], text: str, content: Any, body: dict
    ) -> RequestError:
        """What a response of status 200 without an answer means."""
        shown = repr(one_line(text)[:100])
        if re.match(r"(event: \w+\s+)?data: ", text) or "data: [DONE]" in text:
            what = f'the reply is a stream, though "stream": false was asked for: {shown}'
            return self.error("bad_reply", what, "run", text)
        error = error_in(content, text)
        if isinstance(content, dict) and content.keys() & {"error", "message", "detail", "code"}:
            for code in (str(error.get("code")), str(error.get("status"))):
                if re.fullmatch(r"[45]\d\d", code):
                    return self.refusal(int(code), headers, text, error, body)
            for status, words in MEANT.items():
                if re.search(words, f"{error.get('code')} {error['message']}", re.IGNORECASE):
                    return self.refusal(status, headers, text, error, body)
        return self.error("bad_reply", f"the reply is no completion: {shown}", "moment", text)

    def refusal(
        self, status: int, headers: Mapping[str, str], text: str, error: dict, body: dict
    ) -> RequestError:
        """What a response with another status than 2xx means."""
        kind = f"http_{status}"
        said = f"{status} from {self.place}: {error['message']}"
        code = f"{error.get('code')} {error.get('type')} {error.get('status')}"
        if 300 <= status < 400:
            place = self.hide(one_line(headers.get("Location") or "nowhere")).split("?")[0]
            said = f"{said}; it redirects to {place}: use that as --base-url"
            return RequestError(kind, said, "run", text)
        if status == 429 and re.search("insufficient_quota|billing", code):
            status = 402
        if status in (401, 402, 404, 407):
            return RequestError(kind, f"{said}; {HINTS[status]}", "run", text)
        if status in (408, 409, 429) or not 400 <= status < 500:
            then = "pace" if status == 429 else "moment"
            return RequestError(kind, said, then, text, retry_after(headers))
        reason = f"{code} {error['message']}"
        if status == 413 or re.search(TOO_LONG, reason, re.IGNORECASE):
            return RequestError("context_exceeded", said, "row", text)
        if re.search(FILTERED, reason, re.IGNORECASE):
            return RequestError("content_filter", said, "row", text)
        refused = refused_parameter(error, body)
        if refused:
            return RequestError("refused_parameter", f"{said}; {advice(refused)}", "run", text)
        if re.search(WRONG_KEY, reason, re.IGNORECASE):
            return RequestError(kind, f"{said}; {KEY}", "run", text)
        if status == 403:
            said += f"; {KEY}"
        return RequestError(kind, said, "unclear", text)


def read_url(base_url: str) -> Any:
    """A base URL in its parts. Raises ValueError."""
    form = "http(s)://HOST[:PORT][/PATH][?QUERY], such as http://localhost:11434/v1"
    problem = ValueError(f"--base-url must be {form}; a key goes into --header 'NAME: $VARIABLE'")
    try:
        parts = urlsplit(base_url.strip())
        if parts.hostname:
            parts.hostname.encode("idna")  # raises as the connection would later
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        raise problem from None
    if base_url and (not good or "@" in parts.netloc):
        raise problem
    path = re.sub("/+$|/(chat/)?completions/*$", "", parts.path)
    return parts._replace(path=path, fragment="")


def find_proxy(scheme: str, place: str) -> str:
    """The proxy for a URL, or "". Raises ValueError for a proxy that is not HTTP's."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(scheme) or proxies.get("all") or ""
    if not proxy or urllib.request.proxy_bypass(place):
        return ""
    kind = proxy.rpartition("://")[0]
    if kind not in ("", "http", "https"):
        what = f"{kind} proxies are not supported, only http://[USER:PASSWORD@]HOST:PORT"
        raise ValueError(f"the environment names a proxy: {what}; NO_PROXY excepts hosts")
    return proxy if kind else f"http://{proxy}"


def read_whole(response: Any, until: float) -> bytes:
    """The body of a response, read before the time `until`. Raises TimeoutError, IncompleteRead."""
    parts = []
    while not parts or parts[-1]:
        parts.append(response.read1(1 << 16))
        if time.monotonic() > until:
            raise TimeoutError
    if response.length:  # read1() does not notice by itself
        raise IncompleteRead(b"".join(parts), response.length)
    return b"".join(parts)


def decode(raw: bytes, headers: Mapping[str, str]) -> str:
    """The text of a body, which some servers compress unasked."""
    coding = headers.get("Content-Encoding", "").lower()
    if coding in ("gzip", "x-gzip", "deflate"):
        try:
            raw = zlib.decompress(raw, wbits=47)
        except zlib.error:
            raw = zlib.decompress(raw, wbits=-15)
    elif coding not in ("", "identity"):
        raise HTTPException(f"the reply is compressed ({coding}) though that was not asked for")
    return raw.decode("utf-8-sig", "replace")


def read_content(content: Any) -> tuple[str, str]:
    """(text, thoughts) of a message's content, which is a text, null, or a list of parts."""
    if not isinstance(content, list):
        return whole_characters(content), ""
    text = ""
    thoughts = ""
    for part in content:
        said = part.get("text") or part.get("thinking") or part.get("reasoning")
        if re.search("think|reason", str(part.get("type"))):
            thoughts += read_content(said)[0]
        else:
            text += read_content(said)[0]
    return text, thoughts


def read_usage(content: dict) -> dict[str, int]:
    """{prompt, completion, cached}: tokens as the server counts them, else 0."""
    counts = {}
    for name, key in USAGE.items():
        value = content
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        counts[name] = value if type(value) is int and 0 <= value < 1e9 else 0
    return counts


def error_in(content: Any, text: str) -> dict[str, Any]:
    """The fields of an error in whatever form it came, "message" among them."""
    if isinstance(content, list) and content:
        content = content[0]  # as Gemini sends it
    error = content.get("error") or content if isinstance(content, dict) else content
    fields = error if isinstance(error, dict) else {}
    message = fields.get("message") or fields.get("detail") or error or text or "no message"
    return fields | {"message": one_line(message)[:300]}


def refused_parameter(error: dict[str, Any], body: dict) -> str:
    """The parameter of the request that an error says is not supported, or ""."""
    message = error["message"]
    if not re.search(UNSUPPORTED, f"{message} {error.get('code')}", re.IGNORECASE):
        return ""
    named = [str(error.get("param")), *re.findall(r"\w+", message.split(". ")[0])]
    if re.search("json_schema|structured output", message, re.IGNORECASE):
        named.append("response_format")
    for name in named:
        if name in body and name not in ("model", "messages", "prompt"):
            return name
    return ""


def advice(parameter: str) -> str:
    """How to leave a refused parameter out."""
    if parameter == "max_tokens":
        extra = '{"max_tokens": null, "max_completion_tokens": 1000}'
        return f"the server refuses max_tokens: --extra-body '{extra}' renames it"
    extra = json.dumps({parameter: None})
    return f"the server refuses {parameter}: --extra-body '{extra}' leaves it out"


def one_line(value: Any) -> str:
    """Anything from a server as one line, without control characters that a terminal would obey."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def whole_characters(text: Any) -> str:
    """A text without lone surrogates, which UTF-8 cannot hold. "" for what is no text."""
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a response asks to wait; Retry-After may be a date."""
    try:
        if headers.get("retry-after-ms"):
            return float(headers["retry-after-ms"]) / 1000
        value = headers.get("Retry-After", "")
        if value.replace(".", "").isdigit():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
