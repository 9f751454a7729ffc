"""An OpenAI-compatible teacher over HTTP: one request, its reply, and what each way of failing means.

    stop    nothing further can succeed: 401, 402, 403, 404, a redirect, no quota, an unsupported parameter, a
            Retry-After of more than two minutes
    row     this row cannot succeed: the context exceeded, 413, 422, a content filter, another 4xx
    retry   the next attempt may: 408, 409, 429, 5xx, no connection, a reset, a timeout, a reply that is cut off, is not
            JSON or has no choices

The pause between attempts, the limit of requests a minute and a Retry-After, which holds for all workers, are `Pace`.
The key goes into one header and nowhere else: `hide` takes it out of whatever a server echoes.
"""

import base64
import email.utils
import http.client
import json
import random
import re
import selectors
import threading
import time
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

LONGEST_WAIT = 120  # seconds of Retry-After that are waited for
CONNECT = 30  # seconds for a connection to be made
LARGEST_REPLY = 32 << 20  # bytes
SECRET = 8  # characters; a shorter "key" (EMPTY, ollama, x) is a stand-in, and hiding it would spoil texts
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


class Problem(Exception):
    """Why there is no usable reply. `kind` is what it is counted as, `then` is "stop", "row" or "retry"; `raw` is what
    the server sent, `wait` the seconds of its Retry-After or None."""

    def __init__(self, kind, message, then, raw="", wait=None):
        super().__init__(message)
        self.kind, self.then, self.raw, self.wait = kind, then, raw, wait


class Stopped(Exception):
    """The run is ending: ask no more."""


@dataclass(frozen=True)
class Reply:
    text: str
    reasoning: str  # from a field of its own; "" where there is none
    finish: str  # "stop", "length", ...
    model: str  # that served it, as the server says
    usage: dict  # tokens: prompt, completion, cached
    seconds: float


@dataclass(frozen=True)
class Address:
    """Where the teacher is: `url` is shown and recorded, `headers` hold the secrets."""

    url: str  # without user and password
    endpoint: str  # "chat" | "completions"
    headers: dict
    secrets: tuple  # texts that must appear nowhere
    timeout: float  # seconds for a whole reply

    def hide(self, text):
        for secret in self.secrets:
            text = text.replace(secret, "[key]")
        return text


def make_address(base_url, endpoint, key, timeout):
    """The Address of a base URL, or of none. Raises ValueError, which never quotes a secret."""
    if not base_url:
        return Address("", endpoint, {}, (), timeout)
    parts = urlsplit(base_url)
    try:
        good = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
        port = parts.port
        (parts.hostname or "").encode("idna")  # as the socket will; http://a..b is refused here, not in a worker
    except ValueError:
        good = False
    if not good:
        raise ValueError("--base-url must be http(s)://HOST[:PORT][/PATH], such as http://localhost:11434/v1")
    if key and not re.fullmatch(r"[!-~]+", key):
        raise ValueError("the key has a space, a line end or another character in it that no key has")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    url = f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path.rstrip('/')}"
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "dss-extract"}
    secrets = [key or "", unquote(parts.password or ""), parts.password or ""]
    if key:
        headers["Authorization"] = f"Bearer {key}"
    elif parts.username:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        secrets.append(base64.b64encode(pair.encode()).decode())
        headers["Authorization"] = f"Basic {secrets[-1]}"
    secrets += [json.dumps(secret)[1:-1] for secret in secrets]  # as a line of JSON has them
    longest_first = sorted({s for s in secrets if len(s) >= SECRET}, key=len, reverse=True)
    return Address(url, endpoint, headers, tuple(longest_first), timeout)


class Teacher:
    """One keep-alive connection, for one thread."""

    def __init__(self, address):
        self.address, self.connection = address, None
        parts = urlsplit(address.url)
        self.kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.host, self.port = parts.hostname, parts.port
        self.path = parts.path + ("/chat/completions" if address.endpoint == "chat" else "/completions")

    def ask(self, body):
        """One request, a dict -> Reply. Raises Problem."""
        start = time.monotonic()
        try:
            status, headers, content = self.exchange(json.dumps(body).encode(), start + self.address.timeout)
        except TimeoutError:
            self.close()  # a reply that comes later has nowhere to go
            waited = f"{time.monotonic() - start:.3g} s (--timeout {self.address.timeout:g})"
            raise Problem("timeout", f"{self.address.url}: no whole reply within {waited}", "retry") from None
        except http.client.IncompleteRead:
            self.close()
            raise Problem("disconnect", "the reply was cut off", "retry") from None
        except (OSError, http.client.HTTPException) as problem:
            self.close()
            what = str(problem) or type(problem).__name__
            raise Problem("disconnect", f"{self.address.url}: {self.address.hide(what)}", "retry") from None
        text = self.address.hide(content.decode("utf-8", "replace"))
        if not 200 <= status < 300:
            raise classify(status, headers, text, body, self.address)
        return read_reply(text, self.address, time.monotonic() - start)

    def exchange(self, content, deadline):
        """(status, headers, body as bytes), all of it before `deadline` or TimeoutError."""
        if self.connection is not None and dropped(self.connection.sock):
            self.close()
        if self.connection is None:
            self.connection = self.kind(self.host, self.port, timeout=min(self.address.timeout, CONNECT))
            self.connection.connect()
        sock = self.connection.sock
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        self.connection.request("POST", self.path, content, self.address.headers)
        response = self.connection.getresponse()
        chunks, size = [], 0
        while True:
            if response.isclosed():  # read to its end, and with "Connection: close" the socket is gone, too
                break
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            chunk = response.read1(1 << 16)
            if not chunk:
                break
            chunks.append(chunk)
            size += len(chunk)
            if size > LARGEST_REPLY:
                raise http.client.HTTPException(f"a reply of more than {LARGEST_REPLY >> 20} MB")
        if response.length:  # read1 does not notice by itself
            raise http.client.IncompleteRead(b"")
        response.close()  # read1 leaves it open at its end, and an open one blocks the connection
        if response.will_close:
            self.close()
        return response.status, response.headers, b"".join(chunks)

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


def read_reply(text, address, seconds):
    """The text of a 200 -> Reply. Raises Problem for one without choices, or a content filter's."""
    try:
        reply = json.loads(text)
        choice = reply["choices"][0]
        message = choice if address.endpoint == "completions" else choice["message"]
        content = message.get("text" if address.endpoint == "completions" else "content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        what = "has no choices" if text.lstrip().startswith("{") else "is not JSON"
        start = " ".join(text.split())[:100]
        raise Problem("bad_reply", f"a reply with status 200 {what}: {start!r}", "retry", text) from None
    if isinstance(content, list):  # content in parts
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    finish = str(choice.get("finish_reason") or "")
    if finish == "content_filter" or (message.get("refusal") and not content):
        raise Problem("content_filter", "the teacher's content filter held the reply back", "row", text)
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
    details = usage.get("prompt_tokens_details") if isinstance(usage.get("prompt_tokens_details"), dict) else {}
    counts = {
        "prompt": usage.get("prompt_tokens"),
        "completion": usage.get("completion_tokens"),
        "cached": details.get("cached_tokens"),
    }
    return Reply(
        text=address.hide(whole(content)),
        reasoning=address.hide(whole(reasoning)),
        finish=finish,
        model=address.hide(whole(reply.get("model"))),
        usage={name: count if type(count) is int and count >= 0 else 0 for name, count in counts.items()},
        seconds=seconds,
    )


def whole(text):
    """A text that UTF-8 can write: JSON may hold half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""


def classify(status, headers, text, body, address):
    """The Problem that a reply with another status than 200 means."""
    try:
        error = json.loads(text)
        error = error.get("error", error) if isinstance(error, dict) else error
    except (ValueError, RecursionError):
        error = text
    fields = error if isinstance(error, dict) else {}
    code = f"{fields.get('code')} {fields.get('type')}"
    message = str(fields.get("message") or fields.get("detail") or (error if error else "no message"))
    message = " ".join(message.split())[:300]
    said = f"{status} from {address.url}: {message}"
    wait = retry_after(headers)
    if 300 <= status < 400:
        where = address.hide((headers.get("Location") or "nowhere").split("?")[0])
        return Problem(
            f"http_{status}", f"{status}: {address.url} redirects to {where}; use that as --base-url", "stop"
        )
    if status in (401, 403):
        return Problem(f"http_{status}", f"{said}; is the key right, and in the variable --api-key-env names?", "stop")
    if status == 404:
        return Problem("http_404", f"{said}; are --base-url, --endpoint and --model right?", "stop")
    if status == 402 or status == 429 and re.search(r"insufficient_quota|billing", code):
        return Problem("insufficient_quota", f"{said}; the account has nothing left to spend", "stop")
    if re.search("context_length|exceed_context", code) or status == 400 and re.search(CONTEXT, message, re.I):
        return Problem("context_exceeded", said, "row", text)
    if re.search("content_filter|content_policy", code) or status == 400 and "content management policy" in message:
        return Problem("content_filter", said, "row", text)
    if status == 400 and re.search(UNSUPPORTED, f"{code} {message}", re.I):
        named = {str(fields.get("param"))} | set(re.findall(r"\w+", message.split(". ")[0]))
        for name in [n for n in body if n in named and n not in ("model", "messages", "prompt")]:
            flag = FLAGS.get(name, "another --extra-body")
            return Problem("unsupported", f"{said}; the server refuses {name}: use {flag}", "stop")
    if status in (408, 409, 429) or status >= 500:
        if wait is not None and wait > LONGEST_WAIT:
            return Problem(f"http_{status}", f"{said}; it wants a pause of {wait:.0f} s; start again then", "stop")
        return Problem("rate_limited" if status == 429 else f"http_{status}", said, "retry", text, wait)
    return Problem(f"http_{status}", said, "row", text)


def retry_after(headers):
    """The seconds that a reply asks to wait, from retry-after-ms or Retry-After (seconds or a date), or None."""
    for name, scale in (("retry-after-ms", 1000), ("Retry-After", 1)):
        value = (headers.get(name) or "").strip()
        if re.fullmatch(r"\d+(\.\d+)?", value):
            return float(value) / scale
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


class Pace:
    """When the next request may go out, for all workers together. `scale` shortens every pause, for tests."""

    def __init__(self, per_minute=0, scale=1.0):
        self.interval = 60 / per_minute * scale if per_minute else 0.0
        self.scale, self.lock, self.stopped = scale, threading.Lock(), threading.Event()
        self.open = time.monotonic()  # no request before this
        self.next = self.open - self.interval  # when the last one of an even stream went out

    def wait(self):
        """Return when a request may go out. Raises Stopped if the run ends first."""
        while True:
            self.sleep(self.open - time.monotonic())
            with self.lock:
                now = time.monotonic()
                if now < self.open:  # another worker was told to wait while this one did
                    continue
                turn = self.next = max(now, self.next + self.interval)
            self.sleep(turn - now)
            if time.monotonic() >= self.open:
                return

    def back_off(self, attempt, wait):
        """Pause after failed attempt 0, 1, ...: all workers for the server's `wait`, else this one, ever longer."""
        if wait:
            with self.lock:
                self.open = max(self.open, time.monotonic() + wait * self.scale)
        else:
            self.sleep(min(60, 0.5 * 2**attempt) * random.uniform(0.75, 1) * self.scale)

    def sleep(self, seconds):
        if self.stopped.wait(seconds) if seconds > 0 else self.stopped.is_set():
            raise Stopped
