"""What the tests of extract.py share: a task, its files, and ways to run extract.py on them."""

import json
import os
import ssl
import subprocess
import sys
from functools import cache

from running import ROOT, json_lines
from teacher_stub import Stub

import extract
from data.jsonl import Record, write_jsonl

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
NOWHERE = "http://127.0.0.1:9/v1"
ssl.create_default_context = cache(ssl.create_default_context)  # it takes 50 ms


def make_files(folder, rows=6):
    """in.jsonl and p.json; the gold label of every third row is another than the stub says."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(rows):
        lines.append(Record(f"r{i}", f"What is {i} + 2?", f"({i} + {2 + (i % 3 == 0)})"))
    write_jsonl(folder / "in.jsonl", lines)
    (folder / "p.json").write_text(json.dumps(PROMPT))
    return folder


def arguments(folder, url, line=""):
    places = f"--input {folder}/in.jsonl --output {folder}/out.jsonl --prompt {folder}/p.json"
    return f"{places} --model stub-1 --base-url {url} {line}".split()


def run(folder, url, line=""):
    return extract.main(arguments(folder, url, line), FAST)


def start(folder, url, line=""):
    """A process of its own."""
    code = "import extract; from data.cli import run\n"
    code += f"run('extract.py', lambda: extract.main(scale={FAST}))"
    command = [sys.executable, "-c", code, *arguments(folder, url, line)]
    environment = os.environ | {"OPENAI_API_KEY": KEY}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def ask(folder, behave=lambda question, attempt: "ok", line="", status=0, **options):
    """The Stub that answered a run, which ended with `status`."""
    with Stub(behave, **options) as stub:
        assert run(folder, stub.url, line) == status
    return stub


def rows(folder, name="out.jsonl"):
    return json_lines(folder / name) if (folder / name).exists() else []


def errors(folder):
    return rows(folder, "out.jsonl.errors.jsonl")


def always(action, row=""):
    """Every question is answered so, or those of the row `4 + 2`, for one."""
    return lambda question, attempt: action if row in question else "ok"


def once(*actions):
    """Each row's first requests are answered so, later ones well."""
    return lambda question, attempt: actions[attempt] if attempt < len(actions) else "ok"
