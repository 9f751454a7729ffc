"""What a run says: counts, speed, and a report that claims no more than it knows."""

import json
from types import SimpleNamespace

import pytest
from running import QUICK, SIX, counting, json_lines, prepare, result, run, watched, write_rows

import train
from data.files import write_json
from data.jsonl import Record, write_jsonl
from dss.log import read_correct, reason_to_doubt, reliability
from dss.student import Answer


@pytest.fixture
def files(tmp_path):
    return " ".join(write_rows(tmp_path, counting(20), 16))


@pytest.fixture
def one_step(files, tmp_path):
    return f"{files} {QUICK} --steps 1 --out {tmp_path}/out"


def test_inputs_in_two_places_and_texts_that_were_cut_are_counted(one_step, tmp_path, capsys):
    write_jsonl(tmp_path / "test.jsonl", counting(20)[15:])
    limits = "--max-input-length 6 --max-target-length 5 --vocab-size 100 --method dss"
    assert run(one_step, limits, f"--eval-data {tmp_path}/rows.jsonl") == 0
    said = capsys.readouterr().err
    assert "16 of 16 validation inputs and 1 of 5 test inputs are training inputs too" in said
    found = result(tmp_path / "out", "dss")
    assert found["inputs_cut"] == 32 and 16 <= found["targets_cut"] <= 32
    assert f"32 inputs cut at 6 tokens, {found['targets_cut']} targets cut at 5 tokens;" in said


def test_a_runs_speed_leaves_its_evaluations_out(files, tmp_path, monkeypatch):
    passed = []
    clock = SimpleNamespace(monotonic=lambda: sum(passed))
    monkeypatch.setattr("dss.log.time", clock)
    monkeypatch.setattr(train, "evaluate", watched("evaluate", lambda *_: passed.append(1000.0)))
    monkeypatch.setattr(train, "train_step", watched("train_step", lambda *_: passed.append(1.0)))
    assert run(files, SIX, f"--out {tmp_path}/out") == 0
    line = json_lines(tmp_path / "out" / "dss" / "metrics.jsonl")[-2]
    assert line["tokens_per_second"] == round(result(tmp_path / "out", "dss")["tokens"] / 6)


def test_the_report_shows_three_answers_and_what_to_run_next(one_step, tmp_path, capsys):
    assert run(one_step, "--method standard") == 0
    shown = capsys.readouterr().out
    assert "14 training rows, 14 with a rationale; 2 validation, 4 test" in shown
    assert "weights, gradients and optimiser state take" in shown
    assert shown.count("  question   ") == 3 and "(nothing)   (gold: 16 + 1)" in shown
    assert "with --resume --method standard NAME adds a student" in shown
    finished = result(tmp_path / "out", "standard")
    finished["samples"][0]["input"] = "字" * 500
    write_json(tmp_path / "out" / "standard" / "result.json", finished)
    assert run(one_step, "--method standard dss --resume") == 0
    shown = capsys.readouterr().out
    assert "dss - standard:" in shown and "as the dss student answers them" in shown
    assert run(one_step, "--method standard --resume") == 0
    assert "字" * 96 + " ...\n" in capsys.readouterr().out, "a text without spaces is cut, too"


def test_labels_of_the_teacher_are_not_called_gold(tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", counting(20))
    data = f"--data {tmp_path}/rows.jsonl --labels teacher --method standard"
    assert run(data, QUICK, f"--steps 1 --out {tmp_path}/out") == 0
    shown = capsys.readouterr().out
    assert "(teacher's: " in shown and "gold" not in shown


@pytest.mark.parametrize(
    "losses, commonest, bag, reason",
    [
        ([2.0, 1.0], 0.5, 0.5, "its loss was falling fast"),
        ([0.038, 0.030], 0.5, None, ""),  # fast for its size, but at its end
        ([2.0, 1.0], 0.9, None, "no better than the commonest label"),
        ([1.0, 1.0], 0.5, 0.95, "less accurate than a bag of words"),
    ],
)
def test_a_run_is_doubted_that_was_too_short_or_no_better_than_what_is_simple(
    tmp_path, losses, commonest, bag, reason
):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"label_loss": loss}) + "\n" for loss in losses))
    figures = dict(validation_accuracy=0.9, test_accuracy=None, best_step=9, steps=9)
    figures |= dict(commonest_label=commonest, bag_of_words=bag)
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
