"""A teacher on loopback that answers sums, and misbehaves as it is told."""

import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def answer(question):
    """The rationale and label for `What is 3 + 4?`, each row's own."""
    a, b = re.findall(r"\d+", question)[-2:]
    return f"{a} and {b} more. The answer is ({a} + {b})."


def completed(text, finish="stop", **message):
    """The body of a chat reply, which serves as a completion's, too."""
    message = {"role": "assistant", "content": text, **message}
    choice = {"index": 0, "finish_reason": finish, "text": text, "message": message}
    usage = {"prompt_tokens": 200, "completion_tokens": 20}
    return {"id": "x", "model": "stub-1", "choices": [choice], "usage": usage}


def error(message, **fields):
    return {"error": {"message": message, **fields}}


class Stub:
    """In a `with` block: a teacher at `.url`.

    behave(question, attempt) gives "ok", a status, a body, (status, body, headers), or how the
    connection fails: "disconnect", "cut off", "late".
    """

    def __init__(self, behave=lambda question, attempt: "ok", latency=0.0):
        self.behave = behave
        self.latency = latency
        self.lock = threading.Lock()
        self.requests = []  # (question, body, headers, time)
        self.attempts = Counter()
        self.paths = set()

    def __enter__(self):
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.stub = self
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def arrive(self, question, body, headers):
        with self.lock:
            self.requests.append((question, body, headers, time.monotonic()))
            action = self.behave(question, self.attempts[question])
            self.attempts[question] += 1
        return action


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def handle_error(self, *_):
        """A client that has hung up is what the tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        stub = self.server.stub
        stub.paths.add(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "prompt" in body:
            question = body["prompt"].split("\n\n")[-1]
        else:
            question = body["messages"][-1]["content"]
        action = stub.arrive(question, body, dict(self.headers))
        time.sleep(stub.latency)
        self.close_connection = True
        if action == "disconnect":
            return
        if action == "late":
            time.sleep(1)  # after the client's patience
        status = 200
        content = completed(answer(question))
        headers = {}
        if isinstance(action, int):
            action = (action, error("no"), {})
        if isinstance(action, tuple):
            status, content, headers = action
        elif isinstance(action, dict):
            content = action
        if isinstance(content, dict | list):
            content = json.dumps(content)
        if isinstance(content, str):
            content = content.encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: 30 if action == "cut off" else None])
