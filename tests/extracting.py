"""What the tests of extract.py share: a task, its files, and ways to run extract.py on them."""

import json
import os
import subprocess
import sys
import time

from running import ROOT, wait_until
from teacher_stub import Stub

import extract

KEY = "sk-test-0123456789abcdef"
PROMPT = {
    "exemplars": [{"input": "What is 1 + 1?", "rationale": "1 and 1 more.", "label": "(1 + 1)"}],
    "question": "Q: {input}{hint}\nA:",
    "hint": " ({label})",
    "answer": " {rationale} The answer is {label}.",
    "answer_marker": "The answer is",
    "stop": ["\nQ:"],
    "label_type": "equation",
}
FAST = 0.01  # of the real pauses
r4 = lambda question: "4 + 2" in question  # that of row r4


def make_files(folder, rows=6):
    """in.jsonl and p.json; the gold label of every third row is another than the stub says."""
    folder.mkdir(exist_ok=True)
    lines = [{"id": f"r{i}", "input": f"What is {i} + 2?", "label": f"{i} + {2 + (i % 3 == 0)}"} for i in range(rows)]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "p.json").write_text(json.dumps(PROMPT))
    return folder


def arguments(folder, url, line=""):
    places = ["--input", folder / "in.jsonl", "--output", folder / "out.jsonl", "--prompt", folder / "p.json"]
    return [str(a) for a in [*places, "--model", "stub-1", *(["--base-url", url] if url else []), *line.split()]]


def run(folder, url, line="", scale=FAST):
    try:
        return extract.main(arguments(folder, url, line), scale)
    except SystemExit as end:
        return end.code


def ask(folder, behave=lambda question, attempt: "ok", line="", status=0, scale=FAST, latency=0.0):
    """The Stub that answered a run, which ended with `status`."""
    with Stub(behave, latency) as stub:
        got = run(folder, stub.url, line, scale)
    assert got == status, got
    return stub


def rows(folder, name="out.jsonl"):
    path = folder / name
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def errors(folder):
    return rows(folder, "out.jsonl.errors.jsonl")


def always(action, when=lambda question: True):
    return lambda question, attempt: action if when(question) else "ok"


def once(*actions):
    """Each row's first requests are answered so, later ones well."""
    return lambda question, attempt: actions[attempt] if attempt < len(actions) else "ok"


def bucket(rate, burst, headers):
    """A server's limit: `burst` requests at once and `rate` more a second; the others get a 429 with `headers`."""
    tokens, last = burst, time.monotonic()

    def behave(question, attempt):  # under the stub's lock
        nonlocal tokens, last
        now = time.monotonic()
        tokens, last = min(burst, tokens + (now - last) * rate), now
        if tokens < 1:
            return 429, {"error": {"message": "slow down"}}, headers
        tokens -= 1
        return "ok"

    return behave


def start(folder, url, line="", before="", after=""):
    """A process of its own, with statements before and after extract.main."""
    code = f"import sys, extract; from data.cli import run\n{before}\n"
    code += f"def main():\n  status = extract.main(scale={FAST}); {after}\n  return status\nrun('extract.py', main)"
    command = [sys.executable, "-c", code, *arguments(folder, url, line)]
    environment = os.environ | {"OPENAI_API_KEY": KEY}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_rows(folder, number, process=None):
    out, ended = folder / "out.jsonl", process.poll if process else lambda: None
    wait_until(lambda: ended() is not None or out.exists() and out.read_bytes().count(b"\n") >= number)


def lasting(row):
    """A row without what differs from run to run."""
    passing = ("created_at", "latency_s", "attempts")
    return row | {"teacher": {k: v for k, v in row["teacher"].items() if k not in passing}}
