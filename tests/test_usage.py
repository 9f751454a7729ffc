"""Wrong use of every program is one line on standard error and exit status 2; no file changes."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from extracting import PROMPT

# A program, its arguments | words of the line. The files are those of `directory`, below.
CASES = r"""
train --nonsense 1 | --nonsense
train stray | unrecognized arguments: stray
train --step 3 | unrecognized arguments: --step
train --steps | --steps: expected one argument
train --steps x | --steps: invalid int value: 'x'
train --steps 0 | --steps must be from 1 to
train --subsample 0 | --subsample must be more than 0, got 0.0
train --lam -1 | --lam must be from 0 to
train --lr inf | --lr must be from 0 to 1e+300, got inf
train --clip nan | --clip must be from 0 to
train --dropout 1 | --dropout must be from 0 to 0.99, got 1.0
train --seed 9223372036854775808 | --seed must be from 0 to
train --threads 100000 | --threads must be from 0 to
train --max_input_length 1 | --max-input-length must be from 2 to 1048576, got 1
train --max_new_tokens 2147483647 | --max-new-tokens must be from 1 to
train --size huge | --size: invalid choice: 'huge'
train --method dss dss | --method must be named once each
train --method finetune | --method finetune: no such method; known: standard, dss, 
train --resume --overwrite | --resume must be left out beside --overwrite
train --data none.jsonl | none.jsonl: No such file
train --data student | student: 
train --data bad.jsonl | bad.jsonl:2: there is no "input"; the line has inputs
train --data cut.jsonl | cut.jsonl:2: not JSON
train --data deep.jsonl | deep.jsonl:1: 
train --data empty | empty: no row has a gold label
train --data bare.jsonl | bare.jsonl: no row has a gold label
train --data rows.jsonl --labels teacher | rows.jsonl: no row has a teacher label
train --data one.jsonl | one.jsonl: one usable row cannot both train and validate
train --data rows.jsonl --test-data none.jsonl | none.jsonl: No such file
train --test-data rows.jsonl | --eval-data and --test-data go with --data
train --data rows.jsonl --weights ünïcode | ünïcode: 
train --data rows.jsonl --weights folder | folder/config.json: missing
train --data rows.jsonl --weights student | student
train --data rows.jsonl --spiece none.model | none.model: 
train --data rows.jsonl --spiece rows.jsonl | rows.jsonl: 
train --data rows.jsonl --vocab-size 5 | no tokenizer of 5 pieces
train --data rows.jsonl --out empty | empty: not a directory
train --data rows.jsonl --out folder --resume | folder/dss: not a directory
train --data rows.jsonl --out folder | folder exists: --resume goes on with it
train --data rows.jsonl --device cuda | --device cuda: PyTorch sees no GPU here
extract --nonsense 1 | --nonsense
extract --concurrency 0 | --concurrency must be at least 1, got 0
extract --input= | --input must be given
extract --output= | --output must be given
extract --prompt= | --prompt must be given
extract --model= | --model must be given
extract --base-url= | give --base-url
extract --extra-body [1] | --extra-body
extract --max-cost 3 --price-in 1 | --max-cost must be given with --price-in
extract --base-url ftp://x/v1 | --base-url
extract --base-url http://me:secret@x/v1 | --base-url
extract --header api-key:$NOT_SET | the environment variable NOT_SET is not set
extract --header api-key | --header
extract --batch-requests b --batch-replies c | --batch-re
extract --input empty | empty: there are no rows in it
extract --input bad.jsonl | bad.jsonl:2: there is no "input"; the line has inputs
extract --input same.jsonl | row 'a': another row has this id
extract --input bare.jsonl --rationalize | row 'bare-1' has no gold label, which --rationalize
extract --prompt nowhere.json | nowhere.json
extract --prompt empty | empty: 
extract --output nowhere/out.jsonl | nowhere: no such directory
extract --output rows.jsonl | --output must be another file
extract --output one.jsonl | one.jsonl:1: not a row that extract.py wrote
extract --output letter | letter:1: not a row that extract.py wrote
dss.predict --nonsense 1 | --nonsense
dss.predict | required: student
dss.predict no/such/student rows.jsonl | no/such/student: no such directory of weights
dss.predict folder rows.jsonl | folder
dss.predict student rows.jsonl | student
dss.predict student none.jsonl | none.jsonl: No such file
dss.predict student bad.jsonl --output made | bad.jsonl:2: there is no "input"; the line has inputs
dss.predict student rows.jsonl --batch_size 0 | --batch-size: must be from 1 to
dss.predict student rows.jsonl --max-new-tokens 0 | --max-new-tokens: must be from 1 to
dss.predict student rows.jsonl --max-input-length x | --max-input-length: invalid number value
dss.study --nonsense 1 | --nonsense
dss.study --data none.jsonl | none.jsonl: No such file
dss.study --data rows.jsonl --method finetune | finetune
dss.study --data rows.jsonl --subsample 0.5 2 | --subsample must be
dss.study --data rows.jsonl --jobs -1 | --jobs must be
dss.study --data rows.jsonl --seed 1 1 | --seed must be
dss.study --data rows.jsonl --weights folder | folder/config.json: missing
dss.study --data rows.jsonl --out folder | folder exists: --resume goes on with it
dss.bench --nonsense 1 | --nonsense
dss.bench --repeats 0 | --repeats must be
dss.bench --data none.jsonl | none.jsonl
data.official folder --out out --nonsense 1 | --nonsense
data.official | required: 
data.official nowhere --out out | nowhere
data.report --nonsense 1 | --nonsense
data.report | required: FILE
data.report none.jsonl | none.jsonl: No such file
data.report bad.jsonl | bad.jsonl:2: there is no "input"; the line has inputs
data.report deep.jsonl | deep.jsonl:1: 
data.report p.json | p.json:
data.report rows.jsonl --spiece student | student
data.report rows.jsonl --spiece rows.jsonl | rows.jsonl
kernels.bench --nonsense 1 | --nonsense
kernels.bench --only softmax | --only
kernels.bench --json no/such/file | --json
kernels.bench --minutes x | --minutes: invalid float value: 'x'
"""


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    row = {"input": "x", "label": "1 + 1", "rationale": "z"}
    deep = '{"input": "x", "other": ' + "[" * 2000 + "]" * 2000 + "}\n"
    files = {
        "rows.jsonl": (json.dumps(row) + "\n") * 20,
        "one.jsonl": json.dumps({"id": "a"} | row),  # it may look torn
        "bad.jsonl": '{"input": "x"}\n{"inputs": "y"}\n',
        "bare.jsonl": '{"input": "x"}\n',
        "cut.jsonl": '{"input": "x"}\n{"inp',
        "same.jsonl": '{"input": "x", "id": "a"}\n' * 2,
        "letter": "Dear Mia, this has no line end",
        "deep.jsonl": deep,
        "empty": "",
        "p.json": json.dumps(PROMPT),
        "student/config.json": '{"model_type": "t5", "vocab_size": 1000000000}',
        "folder/dss": "a file, where a run would make a directory",
    }
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_wrong_use_is_one_line_and_changes_nothing(directory, monkeypatch, refused, case):
    if torch.cuda.is_available() and "--device cuda" in case:
        pytest.skip("there is a GPU here")
    command, words = case.split(" | ")
    program, *arguments = command.split()
    if program == "extract":  # what it cannot do without; a flag given twice has its last value
        needed = "--input rows.jsonl --output out.jsonl --prompt p.json --model m"
        arguments = [*needed.split(), "--base-url", "http://127.0.0.1:9/v1", *arguments]
    monkeypatch.setattr(sys, "argv", [f"{program}.py"])  # as a shell has it
    before = contents(directory)
    said = refused(importlib.import_module(program).main, *arguments)
    assert words in said
    assert said.split(": ")[0].removeprefix("python -m ").removesuffix(".py") == program
    assert contents(directory) == before


def contents(directory):
    return {path: path.is_file() and path.read_bytes() for path in directory.rglob("*")}
