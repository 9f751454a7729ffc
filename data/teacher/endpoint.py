"""An OpenAI-compatible teacher, over HTTP or as batch files: a request, its reply, what each way of failing means.

    stop    nothing further can succeed: 401, 402, 404, a redirect, no quota, an unsupported parameter, a certificate
            that is not trusted, a Retry-After of more than two minutes
    denied  403: as `row` if the teacher answers other requests (some send it for what they will not read), else `stop`
    row     this row cannot succeed: the context exceeded, 413, 422, a content filter, another 4xx
    retry   the next attempt may: no connection, a reset, a timeout, 408, 409, 5xx, a reply that is cut off, is not
            JSON, is empty or ended in an error
    pace    429: the next attempt may, at a slower rate

Secrets go into headers and nowhere else: `hide` takes them out of what a server echoes.
"""

import base64
import email.utils
import functools
import json
import os
import re
import selectors
import ssl
import time
import urllib.request
from collections.abc import Iterable
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from data.files import parse_json

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
LONGEST_WAIT = 120  # seconds of Retry-After that are waited for
CONNECT = 30  # seconds for a connection to be made
LARGEST_REPLY = 32 << 20  # bytes
RAW = 20_000  # characters of a failed reply that are kept
CREDENTIAL = r"(?i)key|token|secret|auth|cookie|password|signature"  # in a name: what it holds must not be shown
KEY = "is the key right, and in the variable that --api-key-env names?"
HINTS = {401: KEY, 402: "nothing left to spend", 403: KEY, 404: "are --base-url, --endpoint and --model right?"}
REFUSED = "try --max-tokens-field max_completion_tokens, --no-stop, --temperature 1 or another --extra-body"
UNSUPPORTED = r"unsupported|not support|unrecogni[sz]ed|unknown|unexpected|not permitted|not allowed|extra inputs"
ROW_ERRORS = {  # in the code or the message of a status 4xx
    "context_exceeded": r"context.{0,20}(length|size|window)|maximum.{0,20}context|too many tokens|is too long",
    "content_filter": r"content_filter|content_policy|content management policy",
}


class RequestError(Exception):
    """Why there is no usable reply. `kind` is what it is counted as; `then` what follows from it, a word of the list
    above; `raw` what the server sent; `wait` the seconds of its Retry-After or None."""

    def __init__(self, kind: str, message: str, then: str, raw: str = "", wait: float | None = None):
        super().__init__(message)
        self.kind, self.then, self.raw, self.wait = kind, then, raw[:RAW], wait


class Reply(NamedTuple):
    text: str
    reasoning: str  # from a field of its own; "" where there is none
    cut_short: bool  # it ended at the token limit
    model: str  # that served it, as the server says
    usage: dict  # tokens: prompt, completion, cached (of the prompt)


class Response(HTTPResponse):
    """A response of which everything must come before the time `until`, or TimeoutError."""

    def __init__(self, sock, *args, until, **options):
        super().__init__(sock, *args, **options)
        receive = self.fp.raw.readinto

        def receive_in_time(buffer):
            if (left := until - time.monotonic()) <= 0:  # a server that never pauses, between interim replies say
                raise TimeoutError
            sock.settimeout(left)
            return receive(buffer)

        self.fp.raw.readinto = receive_in_time

    def _read_status(self):
        version, status, reason = super()._read_status()
        status = 100 if 100 <= status < 200 else status  # http.client skips 100 alone
        return version, status, reason


class Teacher:
    """An endpoint and, from the first request on, one keep-alive connection to it: for one thread."""

    def __init__(self, base_url: str, endpoint: str, key: str, headers: Iterable[str], timeout: float):
        """The arguments are those of the command line. Raises ValueError, which never quotes a secret."""
        self.endpoint, self.timeout, self.connection = endpoint, timeout, None
        self.headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "dss-extract"}
        self.headers |= {"Authorization": f"Bearer {key}"} if key else {}
        secrets = [key]
        for name, value, hidden in map(read_header, headers):
            self.headers = {n: v for n, v in self.headers.items() if n.lower() != name.lower()} | {name: value}
            secrets += hidden
        if " " in key or not all(re.fullmatch("[ -~]*", value) for value in self.headers.values()):
            raise ValueError("the key, or a header's value, has a space, a line end or another forbidden character")
        self.parts = parts = read_url(base_url)
        self.url = parts.geturl()
        proxy = urlsplit(urllib.request.getproxies().get(parts.scheme, ""))
        used = proxy.hostname and not urllib.request.proxy_bypass(parts.netloc)
        self.proxy, self.login = (proxy.hostname, proxy.port or 80) if used else None, {}
        if used and proxy.username:
            password = unquote(proxy.password or "")
            login = base64.b64encode(f"{unquote(proxy.username)}:{password}".encode()).decode()
            self.login = {"Proxy-Authorization": f"Basic {login}"}
            secrets += [password, login]
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        target = parts._replace(path=parts.path + PATHS[endpoint])
        self.target = target._replace(scheme="", netloc="").geturl()
        if self.proxy and not self.tls:  # such a proxy is told the whole URL
            self.target, self.headers = target.geturl(), self.headers | self.login
        # A stand-in for a key (EMPTY, ollama, anything) is a word, and to hide it would spoil texts.
        secrets = [text for text in secrets if len(text) >= 16 or len(text) >= 8 and re.search(r"\d", text)]
        self.secrets = sorted(secrets, key=len, reverse=True)  # the longest first: one may hold another

    def hide(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "[key]")
        return text

    def ask(self, body: dict, identity: str = "") -> Reply:
        """Send one request. Raises RequestError. (Its `identity` is for batch files, which are asked alike.)"""
        start = time.monotonic()
        kind, then = "disconnect", "retry"
        try:
            status, headers, content = self.exchange(json.dumps(body).encode(), start + self.timeout)
            return read_reply(status, headers, content.decode("utf-8", "replace"), body, self)
        except TimeoutError:
            kind, what = "timeout", f"no whole reply within {time.monotonic() - start:.3g} s (--timeout)"
        except ssl.SSLCertVerificationError as error:
            what = f"untrusted certificate ({error.verify_message}); SSL_CERT_FILE can name a file with those to trust"
            kind, then = "certificate", "stop"
        except IncompleteRead:
            what = "the reply was cut off"
        except (OSError, HTTPException) as error:
            what = self.hide(str(error) or type(error).__name__)
        self.close()  # a reply that comes later has nowhere to go
        raise RequestError(kind, f"{self.url}: {what}", then)

    def exchange(self, content, until):
        """(status, headers, body as bytes), all of it before the time `until` or TimeoutError."""
        if self.connection:
            with selectors.DefaultSelector() as selector:
                selector.register(self.connection.sock, selectors.EVENT_READ)
                if selector.select(0):  # nothing is expected, so the server has closed it (llama.cpp's does after 5 s)
                    self.close()
        if not self.connection:
            host, port = self.proxy or (self.parts.hostname, self.parts.port)
            kind, tls = (HTTPSConnection, {"context": self.tls}) if self.tls else (HTTPConnection, {})
            self.connection = kind(host, port, timeout=min(self.timeout, CONNECT), **tls)
            if self.tls and self.proxy:
                self.connection.set_tunnel(self.parts.hostname, self.parts.port or 443, self.login)
            try:
                self.connection.connect()
            except TimeoutError:  # which --timeout would not mend
                raise ConnectionError(f"no connection within {self.connection.timeout:g} s") from None
        self.connection.response_class = functools.partial(Response, until=until)
        self.connection.sock.settimeout(self.timeout)
        self.connection.request("POST", self.target, content, self.headers)
        response = self.connection.getresponse()
        body = response.read(LARGEST_REPLY + 1)
        if len(body) > LARGEST_REPLY:
            raise HTTPException(f"a reply of more than {LARGEST_REPLY >> 20} MB")
        if response.length:  # read() does not notice by itself
            raise IncompleteRead(b"")
        response.close()
        if response.will_close or not 200 <= response.status < 300:  # after an error nothing that follows is trusted
            self.close()
        return response.status, response.headers, body

    def close(self):
        if self.connection:
            self.connection.close()
        self.connection = None


class Replies:
    """The replies of batch files, in memory, asked for as a Teacher is. A line, in the form of OpenAI's batch API:

    {"custom_id": "ID-HASH", "response": {"status_code": 200, "body": {...}}, "error": null}
    """

    def __init__(self, paths: list[str], teacher: Teacher):
        """Raises OSError, or ValueError for a line that is no reply."""
        self.texts, self.teacher = {}, teacher  # custom id -> (status or, without a response, 0; the body's JSON)
        for path in paths:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    try:
                        row = parse_json(line, "a reply")
                        identity, response = row["custom_id"], row.get("response") or {"status_code": 0, "body": None}
                        status, text = int(response["status_code"]), json.dumps(response["body"])
                        if not isinstance(identity, str):
                            raise TypeError
                    except (ValueError, LookupError, TypeError, AttributeError):
                        what = 'not a reply of a batch, which has a "custom_id" and a "response"'
                        raise ValueError(f"{path}:{number}: {what}") from None
                    if identity not in self.texts or status == 200:  # no error hides an answer
                        self.texts[identity] = status, text

    def ask(self, body: dict, identity: str) -> Reply:
        """The reply to one request. Raises RequestError."""
        status, text = self.texts.get(identity, (0, ""))
        if not status:
            raise RequestError("missing", "the batch files have no reply", "retry")
        return read_reply(status, {}, text, body, self.teacher)


def read_url(base_url):
    """A base URL in its parts. Raises ValueError."""
    try:
        parts = urlsplit(base_url)
        good = parts.scheme in ("http", "https") and parts.hostname and not parts.fragment and "@" not in parts.netloc
        good = good and (parts.port or True) and parts.hostname.encode("idna")  # raises, as the socket would later
    except ValueError:
        good = False
    if base_url and not good:
        form = "http(s)://HOST[:PORT][/PATH][?QUERY], such as http://localhost:11434/v1"
        raise ValueError(f"--base-url must be {form}; a password or key goes into --header 'NAME: $VARIABLE'")
    if any(re.search(CREDENTIAL, name) for name, _ in parse_qsl(parts.query)):
        raise ValueError("--base-url must not hold a key; --header 'NAME: $VARIABLE' sends one")
    return parts._replace(path=re.sub("/+$|/(chat/)?completions/*$", "", parts.path))


def read_header(header):
    """`api-key: $AZURE_KEY` -> (name, value, [the secret in it])."""
    name, _, value = map(str.strip, header.partition(":"))
    if not value or not re.fullmatch(r"[\w-]+", name):
        raise ValueError("--header must be 'NAME: VALUE' or 'NAME: $VARIABLE'")
    variable = r"\$\{?(\w+)\}?"
    secrets = {v: os.environ.get(v, "").strip() for v in re.findall(variable, value)}
    looks_like_a_key = re.search(CREDENTIAL, name) or re.search(r"(?i)\b[sp]k-|\b(bearer|basic) |[\w+=-]{32}", value)
    if looks_like_a_key and not secrets:
        raise ValueError(f"--header {name}: a key must not stand on the command line; give '{name}: $VARIABLE'")
    for unset in [v for v, secret in secrets.items() if not secret]:
        raise ValueError(f"--header {name}: the environment variable {unset} is not set")
    return name, re.sub(variable, lambda match: secrets[match[1]], value), [*secrets.values()]


def read_reply(status: int, headers, text: str, body: dict, teacher: Teacher) -> Reply:
    """The reply that a response with `status` and the JSON `text` is. Raises RequestError for one that is none.

    body: the request, for the parameters in it that a server may refuse.
    """
    text = teacher.hide(text)
    try:  # half a character (a lone surrogate) can't be written to a file, and an escaped key must be hidden, too
        text = teacher.hide(json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8", "replace").decode())
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not 200 <= status < 300:
        raise status_error(status, headers, text, content, body, teacher)
    try:
        choice = content["choices"][0]
        message, where = (choice, "text") if teacher.endpoint == "completions" else (choice["message"], "content")
        said = message.get(where)
        finish, failed = shown(choice.get("finish_reason") or "stop").lower(), choice.get("error")
    except (LookupError, TypeError, AttributeError):
        what = "is not JSON" if content is None else "has no choices"
        raise RequestError("bad_reply", f"a reply {what}: {shown(text)[:100]!r}", "retry", text) from None
    if isinstance(said, list):  # content in parts
        said = "".join(str(part.get("text") or "") for part in said if isinstance(part, dict))
    if finish in ("content_filter", "safety") or message.get("refusal") and not said:
        raise RequestError("content_filter", "the teacher's content filter held the reply back", "row", text)
    cut_short = finish in ("length", "max_tokens")
    if failed or not (cut_short or finish.startswith(("stop", "eos", "end"))):
        why = shown(failed or f"finish_reason {finish}")[:200]
        raise RequestError("bad_reply", f"the reply ended in an error: {why}", "retry", text)
    usage = content.get("usage") if isinstance(content.get("usage"), dict) else {}
    details = usage.get("prompt_tokens_details")
    counts = {"prompt": usage.get("prompt_tokens"), "completion": usage.get("completion_tokens")}
    counts["cached"] = details.get("cached_tokens") if isinstance(details, dict) else 0
    counts = {name: n if type(n) is int and 0 <= n < 1e9 else 0 for name, n in counts.items()}
    texts = said, message.get("reasoning_content") or message.get("reasoning"), content.get("model")
    said, reasoning, model = (text if isinstance(text, str) else "" for text in texts)
    return Reply(said, reasoning.strip(), cut_short, model, counts)


def shown(value) -> str:
    """Anything from a server as one line for a terminal, which no control character in it may reach."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def status_error(status, headers, text, content, body, teacher):
    """The RequestError that a response with another status than 2xx means."""
    error = content.get("error", content) if isinstance(content, dict) else content or text
    fields = error if isinstance(error, dict) else {}
    message = shown(fields.get("message") or fields.get("detail") or error or "no message")[:300]
    said, kind, wait = f"{status} from {teacher.url}: {message}", f"http_{status}", retry_after(headers)
    code = f"{shown(fields.get('code'))} {shown(fields.get('type'))}"
    if 300 <= status < 400:
        where = teacher.hide(shown(headers.get("Location") or "nowhere").split("?")[0])
        return RequestError(kind, f"{status}: {teacher.url} redirects to {where}; use that as --base-url", "stop")
    if status == 402 or status == 429 and re.search(r"insufficient_quota|billing", code):
        kind, status = "insufficient_quota", 402
    if status in HINTS:
        return RequestError(kind, f"{said}; {HINTS[status]}", "denied" if status == 403 else "stop", text)
    if not (status in (408, 409, 429) or status >= 500):
        for row_kind, pattern in ROW_ERRORS.items():
            if re.search(pattern, f"{code} {message}", re.I):
                return RequestError(row_kind, said, "row", text)
        named = {shown(fields.get("param")), *re.findall(r"\w+", message.split(". ")[0])} & body.keys()
        refused = sorted(named - {"model", "messages", "prompt"})
        if status == 400 and refused and re.search(UNSUPPORTED, f"{code} {message}", re.I):
            return RequestError("unsupported", f"{said}; the server refuses {refused[0]}: {REFUSED}", "stop")
        return RequestError(kind, said, "row", text)
    if wait is not None and wait > LONGEST_WAIT:
        return RequestError(kind, f"{said}; it wants a pause of {wait:.0f} s; start again then", "stop")
    return RequestError(kind, said, "pace" if status == 429 else "retry", text, wait)


def retry_after(headers):
    """The seconds that a reply asks to wait, by retry-after-ms or Retry-After (seconds or a date), or None."""
    for name, scale in (("retry-after-ms", 1000), ("Retry-After", 1)):
        value = (headers.get(name) or "").strip()
        if re.fullmatch(r"\d+(\.\d+)?", value):
            return float(value) / scale
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return None
