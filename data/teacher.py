"""An OpenAI-compatible teacher over HTTP: a request, its reply, and what a failure means.

Every request has a connection of its own, so a reply cannot belong to another request. Proxies and
certificates are urllib's. Keys go into headers and nowhere else; `hide` removes them from what a
server says.
"""

import email.utils
import gzip
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
    r"unsupported|not support|deprecated|unrecogni[sz]ed|unknown|unexpected|not permitted"
    r"|not allowed|extra inputs|forbidden|invalid"
)
WRONG_URL = r"endpoint|route|not found"  # in the error of a reply with status 200
ROW_ERRORS = {  # in the code or the message of a status 4xx
    "context_exceeded": r"context.{0,20}(length|size|window)|maximum.{0,20}context|too many tokens"
    r"|too long|too large|longer than",
    "content_filter": r"content_filter|content_policy|content management policy|safety|moderation",
}
RENAMED = {"max_tokens": "max_completion_tokens"}


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

    def ending_run(self, why: str) -> "RequestError":
        return RequestError(self.kind, f"{self}; {why}", "run")


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
        """The arguments are those of the command line. Raises ValueError, which quotes no
        secret.
        """
        self.endpoint = endpoint
        self.timeout = timeout
        parts = read_url(base_url)
        self.url = parts._replace(query="").geturl()
        self.target = parts._replace(path=parts.path + PATHS[endpoint]).geturl()
        self.secrets = []
        self.headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "User-Agent": "dss-extract",
        }
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if key:
            self.add_header("Authorization", f"Bearer {key}", [key])
        for header in headers:
            self.add_header(*read_header(header))
        self.proxy = find_proxy(parts.scheme, parts.netloc)
        proxies = {parts.scheme: self.proxy} if self.proxy else {}
        self.opener = urllib.request.build_opener(
            NoRedirect,
            urllib.request.ProxyHandler(proxies),
            urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        )
        self.place = self.url
        if self.proxy:
            host = self.proxy.rpartition("@")[2].rpartition("/")[2]
            self.place = f"{self.url} through the proxy {host}"

    def add_header(self, name: str, value: str, secrets: Iterable[str]) -> None:
        if not value.isascii() or not value.isprintable() or any(" " in each for each in secrets):
            raise ValueError(f"the value of the header {name} has a character that cannot be sent")
        self.headers[name.title()] = value
        # Stand-ins for a key, such as EMPTY or ollama, are words that texts may have.
        self.secrets += [secret for secret in secrets if len(secret) >= 12]

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
        except (OSError, HTTPException) as error:
            problem = getattr(error, "reason", error)  # URLError has the system's error inside
        raise self.connection_error(problem)

    def connection_error(self, problem: object) -> RequestError:
        if isinstance(problem, TimeoutError):
            what = f"no whole reply within {self.timeout:g} s (--timeout)"
            return RequestError("timeout", f"{self.place}: {what}", "moment")
        if isinstance(problem, ssl.SSLCertVerificationError):
            what = f"untrusted certificate ({problem.verify_message})"
            what = f"{self.place}: {what}; SSL_CERT_FILE can name a file with those to trust"
            return RequestError("certificate", what, "run")
        if "Tunnel connection failed: 407" in str(problem):
            return RequestError("http_407", f"407 from {self.place}: {HINTS[407]}", "run")
        what = str(problem) or type(problem).__name__
        if isinstance(problem, IncompleteRead):
            what = "the reply was cut off"
        question = "is the proxy right?" if self.proxy else "is the teacher running there?"
        return RequestError("disconnect", f"{self.place}: {what}; {question}", "moment")

    def read(self, status: int, headers: Mapping[str, str], raw: bytes, body: dict) -> Reply:
        """The reply in a response. Raises RequestError. body: the request, whose parameters may be
        refused.
        """
        text = self.hide(decode(raw, headers))
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        if not 200 <= status < 300:
            raise self.status_error(status, headers, text, content, body)
        if not isinstance(content, dict) or not content.get("choices"):
            raise self.no_choices(headers, text, content, body)
        try:
            choice = content["choices"][0]
            message = choice if self.endpoint == "completions" else choice["message"]
            said, thoughts = read_content(message.get("text" if message is choice else "content"))
            field = message.get("reasoning_content") or message.get("reasoning") or ""
        except (LookupError, TypeError, AttributeError):
            raise self.bad_reply("has no message", text) from None
        finish = check_finish(choice, message, said or thoughts or field, text)
        return Reply(
            text=whole_characters(said),
            reasoning=whole_characters(field or thoughts).strip(),
            cut_short=bool(re.search(r"length|max_?(output_)?tokens", finish)),
            model=whole_characters(content.get("model")),
            usage=read_usage(content.get("usage")),
        )

    def bad_reply(self, what: str, text: str, then: str = "moment") -> RequestError:
        shown = one_line(text)[:100]
        return RequestError("bad_reply", f"{self.place}: a reply {what}: {shown!r}", then, text)

    def no_choices(
        self, headers: Mapping[str, str], text: str, content: Any, body: dict
    ) -> RequestError:
        """The error that a reply of status 200 without an answer means."""
        if re.match(r"(event: \w+\s+)?data: ", text) or "data: [DONE]" in text:
            return self.bad_reply('is a stream, though "stream": false was asked for', text, "run")
        if content is None:
            return self.bad_reply("is not JSON", text)
        error = error_fields(content)
        if "error" not in (content if isinstance(content, dict) else {}):
            return self.bad_reply("has no choices", text)
        code = str(error.get("code") or error.get("status") or "")
        if re.fullmatch(r"[45]\d\d", code):
            return self.status_error(int(code), headers, text, content, body)
        if re.search(WRONG_URL, error["message"], re.IGNORECASE):
            return self.status_error(404, headers, text, content, body)
        return self.bad_reply("is an error", text)

    def status_error(
        self, status: int, headers: Mapping[str, str], text: str, content: Any, body: dict
    ) -> RequestError:
        """The error that a response with another status than 2xx means."""
        error = error_fields(content if content is not None else text)
        message = error["message"]
        said = f"{status} from {self.place}: {message}"
        code = one_line(
            f"{error.get('code', '')} {error.get('type', '')} {error.get('status', '')}"
        )
        if 300 <= status < 400:
            place = self.hide(one_line(headers.get("Location") or "nowhere").split("?")[0])
            said = f"{status}: {self.place} redirects to {place}; use that as --base-url"
            return RequestError(f"http_{status}", said, "run")
        if status == 402 or (status == 429 and re.search("insufficient_quota|billing", code)):
            return RequestError("insufficient_quota", f"{said}; {HINTS[402]}", "run")
        if status in (401, 404, 407):
            return RequestError(f"http_{status}", f"{said}; {HINTS[status]}", "run", text)
        if status in (408, 409, 429) or status < 200 or status >= 500:
            then = "pace" if status == 429 else "moment"
            return RequestError(f"http_{status}", said, then, text, retry_after(headers))
        for kind, pattern in ROW_ERRORS.items():
            if status == 413 or re.search(pattern, f"{code} {message}", re.IGNORECASE):
                return RequestError(kind, said, "row", text)
        refused = refused_parameter(error, body)
        if refused:
            return RequestError("refused_parameter", f"{said}; {advice(refused)}", "run", text)
        if re.search(WRONG_KEY, f"{code} {message}", re.IGNORECASE):
            return RequestError(f"http_{status}", f"{said}; {KEY}", "run", text)
        hint = f"; {HINTS[403]}" if status == 403 else ""
        return RequestError(f"http_{status}", said + hint, "unclear", text)


def read_url(base_url: str) -> Any:
    """A base URL in its parts. Raises ValueError."""
    base_url = base_url.strip()
    try:
        parts = urlsplit(base_url)
        good = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
        if good:
            parts.hostname.encode("idna")  # raises as the connection would later
            good = parts.port != 0
    except ValueError:
        good = False
    if base_url and not good:
        form = "http(s)://HOST[:PORT][/PATH][?QUERY], such as http://localhost:11434/v1"
        raise ValueError(f"--base-url must be {form}; a key goes into --header 'NAME: $VARIABLE'")
    path = re.sub("/+$|/(chat/)?completions/*$", "", parts.path)
    return parts._replace(path=path, fragment="")


def read_header(header: str) -> tuple[str, str, list[str]]:
    """`api-key: $AZURE_KEY` -> (name, value, [the secrets in it])."""
    name, _, value = header.partition(":")
    name = name.strip()
    value = value.strip()
    if not value or not re.fullmatch(r"[\w-]+", name):
        raise ValueError("--header must be 'NAME: VALUE' or 'NAME: $VARIABLE'")
    secrets = []
    for variable in re.findall(r"\$\{?(\w+)\}?", value):
        secret = os.environ.get(variable, "").strip()
        if not secret:
            raise ValueError(f"--header {name}: the environment variable {variable} is not set")
        value = re.sub(rf"\$\{{?{variable}\b\}}?", lambda _, secret=secret: secret, value)
        secrets.append(secret)
    return name, value, secrets


def find_proxy(scheme: str, place: str) -> str:
    """The proxy for a URL, "" if there is none. Raises ValueError for a proxy that is not
    HTTP's.
    """
    proxies = urllib.request.getproxies()
    proxy = proxies.get(scheme) or proxies.get("all") or ""
    if not proxy or urllib.request.proxy_bypass(place):
        return ""
    kind, separator, _ = proxy.rpartition("://")
    if kind not in ("", "http", "https"):
        what = f"{kind} proxies are not supported, only http://[USER:PASSWORD@]HOST:PORT"
        raise ValueError(
            f"the environment names a proxy for {scheme}: {what}; NO_PROXY excepts hosts"
        )
    return proxy if separator else f"http://{proxy}"


def read_whole(response: Any, until: float) -> bytes:
    """The body of a response. Raises TimeoutError after the time `until`, IncompleteRead if it
    breaks off.
    """
    parts = []
    while True:
        part = response.read1(1 << 16)
        if not part:
            break
        parts.append(part)
        if time.monotonic() > until:
            raise TimeoutError
    if response.length:  # read1() does not notice by itself
        raise IncompleteRead(b"")
    return b"".join(parts)


def decode(raw: bytes, headers: Mapping[str, str]) -> str:
    """The text of a body, which some servers compress unasked."""
    coding = (headers.get("Content-Encoding") or "").lower()
    try:
        if coding in ("gzip", "x-gzip"):
            raw = gzip.decompress(raw)
        elif coding == "deflate":
            raw = zlib.decompress(raw, zlib.MAX_WBITS if raw[:1] == b"x" else -zlib.MAX_WBITS)
    except (OSError, EOFError, zlib.error):
        raise HTTPException(f"the reply is not the {coding} that it says it is") from None
    return raw.decode("utf-8-sig", "replace")


def read_content(content: Any) -> tuple[str, str]:
    """(text, thoughts) of a message's content, which is a text, null, or a list of parts."""
    if not isinstance(content, list):
        return (content if isinstance(content, str) else ""), ""
    texts = []
    thoughts = []
    for part in content:
        kind = str(part.get("type"))
        said = part.get("text") or part.get("thinking") or part.get("reasoning")
        text = read_content(said)[0]
        if re.search("think|reason", kind):
            thoughts.append(text)
        else:
            texts.append(text)
    return "".join(texts), "".join(thoughts)


def check_finish(choice: dict, message: dict, said: str, raw: str) -> str:
    """The finish reason in small letters. Raises RequestError for one that leaves no answer."""
    finish = one_line(choice.get("finish_reason") or "stop").lower()
    error = choice.get("error")
    if error or re.search(r"error|abort|cancel|fail|insufficient|overload", finish):
        why = one_line(error or f"finish_reason {finish}")[:200]
        raise RequestError("bad_reply", f"the reply ended in an error: {why}", "moment", raw)
    filtered = re.search(
        r"filter|safety|recitation|prohibit|sensitive|blocklist|spii|refus", finish
    )
    refusal = message.get("refusal")
    usual = re.match(r"stop|eos|end|complete|null|none|length|.*max", finish)
    if filtered or (not said and (refusal or not usual)):
        why = one_line(refusal or f"finish_reason {finish}")[:200]
        raise RequestError("content_filter", f"the teacher held the reply back: {why}", "row", raw)
    return finish


def read_usage(usage: Any) -> dict[str, int]:
    """{prompt, completion, cached}: the tokens that a server counted, 0 where it says nothing
    sensible.
    """
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    details = details if isinstance(details, dict) else {}
    counts = {
        "prompt": usage.get("prompt_tokens"),
        "completion": usage.get("completion_tokens"),
        "cached": details.get("cached_tokens"),
    }
    for name, count in counts.items():
        if type(count) is not int or not 0 <= count < 1e9:
            counts[name] = 0
    return counts


def error_fields(content: Any) -> dict[str, Any]:
    """The fields of an error in whatever form it came, "message" among them."""
    if isinstance(content, list) and content:
        content = content[0]  # as Gemini sends it
    error = content
    if isinstance(content, dict) and content.get("error"):
        error = content["error"]
    fields = dict(error) if isinstance(error, dict) else {}
    message = fields.get("message") or fields.get("detail") or error or "no message"
    fields["message"] = one_line(message)[:300]
    return fields


def refused_parameter(error: dict[str, Any], body: dict) -> str:
    """The parameter of the request that an error says is not supported, or ""."""
    message = error["message"]
    if not re.search(UNSUPPORTED, f"{message} {error.get('code')}", re.IGNORECASE):
        return ""
    words = re.findall(r"\w+", message.split(". ")[0])
    named = [one_line(error.get("param") or ""), *words]
    for name in named:
        if name in body and name not in ("model", "messages", "prompt"):
            return name
    return ""


def advice(parameter: str) -> str:
    """How to leave a refused parameter out."""
    value = {parameter: None}
    if parameter in RENAMED:
        text = json.dumps(value)[:-1] + f', "{RENAMED[parameter]}": 1000}}'
        return f"the server refuses {parameter}: --extra-body '{text}' renames it"
    return f"the server refuses {parameter}: --extra-body '{json.dumps(value)}' leaves it out"


def one_line(value: Any) -> str:
    """Anything from a server as one line, without control characters that a terminal would obey."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def whole_characters(text: Any) -> str:
    """A text without lone surrogates, which UTF-8 cannot hold. "" for what is no text."""
    if not isinstance(text, str):
        return ""
    return text.encode("utf-8", "replace").decode()


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a response asks to wait, by retry-after-ms or Retry-After (seconds or a
    date).
    """
    for name, scale in (("retry-after-ms", 1000), ("Retry-After", 1)):
        value = (headers.get(name) or "").strip()
        if re.fullmatch(r"\d+(\.\d+)?", value):
            return float(value) / scale
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return None
