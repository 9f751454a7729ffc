"""Files that anybody may have written, or damaged: each is read as it should be, or refused in one line."""

import importlib
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import mutation
import pytest
import torch
from mutation import OPTIMIZERS, make_run, train_a_step

from data.files import digest, parse_json, read_json, replacing
from data.jsonl import read_jsonl
from dss.run.state import load_state, save_state


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 101 + "]" * 101, "nested deeper than 100"),
        ("[" * 100_000, "nested deeper than 100"),
        ('{"a": 1, "a": 2}', "a key is there twice"),
        ("[NaN]", "NaN is not a finite number"),
        ("-Infinity", "-Infinity is not a finite number"),
        ("1e400", "1e400 is not a finite number"),
        ("1" * 5000, "not JSON"),
        (b'"\xff"', "not UTF-8"),
        ("", "not JSON"),
    ],
)
def test_json_that_is_no_plain_data_is_refused(text, words):
    with pytest.raises(ValueError, match=f"^here: .*{words}") as error:
        parse_json(text, "here")
    assert "\n" not in str(error.value)


def test_json_of_ordinary_depth_and_size_is_read(tmp_path):
    assert parse_json("[" * 100 + "1.5" + "]" * 100, "here")
    assert parse_json(b'{"a": [1, "[[[[{{{{"]}', "here") == {"a": [1, "[[[[{{{{"]}
    (tmp_path / "x.json").write_text("[1, 2]")
    assert read_json(tmp_path / "x.json", most=6) == [1, 2]
    with pytest.raises(ValueError, match=r"x.json: longer than 5 bytes"):
        read_json(tmp_path / "x.json", most=5)


def test_a_line_without_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("data.jsonl.MOST_JSON", 20)
    (tmp_path / "x.jsonl").write_text('{"input": "a"}\n{"input": "' + "a" * 30)
    with pytest.raises(ValueError, match=r"x.jsonl:2: longer than 20 bytes"):
        list(read_jsonl(tmp_path / "x.jsonl"))


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    """A FIFO that nobody writes held the program up for ever."""
    os.mkfifo(tmp_path / "fifo")
    for read in (read_json, digest):
        with pytest.raises(OSError, match="not a regular file"):
            read(tmp_path / "fifo")


def test_writing_follows_a_link_and_leaves_a_device_in_place(tmp_path):
    """As root, `--out /dev/null` replaced the device by a file."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "device").symlink_to("/dev/null")
    for name in ("link", "device"):
        with replacing(tmp_path / name) as file:
            file.write(b"new")
    assert (tmp_path / "file").read_text() == "new" and (tmp_path / "link").is_symlink()
    assert (tmp_path / "device").is_symlink() and not os.path.isfile("/dev/null")


def test_a_spoiled_file_is_refused_in_one_line_or_means_the_same_to_transformers(transformers, tmp_path, recwarn):
    """150 files of five layouts, spoiled in one place: config, index, weights, tokenizer, rows and state. The long run
    is in mutation.py."""
    transformers.logging.set_verbosity_error()
    mutation.make_layouts(tmp_path / "layouts")
    verdicts = Counter()
    for number in range(150):
        path = mutation.mutate(tmp_path / "layouts", number, tmp_path / str(number))
        verdict = mutation.judge(path.parent, path)
        assert verdict in ("refused", "alike"), (number, path.name, verdict)
        verdicts[verdict] += 1
        shutil.rmtree(path.parent)
    assert min(verdicts.values()) > 10, "both are tried"


def everything(model, optimizer):
    moments = [t for of in optimizer.state_dict()["state"].values() for _, t in sorted(of.items())]
    return [t.clone() for t in (*model.state_dict().values(), *moments)]


def equal(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))


@pytest.fixture(params=OPTIMIZERS)
def states(request, tmp_path):
    """(path, optimizer, [everything at step 1, at step 2]) of a run with two states."""
    model, optimizer = make_run(request.param)
    path, were = tmp_path / "state.pt", []
    for step in (1, 2):
        train_a_step(model, optimizer)
        were.append(everything(model, optimizer))
        save_state(path, model, optimizer, {"step": step})
    return path, request.param, were


def test_no_flipped_bit_resumes_to_another_student(states, capsys):
    """Of 120 flipped bits, 62 resumed to another student. Now the state before is taken, which ends in the same one.
    (60 bits of a state of each optimizer.)"""
    path, optimizer, were = states
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        run = make_run(optimizer)
        assert load_state(path, *run)["step"] == 1 and equal(everything(*run), were[0])
        assert capsys.readouterr().err == f"{path}: damaged; going on with state.before.pt, the state before it\n"


@pytest.mark.parametrize("damage", [bytes, lambda whole: whole[:-1], lambda whole: whole + b"x", None])
def test_without_a_sound_state_there_is_an_error(states, damage):
    path, optimizer, were = states
    for file in (path.with_name("state.before.pt"), path):
        run = make_run(optimizer)
        assert load_state(path, *run)["step"] == 2 and equal(everything(*run), were[1])
        content = file.read_bytes()
        file.unlink()
        if damage:
            file.write_bytes(damage(content) if damage is not bytes else b"")
        else:
            os.mkfifo(file)
    with pytest.raises(ValueError, match=r"state.pt: not the state of this run, or damaged, and state.before.pt"):
        load_state(path, *make_run(optimizer))


def test_a_sound_state_of_another_run_is_refused_before_it_is_loaded(states):
    """Moments of another shape ended in a crash of Python, inside the fused AdamW."""
    path, optimizer, _ = states
    other = "adafactor" if optimizer == "adamw" else "adamw"
    for run in (make_run(optimizer, d_ff=48), make_run(optimizer, num_layers=2), make_run(other)):
        was = everything(*run)
        with pytest.raises(ValueError, match=r"state.pt: not the state of this run \(its tensors have other shapes\)"):
            load_state(path, *run)
        assert equal(everything(*run), was)
    model, moments = make_run(optimizer)
    train_a_step(model, moments)
    next(iter(moments.state.values()))["step"].resize_(2)
    save_state(path, model, moments, {"step": 3})
    with pytest.raises(ValueError, match="other shapes"):
        load_state(path, *make_run(optimizer))


PROGRAMS = "train extract dss.predict dss.study.__main__ dss.hub data.official data.report data.toy".split()
WRONG = [
    *((name, "--nonsense 1") for name in PROGRAMS),
    ("train", "--data deep.jsonl"),
    ("train", "--data rows.jsonl --weights ünïcode"),
    ("train", "--data rows.jsonl --weights student"),
    ("train", "--data rows.jsonl --spiece rows.jsonl"),
    ("extract", "--input rows.jsonl --output out.jsonl --prompt p.json --model m"),
    ("dss.predict", ""),
    ("dss.predict", "student rows.jsonl"),
    ("dss.predict", "student rows.jsonl --scores"),
    ("data.official", ""),
    ("data.official", "nowhere --out out"),
    ("data.report", ""),
    ("data.report", "none.jsonl"),
    ("data.report", "bad.jsonl"),
    ("data.report", "p.json"),
    ("data.report", "rows.jsonl --spiece student"),
    ("data.report", "deep.jsonl"),
    ("data.report", "rows.jsonl --spiece rows.jsonl"),
    ("data.toy", ""),
    ("data.toy", "--out rows.jsonl"),
    ("data.toy", "--out out --seed x"),
    ("dss.bench", "--questions 100000"),
    ("dss.hub", ""),
    ("dss.hub", "nowhere --check"),
    ("dss.hub", "student --check"),
    ("dss.hub", "../student --check"),
    ("dss.hub", "bad\0id"),
]


@pytest.fixture
def wrong_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DSS_CACHE", str(tmp_path.with_name("cache")))
    Path("rows.jsonl").write_text('{"input": "x", "label": "y", "rationale": "z"}\n' * 20)
    Path("bad.jsonl").write_text('{"input": "x"}\n{"inputs": "y"}\n')
    Path("deep.jsonl").write_text('{"input": "x", "other": ' + "[" * 2000 + "]" * 2000 + "}\n")
    Path("p.json").write_text("{}")
    (tmp_path / "student").mkdir()
    Path("student/config.json").write_text('{"model_type": "t5", "vocab_size": 1000000000}')
    return tmp_path


@pytest.mark.parametrize("program, line", WRONG)
def test_wrong_use_is_one_line_and_creates_nothing(wrong_files, refused, program, line):
    before = sorted(wrong_files.rglob("*"))
    refused(importlib.import_module(program).main, *(line.split(" ") if line else []))
    assert sorted(wrong_files.rglob("*")) == before
