"""What a run says: counts, speed, and a report that claims no more than it knows."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from running import QUICK, SIX, counting, json_lines, prepare, result, run, watched, write_rows

import train
from data.files import write_json
from data.jsonl import Record, write_jsonl
from dss.log import read_correct, reason_to_doubt, reliability
from dss.student import Answer

ONE = [*QUICK, "--steps", "1"]


@pytest.fixture
def files(tmp_path):
    return write_rows(tmp_path, counting(20), 16)


def test_inputs_in_two_places_and_texts_that_were_cut_are_counted(files, tmp_path, capsys):
    training = Path(files[1])
    test = Path(files[3])
    test.write_text(training.read_text().split("\n")[0] + "\n" + test.read_text())
    limits = "--max-input-length 6 --max-target-length 5 --vocab-size 100 --method dss".split()
    arguments = [*files, *ONE, *limits, "--eval-data", training, "--out", tmp_path / "out"]
    assert run(*arguments) == 0
    said = capsys.readouterr().err
    assert "16 of 16 validation inputs and 1 of 5 test inputs are training inputs too" in said
    found = result(tmp_path / "out", "dss")
    assert found["inputs_cut"] == 32 and 16 <= found["targets_cut"] <= 32
    cut = f"32 inputs cut at 6 tokens, {found['targets_cut']} targets cut at 5 tokens; see"
    assert cut in said


def test_a_runs_speed_leaves_its_evaluations_out(files, tmp_path, monkeypatch):
    passed = []
    clock = SimpleNamespace(monotonic=lambda: sum(passed))
    monkeypatch.setattr("dss.log.time", clock)
    monkeypatch.setattr(train, "evaluate", watched("evaluate", lambda *_: passed.append(1000.0)))
    monkeypatch.setattr(train, "train_step", watched("train_step", lambda *_: passed.append(1.0)))
    assert run(*files, *SIX, "--out", tmp_path / "out") == 0
    line = json_lines(tmp_path / "out" / "dss" / "metrics.jsonl")[-2]
    assert line["tokens_per_second"] == round(result(tmp_path / "out", "dss")["tokens"] / 6)


def test_the_report_shows_three_answers_and_what_to_run_next(files, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [*files, *ONE, "--out", out, "--method", "standard"]
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    assert shown.count("  question   ") == 3 and "(nothing)   (gold: 16 + 1)" in shown
    assert "with --resume --method standard NAME adds a student" in shown
    finished = result(out, "standard")
    assert len(finished["samples"]) == 3
    finished["samples"][0]["input"] = "字" * 500
    write_json(out / "standard" / "result.json", finished)
    assert run(*arguments, "--resume") == 0
    assert "字" * 96 + " ...\n" in capsys.readouterr().out, "a text without spaces is cut, too"
    assert run(*arguments, "dss", "--resume") == 0
    assert "dss - standard:" in capsys.readouterr().out


def test_labels_of_the_teacher_are_not_called_gold(files, tmp_path, capsys):
    teacher = ["--method", "standard", "--labels", "teacher", "--out", tmp_path / "out"]
    assert run(*files[:2], *ONE, *teacher) == 0
    shown = capsys.readouterr().out
    assert "(teacher's: " in shown and "gold" not in shown


@pytest.mark.parametrize(
    "losses, commonest, reason",
    [
        ([2.0, 1.0], 0.5, "its loss was falling fast"),
        ([0.038, 0.030], 0.5, ""),  # fast for its size, but at its end
        ([2.0, 1.0], 0.9, "no better than the commonest label"),
    ],
)
def test_a_run_is_doubted_that_was_too_short_or_no_better_than_a_constant(
    tmp_path, losses, commonest, reason
):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"label_loss": loss}) + "\n" for loss in losses))
    figures = dict(validation_accuracy=0.9, commonest_label=commonest, best_step=9, steps=9)
    figures |= dict(test_accuracy=None, bag_of_words=None)
    said = reason_to_doubt(figures, metrics)
    assert reason in said and bool(said) == bool(reason)
    assert "commonest" not in reason_to_doubt(figures | {"token_f1": 0.3}, metrics), "free text"


COLOURS = ["red", "blue"] * 20
LINES = "one\ntwo\nthree four five\nsix seven eight nine".split("\n") * 10
FREE = [f"change number {i} of the file" for i in range(40)]


@pytest.mark.parametrize(
    "labels, held_out, flags, line",
    [
        (COLOURS, ["red"] * 50, "", ""),
        (["35-44", "45-54"] * 20, ["35-44"] * 50, "", ""),
        (
            COLOURS,
            ["red"] * 20,
            "",
            "20 validation rows: the 95 % interval of an accuracy is up to 40",
        ),
        (COLOURS, ["red"] * 47 + ["green"] * 3, "", "3 of 50 validation and test labels are no "),
        (["A", "B"] * 20, ["a", "B"] * 25, "", "alike count as different: 'a' and 'A'"),
        (["a_b", "a b", "c"] * 20, ["c"] * 50, "", "alike count as different: 'a_b' and 'a b'"),
        (
            LINES,
            ["one"] * 50,
            "--max-new-tokens 3",
            "10 of 90 labels are longer than an answer may",
        ),
        (
            COLOURS,
            ["blue"] * 50,
            "--max-input-length 4",
            "50 validation and test inputs cut at 4 tok",
        ),
        (
            COLOURS,
            ["red 色"] * 50,
            "",
            "0.00% of the inputs, 17.86% of the labels, 0.00% of the rationales",
        ),
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


@pytest.mark.parametrize("label, answer", [("10 km²", "10 km2"), ("ﬁx", "fix"), ("a\u0301", "á")])
def test_an_answer_that_is_the_written_form_of_its_label_counts_in_every_figure(label, answer):
    asked = [Record("1", "x", label), Record("2", "y", "other")]
    rows = SimpleNamespace(free_text=False, labels=[label, "other"], asked=asked, metric="text")

    def score(inputs, labels):
        return [dict.fromkeys(some, 0.5) for some in labels]

    student = SimpleNamespace(method="dss", score=score)
    figures = reliability(student, rows, [True, True], [Answer(answer), Answer("other")])
    assert figures["macro_f1"] == 1 and figures["calibration_error"] == 0.5


def test_a_line_separator_in_a_question_is_no_end_of_its_line(tmp_path):
    write_jsonl(tmp_path / "predictions.jsonl", [dict(input="a\u2028b\x85", correct=True)])
    assert read_correct(tmp_path).tolist() == [1]
