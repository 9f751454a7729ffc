"""What a run says before and while it trains: counts and speed."""

from types import SimpleNamespace

import pytest
from running import (
    QUICK,
    SIX,
    counting,
    few_rows,
    json_lines,
    prepare,
    result,
    run,
    watched,
)

import train
from data.jsonl import Record, write_jsonl


@pytest.fixture
def files(tmp_path):
    return few_rows(tmp_path)


@pytest.fixture
def one_step(files, tmp_path):
    return f"{files} {QUICK} --steps 1 --out {tmp_path}/out"


def test_inputs_in_two_places_and_texts_that_were_cut_are_counted(one_step, tmp_path, capsys):
    write_jsonl(tmp_path / "test.jsonl", counting(20)[15:])
    limits = "--max-input-length 6 --max-target-length 5 --vocab-size 100 --method dss"
    assert run(one_step, limits, f"--eval-data {tmp_path}/rows.jsonl") == 0
    said = capsys.readouterr().err
    assert "17 of 21 validation and test inputs are training inputs too" in said
    found = result(tmp_path / "out", "dss")
    assert found["inputs_cut"] == 32 and 16 <= found["targets_cut"] <= 32
    assert f"dss: 32 inputs and {found['targets_cut']} targets are cut;" in said


def test_a_runs_speed_leaves_its_evaluations_out(files, tmp_path, monkeypatch):
    passed = []
    clock = SimpleNamespace(monotonic=lambda: sum(passed))
    monkeypatch.setattr("dss.log.time", clock)
    monkeypatch.setattr(train, "evaluate", watched("evaluate", lambda *_: passed.append(1000.0)))
    monkeypatch.setattr(train, "train_step", watched("train_step", lambda *_: passed.append(1.0)))
    assert run(files, SIX, f"--out {tmp_path}/out") == 0
    line = json_lines(tmp_path / "out" / "dss" / "metrics.jsonl")[-2]
    assert line["tokens_per_second"] == round(result(tmp_path / "out", "dss")["tokens"] / 6)


COLOURS = ["red", "blue"] * 20
LINES = "one\ntwo\nthree four five\nsix seven eight nine".split("\n") * 10
FREE = [f"change number {i} of the file" for i in range(40)]


@pytest.mark.parametrize(
    "labels, held_out, flags, line",
    [
        (COLOURS, ["red"] * 50, "", ""),
        (["35-44", "45-54"] * 20, ["35-44"] * 50, "", ""),
        (COLOURS, ["red"] * 20, "", "20 validation rows: the 95 % interval of an accuracy is up t"),
        (COLOURS, ["red"] * 47 + ["green"] * 3, "", "3 of 50 validation and test labels are no "),
        (LINES, ["one"] * 50, "--max-new-tokens 3", "10 of 90 labels are longer than an answer"),
        (COLOURS, ["blue"] * 50, "--max-input-length 4", "50 validation and test inputs cut at 4"),
        (COLOURS, ["red 色"] * 50, "", "0.00% of the inputs, 17.86% of the labels, 0.00% of the r"),
        (FREE, FREE + FREE[:10], "", "nearly all labels differ (free text)"),
    ],
)
def test_what_a_reader_should_know_of_the_rows_is_said_before_training(
    tmp_path, capsys, labels, held_out, flags, line
):
    for name, some in (("to", labels), ("ot", held_out)):
        rows = [Record(f"{i}", f"question {i} {name}", label) for i, label in enumerate(some)]
        write_jsonl(tmp_path / name, rows)
    files = ["--data", tmp_path / "to", "--eval-data", tmp_path / "ot"]
    prepare(*files, "--method", "standard", "--out", tmp_path / "out", *flags.split())
    said = capsys.readouterr().err
    assert line in said and bool(said) == bool(line)
