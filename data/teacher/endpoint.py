"""An OpenAI-compatible teacher over HTTP: one request, its reply, and what each way of failing means.

    stop    nothing further can succeed: 401, 402, 404, a redirect, no quota, an unsupported parameter, a certificate
            that is not trusted, a Retry-After of more than two minutes
    denied  403: as `row` if the teacher answers other requests (some send it for what they will not read), else `stop`
    row     this row cannot succeed: the context exceeded, 413, 422, a content filter, another 4xx
    retry   the next attempt may: no connection, a reset, a timeout, 408, 409, 5xx, a reply that is cut off, is not
            JSON, is empty or ended in an error
    pace    429: so it may, but later

Secrets go into headers and nowhere else: `hide` takes them out of whatever a server echoes.
"""

import base64
import email.utils
import functools
import http.client
import io
import json
import os
import re
import selectors
import ssl
import time
import urllib.request
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

LONGEST_WAIT = 120  # seconds of Retry-After that are waited for
CONNECT = 30  # seconds for a connection to be made
LARGEST_REPLY = 32 << 20  # bytes
RAW = 20_000  # characters of a failed reply that are kept
CREDENTIAL = r"(?i)key|token|secret|auth|cookie|password|signature"  # in a name: what it holds must not be shown
FLAGS = {  # what to do about a parameter that the server refuses
    "max_tokens": "--max-tokens-field max_completion_tokens",
    "max_completion_tokens": "--max-tokens-field max_tokens",
    "stop": "--no-stop",
    "temperature": "--temperature 1",
    "top_p": "a command line without --top-p",
    "seed": "a command line without --seed",
}
UNSUPPORTED = r"unsupported|not support|unrecogni[sz]ed|unknown|unexpected|not permitted|not allowed|extra inputs"
CONTEXT = r"context.{0,20}(length|size|window)|too many tokens|(prompt|input) is too long|maximum.{0,20}context"


class RequestError(Exception):
    """Why there is no usable reply. `kind` is what it is counted as; `then` what follows from it, a word of the list
    above; `raw` what the server sent; `wait` the seconds of its Retry-After or None."""

    def __init__(self, kind: str, message: str, then: str, raw: str = "", wait: float | None = None):
        super().__init__(message)
        self.kind, self.then, self.raw, self.wait = kind, then, raw[:RAW], wait


@dataclass(frozen=True)
class Reply:
    text: str
    reasoning: str  # from a field of its own; "" where there is none
    cut_short: bool  # it ended at the token limit
    model: str  # that served it, as the server says
    usage: dict  # tokens: prompt, completion, cached
    seconds: float


@dataclass(frozen=True)
class Address:
    """Where the teacher is: `url` is shown and recorded, `headers` and `proxy` hold the secrets."""

    url: str
    endpoint: str  # "chat" | "completions"
    headers: dict
    secrets: tuple  # texts that must appear nowhere
    timeout: float  # seconds for a whole reply
    proxy: tuple | None = None  # (host, port, headers for it)
    tls: ssl.SSLContext | None = None

    def hide(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "[key]")
        return text


def make_address(base_url: str, endpoint: str, key: str, headers: list[str], timeout: float) -> Address:
    """The Address of a base URL, or of none. Raises ValueError, which never quotes a secret."""
    sent = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "dss-extract"}
    secrets = [key]
    if key:
        sent["Authorization"] = f"Bearer {key}"
    for header in headers:
        name, value, hidden = read_header(header)
        sent = {n: v for n, v in sent.items() if n.casefold() != name.casefold()} | {name: value}
        secrets += hidden
    if not all(re.fullmatch(r"[ -~]*", value) for value in sent.values()) or " " in key:
        raise ValueError(
            "the key, or a header's value, has a space, a line end or another character that cannot be sent"
        )
    try:
        parts = urlsplit(base_url)
        good = parts.scheme in ("http", "https") and parts.hostname and not parts.fragment and "@" not in parts.netloc
        (parts.hostname or "").encode("idna")  # as the socket will; http://a..b is refused here, not in a worker
        parts.port  # noqa: B018  raises for a port that is none
    except ValueError:
        good = False
    if base_url and not good:
        raise ValueError(
            "--base-url must be http(s)://HOST[:PORT][/PATH][?QUERY], such as http://localhost:11434/v1; a password "
            "or key goes into --header 'NAME: $VARIABLE'"
        )
    if any(re.search(CREDENTIAL, name) for name, _ in parse_qsl(parts.query)):
        raise ValueError("--base-url must not hold a key; --header 'NAME: $VARIABLE' sends one")
    path = parts.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/completions")
    url = parts._replace(path=path).geturl() if base_url else ""
    proxy = None
    where = urlsplit(urllib.request.getproxies().get(parts.scheme, ""))
    if base_url and where.hostname and not urllib.request.proxy_bypass(parts.netloc):
        password = unquote(where.password or "")
        login = base64.b64encode(f"{unquote(where.username or '')}:{password}".encode()).decode()
        secrets += [password, login]
        proxy = (where.hostname, where.port or 80, {"Proxy-Authorization": f"Basic {login}"} if where.username else {})
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    secrets += [json.dumps(secret)[1:-1] for secret in secrets]  # as a line of JSON has them
    return Address(
        url, endpoint, sent, tuple(sorted(filter(is_secret, set(secrets)), key=len, reverse=True)), timeout, proxy, tls
    )


def read_header(header):
    """`api-key: $AZURE_KEY` -> (name, value, [the secret in it])."""
    name, colon, value = header.partition(":")
    name, value = name.strip(), value.strip()
    if not colon or not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name):
        raise ValueError("--header must be 'NAME: VALUE' or 'NAME: $VARIABLE'")
    variables = re.findall(r"\$\{?(\w+)\}?", value)
    if not variables and re.search(rf"{CREDENTIAL}|\b(sk|pk)-|\b(Bearer|Basic) |[\w+/=-]{{32}}", f"{name} {value}"):
        raise ValueError(f"--header {name}: a key must not stand on the command line; give '{name}: $VARIABLE'")
    for variable in variables:
        if not os.environ.get(variable, "").strip():
            raise ValueError(f"--header {name}: the environment variable {variable} is not set")
    hidden = [os.environ[variable].strip() for variable in variables]
    return name, re.sub(r"\$\{?(\w+)\}?", lambda match: os.environ[match[1]].strip(), value), hidden


def is_secret(text):
    """Whether a text looks like a key: a stand-in (EMPTY, ollama, anything) is one word, and hiding it spoils texts."""
    return len(text) >= 16 or len(text) >= 8 and bool(re.search(r"\d", text))


class Timed(io.RawIOBase):
    """What a socket receives, all of it before the time `until`, or TimeoutError."""

    def __init__(self, sock, until):
        self.sock, self.until, self.stream = sock, until, sock.makefile("rb", buffering=0)

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(left)
        return self.stream.readinto(buffer)

    def close(self):
        self.stream.close()
        super().close()


class Response(http.client.HTTPResponse):
    """A response that must be there before `until`, and before which a server may send any interim one: http.client
    skips 100 alone, and takes a 102 or 103 for the reply."""

    def __init__(self, sock, *args, until, **options):
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(Timed(sock, until))

    def _read_status(self):
        version, status, reason = super()._read_status()
        return version, 100 if 100 <= status < 200 else status, reason


class Teacher:
    """One keep-alive connection, for one thread."""

    def __init__(self, address: Address):
        self.address, self.connection, self.parts = address, None, urlsplit(address.url)
        path = self.parts.path + ("/chat/completions" if address.endpoint == "chat" else "/completions")
        self.path = f"{path}?{self.parts.query}" if self.parts.query else path
        self.headers = address.headers
        if address.proxy and not address.tls:  # to a proxy the path of a plain request is the whole URL
            self.path = f"http://{self.parts.netloc}{self.path}"
            self.headers = address.headers | address.proxy[2]

    def ask(self, body: dict) -> Reply:
        """Send one request. Raises RequestError."""
        start = time.monotonic()
        try:
            status, headers, content = self.exchange(json.dumps(body).encode(), start + self.address.timeout)
        except TimeoutError:
            self.close()  # a reply that comes later has nowhere to go
            waited = f"{time.monotonic() - start:.3g} s (--timeout {self.address.timeout:g})"
            raise RequestError("timeout", f"{self.address.url}: no whole reply within {waited}", "retry") from None
        except ssl.SSLCertVerificationError as error:
            what = (
                f"its certificate is not trusted ({error.verify_message}); SSL_CERT_FILE names a file of those that are"
            )
            raise RequestError("certificate", f"{self.address.url}: {what}", "stop") from None
        except (OSError, http.client.HTTPException) as error:
            self.close()
            what = "the reply was cut off" if isinstance(error, http.client.IncompleteRead) else str(error)
            what = self.address.hide(what or type(error).__name__)
            raise RequestError("disconnect", f"{self.address.url}: {what}", "retry") from None
        return read_reply(
            status, headers, content.decode("utf-8", "replace"), body, self.address, time.monotonic() - start
        )

    def exchange(self, content, until):
        """(status, headers, body as bytes), all of it before the time `until` or TimeoutError."""
        if self.connection is not None and dropped(self.connection.sock):
            self.close()
        if self.connection is None:
            self.connect(until)
        self.connection.response_class = functools.partial(Response, until=until)
        self.connection.sock.settimeout(max(until - time.monotonic(), 0.001))
        self.connection.request("POST", self.path, content, self.headers)
        response = self.connection.getresponse()
        body = response.read(LARGEST_REPLY + 1)
        if len(body) > LARGEST_REPLY:
            raise http.client.HTTPException(f"a reply of more than {LARGEST_REPLY >> 20} MB")
        if response.length:  # read() does not notice by itself
            raise http.client.IncompleteRead(b"")
        response.close()
        if response.will_close or not 200 <= response.status < 300:  # after an error nothing that follows is trusted
            self.close()
        return response.status, response.headers, body

    def connect(self, until):
        host, port, headers = self.address.proxy or (self.parts.hostname, self.parts.port, {})
        timeout = min(self.address.timeout, CONNECT)
        if self.address.tls:
            self.connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=self.address.tls)
            if self.address.proxy:
                self.connection.set_tunnel(self.parts.hostname, self.parts.port or 443, headers)
        else:
            self.connection = http.client.HTTPConnection(host, port, timeout=timeout)
        self.connection.response_class = functools.partial(Response, until=until)
        try:
            self.connection.connect()
        except TimeoutError:
            raise ConnectionError(f"no connection within {timeout:g} s") from None

    def close(self):
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def dropped(sock):
    """Whether the server has closed a connection that lay idle (llama.cpp's does after 5 s)."""
    if sock is None:
        return True
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))  # nothing is expected, so what can be read is the end


def read_reply(status: int, headers, text: str, body: dict, address: Address, seconds: float = 0.0) -> Reply:
    """The reply that a response with `status` and the JSON `text` is. Raises RequestError for one that is none.

    body: the request, for the parameters in it that a server may refuse.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not 200 <= status < 300:
        raise status_error(status, headers, address.hide(text), content, body, address)
    try:
        choice = content["choices"][0]
        message = choice if address.endpoint == "completions" else choice["message"]
        said = message.get("text" if address.endpoint == "completions" else "content")
        finish = shown(choice.get("finish_reason") or "stop").lower()
        failed = choice.get("error")
    except (LookupError, TypeError, AttributeError):
        what = "is not JSON" if content is None else "has no choices"
        raise bad_reply(f"a reply with status 200 {what}: {shown(text)[:100]!r}", text, address) from None
    if isinstance(said, list):  # content in parts
        said = "".join(str(part.get("text") or "") for part in said if isinstance(part, dict))
    if finish in ("content_filter", "safety") or message.get("refusal") and not said:
        why = "the teacher's content filter held the reply back"
        raise RequestError("content_filter", why, "row", address.hide(text))
    cut_short = finish in ("length", "max_tokens")
    if failed or not (cut_short or finish.startswith(("stop", "eos", "end"))):
        why = f"the reply ended in an error: {shown(failed or 'finish_reason ' + finish)[:200]}"
        raise bad_reply(why, text, address)
    said, thoughts = whole(said), whole(message.get("reasoning_content") or message.get("reasoning"))
    usage = content.get("usage")
    return Reply(
        text=address.hide(said),
        reasoning=address.hide(thoughts).strip(),
        cut_short=cut_short,
        model=address.hide(whole(content.get("model"))),
        usage={
            "prompt": count(usage, "prompt_tokens"),
            "completion": count(usage, "completion_tokens"),
            "cached": count(usage, "prompt_tokens_details", "cached_tokens"),
        },
        seconds=seconds,
    )


def bad_reply(message, text, address):
    return RequestError("bad_reply", address.hide(message), "retry", address.hide(text))


def count(value, *path):
    """A number of tokens somewhere in a reply's `usage`; 0 where there is none that makes sense."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if type(value) is int and 0 <= value < 1e9 else 0


def whole(text):
    """A text that UTF-8 can write: JSON may hold half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""


def shown(value):
    """Anything from a server as one line that a terminal can be given: without control characters."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = "..."
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def status_error(status, headers, text, content, body, address):
    """The RequestError that a response with another status than 2xx means."""
    error = content.get("error", content) if isinstance(content, dict) else content or text
    fields = error if isinstance(error, dict) else {}
    code = f"{shown(fields.get('code'))} {shown(fields.get('type'))}"
    message = address.hide(shown(fields.get("message") or fields.get("detail") or error or "no message"))[:300]
    said, kind, wait = f"{status} from {address.url}: {message}", f"http_{status}", retry_after(headers)
    if 300 <= status < 400:
        where = address.hide(shown(headers.get("Location") or "nowhere").split("?")[0])
        return RequestError(kind, f"{status}: {address.url} redirects to {where}; use that as --base-url", "stop")
    if status in (401, 403):
        what = f"{said}; is the key right, and in the variable that --api-key-env names?"
        return RequestError(kind, what, "stop" if status == 401 else "denied", text)
    if status == 404:
        return RequestError(kind, f"{said}; are --base-url, --endpoint and --model right?", "stop")
    if status == 402 or status == 429 and re.search(r"insufficient_quota|billing", code):
        return RequestError("insufficient_quota", f"{said}; the account has nothing left to spend", "stop")
    if re.search("context_length|exceed_context", code) or status == 400 and re.search(CONTEXT, message, re.I):
        return RequestError("context_exceeded", said, "row", text)
    if re.search("content_filter|content_policy", code) or status == 400 and "content management policy" in message:
        return RequestError("content_filter", said, "row", text)
    if status == 400 and re.search(UNSUPPORTED, f"{code} {message}", re.I):
        named = {shown(fields.get("param"))} | set(re.findall(r"\w+", message.split(". ")[0]))
        for name in [n for n in body if n in named and n not in ("model", "messages", "prompt")]:
            flag = FLAGS.get(name, "another --extra-body")
            return RequestError("unsupported", f"{said}; the server refuses {name}: use {flag}", "stop")
    if (status in (408, 409, 429) or status >= 500) and wait is not None and wait > LONGEST_WAIT:
        return RequestError(kind, f"{said}; it wants a pause of {wait:.0f} s; start again then", "stop")
    then = "pace" if status == 429 else "retry" if status in (408, 409) or status >= 500 else "row"
    return RequestError(kind, said, then, text, wait)


def retry_after(headers):
    """The seconds that a reply asks to wait, from retry-after-ms or Retry-After (seconds or a date), or None."""
    for name, scale in (("retry-after-ms", 1000), ("Retry-After", 1)):
        value = (headers.get(name) or "").strip()
        if re.fullmatch(r"\d+(\.\d+)?", value):
            return float(value) / scale
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return None
