"""A teacher on loopback that answers sums, and misbehaves in every way extract.py must survive.

`Stub(behave)` runs in threads of the test process; `behave(question, attempt)` names what it does with each request,
"ok", a key of REPLIES, a status or one of the ways in `Handler.do_POST`, or gives the reply.
"""

import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USAGE = {"prompt_tokens": 200, "completion_tokens": 20, "prompt_tokens_details": {"cached_tokens": 100}}


def answer(question):
    """The rationale and label for `What is 3 + 4?`, each row's own."""
    a, b = re.findall(r"\d+", question)[-2:]
    return f"{a} and {b} more. The answer is ({a} + {b})."


def completed(text, finish="stop", **message):
    """The body of a chat reply, which serves as a completion's, too."""
    choice = {"index": 0, "finish_reason": finish, "text": text}
    choice["message"] = {"role": "assistant", "content": text, **message}
    return {"id": "x", "model": "stub-1", "choices": [choice], "usage": USAGE}


def error(message, **fields):
    return {"error": {"message": message, **fields}}


REPLIES = {  # name: (status, body, headers)
    "not json": (200, "{'choices'", {}),
    "html": (200, "<html><body>Welcome to the proxy</body></html>", {}),
    "no choices": (200, {"choices": []}, {}),
    "error in 200": (200, error("upstream is busy"), {}),
    "null": (200, completed(None), {}),
    "empty": (200, completed(" \n"), {}),
    "refusal": (200, completed(None, refusal="I would rather not."), {}),
    "error at the end": (200, completed("Three and", "error"), {}),
    "error in choice": (200, {"choices": [{"message": {"content": "3"}, "error": {"message": "upstream"}}]}, {}),
    "deep": (200, "[" * 3000 + "]" * 3000, {}),
    "filtered": (200, completed("Well", "content_filter"), {}),
    "cut short": (200, completed("Three and four more. The answer is (3", "length"), {}),
    "no marker": (200, completed("It is seven, of course."), {}),
    "no sum": (200, completed("Three and more. The answer is seven."), {}),
    "thoughts only": (200, completed(None, "length", reasoning_content="Let me see, three and"), {}),
    "429": (429, error("slow down"), {"Retry-After": "1"}),
    "429 ms": (429, error("slow down"), {"retry-after-ms": "1000"}),
    "429 bare": (429, error("slow down"), {}),
    "429 long": (429, error("come back tomorrow"), {"Retry-After": "3600"}),
    "quota": (429, error("You exceeded your current quota", code="insufficient_quota"), {}),
    "503": (503, "<html>Service Unavailable</html>", {"Retry-After": "1"}),
    "moved": (308, "", {"Location": "https://elsewhere.example/v1/chat/completions?key=1"}),
    "context": (400, error("This model's maximum context length is 4096 tokens.", code="context_length_exceeded"), {}),
    "context, llama.cpp": (400, error("the request exceeds the available context size",
                                      type="exceed_context_size_error"), {}),
    "filter": (400, error("The response was filtered", code="content_filter"), {}),
    "413": (413, "too large", {}),
    "422": (422, {"detail": "unprocessable"}, {}),
    "max_tokens": (400, error("Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                              "'max_completion_tokens' instead.", code="unsupported_parameter",
                              param="max_tokens"), {}),
    "stop": (400, error("Unsupported parameter: 'stop' is not supported with this model.", param="stop"), {}),
    "temperature": (400, error("Unsupported value: 'temperature' does not support 0 with this model.",
                               param="temperature", code="unsupported_value"), {}),
    "top_k": (400, error("Unrecognized request argument supplied: top_k"), {}),
}  # fmt: skip


DRIPS = {  # name: (how a reply begins, what comes every 50 ms)
    "drip": (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", b"{"),
    "drip, headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "drip, interim": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "stall": (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{", b""),
}


class Stub:
    """In a `with` block: a teacher at `.url`. `.requests` are (question, body, headers, time), `.most` is the largest
    number of requests in flight at a time."""

    def __init__(self, behave=lambda question, attempt: "ok", latency=0.0, idle=None):
        """latency: seconds a reply takes; idle: seconds after which a connection without requests is closed."""
        self.behave, self.latency, self.idle, self.lock = behave, latency, idle, threading.Lock()
        self.requests, self.attempts, self.actions = [], Counter(), Counter()
        self.flying = self.most = self.connections = self.port = 0
        self.gone, self.paths = False, set()

    def __enter__(self):
        self.server = Server(("127.0.0.1", self.port), Handler)
        self.server.stub, self.port, self.gone = self, self.server.server_port, False
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.gone = True
        self.server.shutdown()
        self.server.server_close()

    def arrive(self, question, body, headers):
        with self.lock:
            self.flying += 1
            self.most = max(self.most, self.flying)
            self.requests.append((question, body, headers, time.monotonic()))
            action = self.behave(question, self.attempts[question])
            self.attempts[question] += 1
            self.actions[action if isinstance(action, str) else "said"] += 1
        return action

    def leave(self):
        with self.lock:
            self.flying -= 1


class Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def handle_error(self, *_):
        """A client that has hung up is what the tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        self.timeout = self.server.stub.idle
        super().setup()
        self.server.stub.connections += 1

    def log_message(self, *_):
        pass

    def do_POST(self):
        stub = self.server.stub
        stub.paths.add(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"] if "messages" in body else body["prompt"].split("\n\n")[-1]
        action = stub.arrive(question, body, dict(self.headers))
        time.sleep(stub.latency)
        if isinstance(action, str) and action in DRIPS:
            return self.drip(*DRIPS[action])
        if stub.gone:
            action = "disconnect"
        time.sleep(1.5 if action == "late" else 0)  # after the client's patience
        if action in ("reset", "disconnect"):
            stub.leave()
            if action == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            self.close_connection = True
            return None
        cut = 30 if action in ("truncated", "truncated chunk") else None  # bytes of the body that are sent
        chunked, interim = action == "truncated chunk", action == "interim"
        if action in ("ok", "interim", "late") or cut:
            action = completed(answer(question))
        if action == "date":
            action = (429, error("slow down"), {"Retry-After": formatdate(time.time() + 2, usegmt=True)})
        if isinstance(action, dict):
            action = (200, action, {})
        if isinstance(action, str):
            action = REPLIES.get(action) or (int(action), error("no"), {})  # a status
        status, content, headers = action
        content = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        head = f"HTTP/1.1 {status} Whatever\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        if chunked:
            reply = f"{head}Transfer-Encoding: chunked\r\n\r\n{len(content):x}\r\n".encode() + content[:cut]
        else:
            reply = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content[:cut]
        if interim:
            reply = b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + reply
        stub.leave()  # before the client can have the reply and send the next request
        self.wfile.write(reply)
        self.close_connection = bool(cut) or headers.get("Connection") == "close"
        return None

    def drip(self, first, again):
        """Something now and then, or nothing at all: never done."""
        self.server.stub.leave()
        self.close_connection = True
        try:
            self.wfile.write(first)
            for _ in range(400):
                self.wfile.write(again)
                time.sleep(0.05)
        except OSError:
            pass
