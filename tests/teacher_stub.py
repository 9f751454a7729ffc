"""A teacher on loopback that answers sums, and misbehaves as it is told."""

import json
import re
import threading
import time
from collections import Counter, namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Request = namedtuple("Request", "question body headers path time")


def answer(question):
    """The rationale and label for `What is 3 + 4?`, each row's own."""
    a, b = re.findall(r"\d+", question)[-2:]
    return f"{a} and {b} more. The answer is ({a} + {b})."


def completed(text, finish="stop", **message):
    """The body of a chat reply, which serves as a completion's, too."""
    message = {"content": text, **message}
    choice = {"finish_reason": finish, "text": text, "message": message}
    usage = {"prompt_tokens": 200, "completion_tokens": 20}
    return {"model": "stub-1", "choices": [choice], "usage": usage}


def error(message, **fields):
    return {"error": {"message": message, **fields}}


class Stub(ThreadingHTTPServer):
    """In a `with` block: a teacher at `.url`.

    behave(question, attempt) gives "ok", a status, a body, (status, body, headers), or how the
    connection fails: "disconnect", "cut off", "late".
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, behave=lambda question, attempt: "ok", latency=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = behave
        self.latency = latency
        self.lock = threading.Lock()
        self.requests = []
        self.attempts = Counter()
        self.host = f"127.0.0.1:{self.server_port}"
        self.url = f"http://{self.host}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def arrive(self, request):
        with self.lock:
            self.requests.append(request)
            action = self.behave(request.question, self.attempts[request.question])
            self.attempts[request.question] += 1
        return action

    def handle_error(self, *_):
        """A client that has hung up is what the tests are about."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "prompt" in body:
            question = body["prompt"].split("\n\n")[-1]
        else:
            question = body["messages"][-1]["content"]
        request = Request(question, body, self.headers, self.path, time.monotonic())
        action = self.server.arrive(request)
        time.sleep(self.server.latency)
        if action == "disconnect":
            return
        if action == "late":
            time.sleep(1)  # after the client's patience
        reply = (200, completed(answer(question)), {})
        if isinstance(action, int):
            reply = (action, error("no"), {})
        elif isinstance(action, dict):
            reply = (200, action, {})
        elif isinstance(action, tuple):
            reply = action
        status, content, headers = reply
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: 30 if action == "cut off" else None])
