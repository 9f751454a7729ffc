"""Wrong use of every program is one line on standard error and exit status 2; nothing is made."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from extracting import PROMPT

# Arguments, as text, and words of the line. The files are those of `directory`, below.
TRAIN = [
    ("stray", "unrecognized arguments: stray"),
    ("--step 3", "unknown flag --step"),
    ("--steps", "--steps: expected one argument"),
    ("--steps x", "--steps: invalid int value: 'x'"),
    ("--steps 0", "--steps must be at least 1, got 0"),
    ("--subsample 0", "--subsample must be more than 0 and at most 1, got 0.0"),
    ("--lam -1", "--lam must be at least 0"),
    ("--lr inf", "--lr must be a finite number, got inf"),
    ("--clip nan", "--clip must be at least 0, got nan"),
    ("--dropout 1", "--dropout must be at least 0 and less than 1, got 1.0"),
    ("--seed 9223372036854775808", "--seed must be below 2**63"),
    ("--threads 100000", "--threads must be at most"),
    ("--max_input_length 1", "--max-input-length must be at least 2, got 1"),
    ("--max_new_tokens 2147483647", "--max-new-tokens must be at most 1,048,576"),
    ("--size huge", "--size: invalid choice: 'huge'"),
    ("--method dss dss", "--method must be named once each"),
    ("--method finetune", "--method finetune: no such method; known: standard, dss, "),
    ("--resume --overwrite", "--resume must be left out beside --overwrite"),
    ("--data none.jsonl", "none.jsonl: No such file"),
    ("--data student", "student: "),
    ("--data bad.jsonl", 'bad.jsonl:2: there is no "input"; the line has inputs'),
    ("--data cut.jsonl", "cut.jsonl:2: not JSON"),
    ("--data deep.jsonl", "deep.jsonl:1: "),
    ("--data empty", "empty: no row has a gold label"),
    ("--data bare.jsonl", "bare.jsonl: no row has a gold label"),
    ("--data rows.jsonl --labels teacher", "rows.jsonl: no row has a teacher label"),
    ("--data one.jsonl", "one.jsonl: one usable row cannot both train and validate"),
    ("--data rows.jsonl --test-data none.jsonl", "none.jsonl: No such file"),
    ("--test-data rows.jsonl", "--eval-data and --test-data go with --data"),
    ("--data rows.jsonl --weights ünïcode", "ünïcode: "),
    ("--data rows.jsonl --weights folder", "folder/config.json: missing"),
    ("--data rows.jsonl --weights student", "student"),
    ("--data rows.jsonl --spiece none.model", "none.model: "),
    ("--data rows.jsonl --spiece rows.jsonl", "rows.jsonl: "),
    ("--data rows.jsonl --vocab-size 5", "no tokenizer of 5 pieces"),
    ("--data rows.jsonl --out empty", "empty: not a directory"),
    ("--data rows.jsonl --out folder --resume", "folder/dss: not a directory"),
    ("--data rows.jsonl --out folder", "folder exists: --resume goes on with it"),
    ("--data rows.jsonl --device cuda", "--device cuda: PyTorch sees no GPU here"),
]
EXTRACT = [
    ("--concurrency 0", "--concurrency must be at least 1, got 0"),
    ("--extra-body [1]", "--extra-body"),
    ("--overwrite --retry-failed", "--retry-failed must be left out beside --overwrite"),
    ("--base-url ftp://x/v1", "--base-url"),
    ("--base-url http://me:secret@x/v1", "--base-url"),
    ("--header api-key:$NOT_SET", "the environment variable NOT_SET is not set"),
    ("--header api-key", "--header"),
    ("--batch-requests b --batch-replies c", "--batch-re"),
    ("--input empty", "empty: there are no rows in it"),
    ("--input bad.jsonl", 'bad.jsonl:2: there is no "input"; the line has inputs'),
    ("--prompt nowhere.json", "nowhere.json"),
    ("--prompt empty", "empty: "),
    ("--output nowhere/out.jsonl", "nowhere/out.jsonl"),
]
PREDICT = [
    ("", "required: student"),
    ("nowhere rows.jsonl", "nowhere: "),
    ("folder rows.jsonl", "folder"),
    ("student rows.jsonl", "student"),
    ("student none.jsonl", "none.jsonl: No such file"),
    ("student bad.jsonl --output made", 'bad.jsonl:2: there is no "input"; the line has inputs'),
    ("student rows.jsonl --batch_size 0", "--batch-size must be from 1 to"),
    ("student rows.jsonl --max-new-tokens 0", "--max-new-tokens must be from 1 to"),
    ("student rows.jsonl --max-input-length 1", "--max-input-length must be from 2 to"),
    ("student rows.jsonl --scores", "--scores"),
    ("student rows.jsonl --labels a a", "--labels"),
]
STUDY = [
    ("--data none.jsonl", "none.jsonl: No such file"),
    ("--data rows.jsonl --method finetune", "finetune"),
    ("--data rows.jsonl --subsample 0.5 2", "--subsample must be"),
    ("--data rows.jsonl --jobs -1", "--jobs must be"),
    ("--data rows.jsonl --seed 1 1", "--seed must be"),
    ("--data rows.jsonl --weights folder", "folder/config.json: missing"),
    ("--data rows.jsonl --out folder", "folder exists: --resume goes on with it"),
]
TABLE = {
    "train": TRAIN,
    "extract": EXTRACT,
    "dss.predict": PREDICT,
    "dss.study": STUDY,
    "dss.bench": [("--repeats 0", "--repeats must be"), ("--data none.jsonl", "none.jsonl")],
    "data.official": [("", "required: "), ("nowhere --out out", "nowhere")],
    "data.report": [
        ("", "required: FILE"),
        ("none.jsonl", "none.jsonl: No such file"),
        ("bad.jsonl", 'bad.jsonl:2: there is no "input"; the line has inputs'),
        ("deep.jsonl", "deep.jsonl:1: "),
        ("p.json", "p.json:"),
        ("rows.jsonl --spiece student", "student"),
        ("rows.jsonl --spiece rows.jsonl", "rows.jsonl"),
    ],
    "data.toy": [
        ("", "required: --out"),
        ("--out rows.jsonl", "rows.jsonl"),
        ("--out out --seed x", "--seed: invalid int value: 'x'"),
    ],
    "kernels.bench": [
        ("--only softmax", "--only"),
        ("--json no/such/file", "--json"),
        ("--minutes x", "--minutes: invalid float value: 'x'"),
    ],
}
REQUIRED = {"data.official": "folder --out out", "data.toy": "--out out"}
CASES = []
for program, rows in TABLE.items():
    CASES.append((program, f"{REQUIRED.get(program, '')} --nonsense 1", "--nonsense"))
    CASES += [(program, line, words) for line, words in rows]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    row = {"input": "x", "label": "1 + 1", "rationale": "z"}
    deep = '{"input": "x", "other": ' + "[" * 2000 + "]" * 2000 + "}\n"
    files = {
        "rows.jsonl": (json.dumps(row) + "\n") * 20,
        "one.jsonl": json.dumps(row),
        "bad.jsonl": '{"input": "x"}\n{"inputs": "y"}\n',
        "bare.jsonl": '{"input": "x"}\n',
        "cut.jsonl": '{"input": "x"}\n{"inp',
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


@pytest.mark.parametrize("program, line, words", CASES)
def test_wrong_use_is_one_line_and_creates_nothing(
    directory, monkeypatch, refused, program, line, words
):
    if torch.cuda.is_available() and "--device cuda" in line:
        pytest.skip("there is a GPU here")
    arguments = line.split()
    if program == "extract":  # what it cannot do without; a flag given twice has its last value
        needed = "--input rows.jsonl --output out.jsonl --prompt p.json --model m"
        arguments = [*needed.split(), "--base-url", "http://127.0.0.1:9/v1", *arguments]
    monkeypatch.setattr(sys, "argv", [f"{program}.py"])  # as a shell has it
    before = sorted(directory.rglob("*"))
    said = refused(importlib.import_module(program).main, *arguments)
    assert words in said
    assert said.split(": ")[0].removeprefix("python -m ").removesuffix(".py") == program
    assert sorted(directory.rglob("*")) == before


def test_extract_names_the_flags_that_it_needs(directory, refused):
    main = importlib.import_module("extract").main
    given = "--input rows.jsonl --output out.jsonl --prompt p.json --model m".split()
    assert "give --base-url" in refused(main, *given)
    for flag in ("--input", "--output", "--prompt"):
        place = given.index(flag)
        assert flag in refused(main, *given[:place], *given[place + 2 :])
