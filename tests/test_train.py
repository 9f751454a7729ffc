"""train.py as a user meets it: a run, its files, bad input, interruption and resumption."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from running import ROOT, at_step, counting, prepare, result, run, same, wait_until, watched, weights, write_rows

import tokenizer
import train
from data.cli import Interrupted, Stop
from data.jsonl import Record, read_jsonl, write_jsonl
from dss.batch import LABEL, RATIONALE
from dss.config import parse_args
from dss.rows import load_rows, rows_for, swap_rationales
from dss.run.start import make_model
from dss.run.state import Keeper, Progress, save_state
from dss.study.presets import PRESETS
from dss.weights import load_t5, save_t5

QUICK = "--steps 6 --eval_every 3 --log_every 2 --batch_size 4 --warmup 2 --max_target_length 12".split()


@pytest.fixture
def files(tmp_path):
    """Training rows (two of them without a label, one without a rationale) and test rows with equations."""
    bare = [Record("bare", "How many?", "1 + 1"), Record("n1", "x y"), Record("n2", "y", None, "no")]
    return write_rows(tmp_path, [*counting(24)[:20], *bare, *counting(24)[20:]], 23)


def test_a_run_writes_what_the_contract_names(files, tmp_path, capsys):
    out = tmp_path / "out"
    methods = ["standard", "dss", "label_first", "single_task", "dss-shuffled", "dss-scrambled"]
    assert run(*files, *QUICK, "--method", *methods, "--out", out) == 0
    shown = capsys.readouterr().out
    for method in methods:
        made = {p.name for p in (out / method).iterdir()}
        assert made == {"config.json", "metrics.jsonl", "result.json", "predictions.jsonl", "student"}
        figures = result(out, method)
        assert figures["steps"] == 6 and 0 <= figures["test_accuracy"] <= 1 and figures["metric"] == "equation"
        config = json.loads((out / method / "config.json").read_text())
        assert config["method"] == method and config["steps"] == 6 and config["learning_rate"] == 1e-3
        lines = [json.loads(line) for line in (out / method / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
        trained = {"loss", "label_loss", "rationale_loss", "tokens_per_second"}
        assert all(trained <= lines[i].keys() for i in (0, 2, 3))
        assert lines[1].keys() == lines[4].keys() == {"step", "validation_accuracy"}
        predictions = [json.loads(line) for line in (out / method / "predictions.jsonl").read_text().splitlines()]
        assert [p["id"] for p in predictions] == ["r20", "r21", "r22", "r23"]
        assert sum(p["correct"] for p in predictions) / 4 == figures["test_accuracy"]
        assert method in shown
        model, tok = load_t5(out / method / "student"), tokenizer.T5Tokenizer(out / method / "student")
        assert tok.vocab_size <= model.config.vocab_size
    assert "19 training rows, 18 with a rationale (2 more without a label); 2 validation, 4 test" in shown
    assert "dss - standard:" in shown and "as the dss student answers them" in shown and str(out) in shown
    assert all(s["rationale"] is not None for s in result(out, "dss")["samples"])


def test_transformers_loads_the_student_and_its_tokenizer(files, tmp_path, transformers, auto_tokenizer):
    assert run(*files, *QUICK, "--method", "dss", "--out", tmp_path / "out") == 0
    student = tmp_path / "out" / "dss" / "student"
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(student)
    their_tokenizer = auto_tokenizer.from_pretrained(student)
    prediction = json.loads((student.parent / "predictions.jsonl").read_text().splitlines()[0])
    ids = their_tokenizer("predict: " + prediction["input"], return_tensors="pt").input_ids
    written = theirs.generate(ids, max_new_tokens=4, do_sample=False)[0]
    assert their_tokenizer.decode(written, skip_special_tokens=True).strip() == prediction["prediction"].strip()


def test_the_same_seed_gives_the_same_student_and_another_seed_another(files, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(*files, *QUICK, "--method", "dss", "--seed", seed, "--dropout", 0.1, "--out", tmp_path / name) == 0
    a, b, c = (weights(tmp_path / name / "dss") for name in "abc")
    assert same(a, b) and not same(a, c)


def test_finetuning_starts_from_public_weights(files, tmp_path):
    """--weights brings its tokenizer, its shape and its dropout along; --dropout replaces the last."""
    assert run(*files, *QUICK, "--method", "standard", "--out", tmp_path / "one") == 0
    student = tmp_path / "one" / "standard" / "student"
    assert run(*files, *QUICK, "--method", "dss", "--weights", student, "--lr", 1e-9, "--out", tmp_path / "two") == 0
    before, after = weights(tmp_path / "one" / "standard"), weights(tmp_path / "two" / "dss")
    assert before.keys() == after.keys() and all((before[n] - after[n]).abs().max() < 1e-6 for n in before)
    config = parse_args(["--weights", str(student), "--dropout", "0.25"])
    loaded = make_model(config, tokenizer.T5Tokenizer(student))
    assert loaded.config.dropout_rate == 0.25 and loaded.encoder.layers[0].self_attention.dropout_p == 0.25


def test_teacher_labels_train_and_gold_labels_test(files, tmp_path):
    """Also with Adafactor, in bfloat16 and at a constant rate."""
    other = "--optimizer adafactor --dtype bfloat16 --schedule constant --method standard --labels teacher".split()
    assert run(*files, *QUICK, *other, "--out", tmp_path / "out") == 0
    rows = load_rows(parse_args([*files, "--labels", "teacher"]))
    assert all(r.label == r.teacher_label for r in rows.train + rows.validation)
    assert rows.unlabelled == 3 and all(r.label != r.teacher_label for r in rows.test)


def test_rows_are_divided_by_seed_without_overlap(files):
    def ids(*arguments):
        rows = load_rows(parse_args([*files, *arguments]))
        return [r.id for r in rows.train], [r.id for r in rows.validation]

    training, validation = ids()
    assert len(training) == 19 and len(validation) == 2 and not set(training) & set(validation)
    assert ids() == (training, validation) != ids("--seed", "1")
    few, many = (set(sum(ids("--subsample", share), [])) for share in ("0.25", "0.5"))
    assert len(few) == 5 and len(many) == 10 and few < many
    given = load_rows(parse_args([*files, "--eval_data", files[-1]]))
    assert len(given.train) == 21 and [r.id for r in given.validation] == ["r20", "r21", "r22", "r23"]


def test_gold_or_teacher_keeps_gold_where_subsample_leaves_it(files):
    """Of 26 rows 20 have both labels, one gold alone, three the teacher's alone, two neither."""
    alone = [Record(f"t{i}", f"How many pears are {i}?", None, f"Count {i}.", f"teacher {i}") for i in range(3)]
    write_jsonl(Path(files[1]).with_name("more.jsonl"), alone)
    data = [files[0], files[1], str(Path(files[1]).with_name("more.jsonl")), *files[2:]]
    rows = load_rows(parse_args([*data, "--labels", "gold-or-teacher", "--subsample", "0.5"]))
    gold = load_rows(parse_args([*data, "--labels", "gold", "--subsample", "0.5"]))
    assert rows.validation == gold.validation and rows.train[: len(gold.train)] == gold.train
    added = rows.train[len(gold.train) :]
    assert added and all(r.label == r.teacher_label for r in added) and {"t0", "t1", "t2"} <= {r.id for r in added}
    everyone = [r.id for r in rows.train + rows.validation]
    assert len(set(everyone)) == len(everyone) == 26 - rows.unlabelled
    full = load_rows(parse_args([*data, "--labels", "gold-or-teacher"]))
    assert len(full.train + full.validation) == 24 and full.unlabelled == 2


def test_matched_standard_trains_on_as_many_tokens_as_dss(files, tmp_path):
    steps = ["--steps", "30", "--eval_every", "60"]
    arms = ["--method", "dss", "standard-matched", "--out", tmp_path / "out"]
    assert run(*files, *QUICK, *steps, *arms) == 0
    dss, matched = result(tmp_path / "out", "dss"), result(tmp_path / "out", "standard-matched")
    assert matched["steps"] > 30 and abs(matched["tokens"] / dss["tokens"] - 1) < 0.03


def test_shuffled_rationales_all_stand_on_another_row():
    rows = [Record(str(i), f"q{i}", f"l{i}", None if i % 5 == 0 else f"why {i}") for i in range(40)]
    swapped = swap_rationales(rows, 0)
    assert [(r.input, r.label) for r in swapped] == [(r.input, r.label) for r in rows]
    assert sorted(r.rationale or "" for r in swapped) == sorted(r.rationale or "" for r in rows)
    for before, after in zip(rows, swapped):
        assert (before.rationale is None) == (after.rationale is None)
        assert after.rationale is None or after.rationale != before.rationale


def test_scrambled_rationales_keep_their_words_and_stay_on_their_row():
    rows = [Record(str(i), f"q{i}", "l", None if i % 5 == 0 else f"a b c d e {i}") for i in range(40)]
    scrambled = rows_for("dss-scrambled", rows, 0)
    assert scrambled == rows_for("dss-scrambled", rows, 0) != rows_for("dss-scrambled", rows, 1)
    for before, after in zip(rows, scrambled):
        assert sorted((before.rationale or "").split()) == sorted((after.rationale or "").split())
        assert replace(after, rationale=before.rationale) == before
    assert len({tuple(r.rationale.split()[:-1]) for r in scrambled if r.rationale}) > 10, "not one order for all rows"
    several = rows_for("dss-scrambled", [Record("a", "q", "l", ["a b c d e f", "g h i j k l"])], 0)[0].rationale
    assert [sorted(text) for text in several] == [sorted("a b c d e f"), sorted("g h i j k l")]


def test_each_epoch_trains_on_the_next_rationale_of_a_row(files, tmp_path, monkeypatch):
    """A row with two rationales costs a step what it did with one."""
    rows = [Record(f"r{i}", f"q {i}", "x", [f"first {i}", f"second {i}"]) for i in range(4)]
    write_jsonl(tmp_path / "several.jsonl", rows)
    assert list(read_jsonl(tmp_path / "several.jsonl")) == rows
    seen = []

    def see(student, optimizer, work, *_):
        (batch,) = work.batches
        targets = zip(batch.task.tolist(), batch.labels.tolist())
        text = student.tokenizer.decode([token for task, token in targets if task == RATIONALE])
        seen.append(re.findall("first|second", text))

    monkeypatch.setattr(train, "train_step", watched("train_step", see))
    given = ["--data", tmp_path / "several.jsonl", "--eval_data", tmp_path / "several.jsonl", "--method", "dss"]
    assert run(*given, *QUICK, "--out", tmp_path / "out") == 0
    assert seen == [["first"] * 4, ["second"] * 4] * 3


def test_each_epoch_sees_each_row_once():
    config, n = parse_args("--batch_size 3 --seed 5".split()), 7
    seen = [place for step in range(14) for place in train.rows_of_step(step, n, config)]
    epochs = [seen[e * n : (e + 1) * n] for e in range(6)]
    assert all(sorted(epoch) == [(i, e) for i in range(n)] for e, epoch in enumerate(epochs))
    assert len({tuple(i for i, _ in epoch) for epoch in epochs}) > 1
    assert len(train.rows_of_step(0, 2, config)) == 3, "a step may be larger than the data"


def test_the_learning_rate_rises_and_falls():
    config = parse_args("--steps 10 --warmup 4 --lr 1.0".split())
    rates = [train.learning_rate(step, config) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0 and rates[9] == pytest.approx(1 / 6)
    level = parse_args("--steps 10 --warmup 4 --lr 1.0 --schedule constant".split())
    assert [train.learning_rate(step, level) for step in (3, 9)] == [1.0, 1.0]


def test_thirty_steps_of_the_papers_settings_move_the_weights_as_transformers_does(files, tmp_path, transformers):
    """Linear decay without warm-up, AdamW, clipping at 1: what the released code's trainer does by default."""
    given = PRESETS["cqa-base"]
    names = ("lr", "schedule", "warmup", "beta2", "weight_decay")
    settings = [word for name in names for word in (f"--{name}", given[name])]
    ready = prepare(*files, *settings, "--steps", 30, "--dropout", 0, "--batch_size", 4)
    save_t5(ready.student.model, tmp_path / "first")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "first").train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=given["lr"], weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 30)
    examples, _ = train.make_examples(ready.rows.train, "dss", ready.config, ready.student.tokenizer)
    ours = train.make_optimizer(ready.student.model, ready.config)
    first = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    for step, work in enumerate(train.steps_ahead(0, examples, ready.student, ready.config)):
        rows = [examples.sequences(row, 0) for row, _ in train.rows_of_step(step, len(examples), ready.config)]
        train.train_step(ready.student, ours, work, train.learning_rate(step, ready.config), ready.config)
        loss = 0.0
        for task in (LABEL, RATIONALE):  # two padded passes, a mean each
            some = [s for row in rows for s in row if s.task == task]
            pad = torch.nn.utils.rnn.pad_sequence
            x, y = ([torch.tensor(getattr(s, name)) for s in some] for name in ("input_ids", "target_ids"))
            x, y = pad(x, batch_first=True), pad(y, batch_first=True, padding_value=-100)
            loss = loss + theirs(input_ids=x, attention_mask=x.ne(0).long(), labels=y).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    save_t5(ready.student.model, tmp_path / "last")
    last = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "last")
    for (name, a), b in zip(last.named_parameters(), theirs.parameters()):
        assert (a - b).norm() <= 1e-5 * b.norm(), name
        assert (b - first[name]).norm() > 1e-5 * b.norm(), "the weights have moved"


def write(path, text):
    path.write_text(text)
    return path


ROW = '{"input": "x", "label": "y"}'
BAD = {
    "missing data": (lambda d: ["--data", d / "none.jsonl"], "none.jsonl"),
    "a directory": (lambda d: ["--data", d], "directory"),
    "bad JSON": (lambda d: ["--data", write(d / "bad.jsonl", '{"input": "x"}\n{"inp')], "bad.jsonl:2: not JSON"),
    "no input": (lambda d: ["--data", write(d / "bad.jsonl", '{"label": "x"}')], 'bad.jsonl:1: "input" must be'),
    "empty file": (lambda d: ["--data", write(d / "e.jsonl", "")], "e.jsonl: no row has a gold label"),
    "no label": (lambda d: ["--data", write(d / "n.jsonl", '{"input": "x"}')], "n.jsonl: no row has a gold label"),
    "no teacher": (lambda d: ["--data", write(d / "n.jsonl", ROW), "--labels", "teacher"], "no row has a teacher"),
    "one row": (lambda d: ["--data", write(d / "n.jsonl", ROW)], "one usable row cannot"),
    "missing test": (lambda d: ["--data", d / "rows.jsonl", "--test_data", d / "none.jsonl"], "none.jsonl"),
    "test only": (lambda d: ["--test_data", d / "test.jsonl"], "go with --data"),
    "no weights": (lambda d: ["--data", d / "rows.jsonl", "--weights", d / "none"], "none: no such directory of"),
    "no config": (lambda d: ["--data", d / "rows.jsonl", "--weights", d / "empty"], "config.json: missing"),
    "no spiece": (lambda d: ["--data", d / "rows.jsonl", "--spiece", d / "none.model"], "none.model: no such"),
    "vocabulary": (lambda d: ["--data", d / "rows.jsonl", "--vocab_size", "5"], "no tokenizer of 5 pieces"),
    "out is a file": (lambda d: ["--data", d / "rows.jsonl", "--out", write(d / "f", "x")], "f: not a directory"),
    "an arm is a file": (
        lambda d: ["--data", d / "rows.jsonl", "--out", write(d / "empty" / "dss", "x").parent, "--resume"],
        "dss: not a directory",
    ),
    "cuda": (lambda d: ["--data", d / "rows.jsonl", "--device", "cuda"], "PyTorch sees no GPU"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_2_and_nothing_is_written(files, tmp_path, refused, monkeypatch, case):
    if case == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    arguments, words = BAD[case]
    arguments = arguments(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert words in refused(train.main, *arguments, *QUICK)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tokenizer_too_large_for_the_weights_is_named(files, tmp_path, spiece, capsys):
    assert run(*files, *QUICK, "--method", "standard", "--vocab_size", "60", "--out", tmp_path / "one") == 0
    student = tmp_path / "one" / "standard" / "student"
    assert run(*files, "--weights", student, "--spiece", spiece / "spiece.model", "--out", tmp_path / "two") == 2
    assert "the tokenizer has" in capsys.readouterr().err and not (tmp_path / "two").exists()


def test_an_output_directory_that_exists_needs_resume_or_overwrite(files, tmp_path, refused):
    out = tmp_path / "out"
    out.mkdir()
    arguments = [*files, *QUICK, "--out", out, "--method", "standard"]
    assert run(*arguments) == 0, "an empty directory is free to use"
    first = (out / "standard" / "result.json").stat().st_mtime_ns
    (out / "standard" / "state.pt").write_bytes(b"what a run leaves that is killed as it ends")
    assert "--resume goes on with it, --overwrite replaces it" in refused(train.main, *arguments)
    assert run(*arguments, "dss", "--resume") == 0
    assert (out / "standard" / "result.json").stat().st_mtime_ns == first, "a finished arm is not repeated"
    assert result(out, "dss")["steps"] == 6 and not (out / "standard" / "state.pt").exists()
    assert run(*arguments, "--overwrite") == 0
    assert (out / "standard" / "result.json").stat().st_mtime_ns != first and (out / "dss").exists()


def test_overwrite_deletes_nothing_but_runs(files, tmp_path, refused):
    precious = tmp_path / "out" / "standard" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    said = refused(train.main, *files, *QUICK, "--out", tmp_path / "out", "--overwrite")
    assert "will not delete" in said and precious.read_text() == "years of work"
    precious.unlink()
    assert run(*files, *QUICK, "--out", tmp_path / "out", "--overwrite") == 0, "an empty directory is no loss"


def test_resume_refuses_changed_rows(files, tmp_path, capsys):
    arguments = [*files, *QUICK, "--method", "standard", "--out", tmp_path / "out"]
    assert run(*arguments) == 0
    path = Path(files[1])
    write_jsonl(path, [Record(r.id, r.input + "!", r.label, r.rationale) for r in read_jsonl(path)])
    assert run(*arguments, "--resume") == 2
    assert "was started with other rows" in capsys.readouterr().err


def stop_at(n):
    """Stop.check that interrupts a run when it asks for the n-th time."""
    return Mock(side_effect=[None] * (n - 1) + [Interrupted])


@pytest.mark.parametrize("asked", [1, 3, 4, 5, 7, 8, 9, 11])
def test_an_interrupted_run_resumes_to_the_same_student(files, tmp_path, capsys, monkeypatch, asked):
    """Wherever it is cut, in a step, an evaluation or the test: dropout, order and selection go on as they were. The
    losses since the last line were lost, and the next line was a mean over the rest."""
    arguments = [*files, *QUICK, "--method", "dss", "--dropout", "0.1", "--steps", "7", "--log_every", "5"]
    assert run(*arguments, "--out", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "check", stop_at(asked))
        assert run(*arguments, "--out", tmp_path / "cut") == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert {"state.pt", "student", "metrics.jsonl"} <= {p.name for p in (tmp_path / "cut" / "dss").iterdir()}
    load_t5(tmp_path / "cut" / "dss" / "student")
    assert run(*arguments, "--out", tmp_path / "cut", "--resume") == 0
    assert same(weights(tmp_path / "whole" / "dss"), weights(tmp_path / "cut" / "dss"))
    for name in ("predictions.jsonl", "metrics.jsonl"):
        whole, cut = (without_speed(tmp_path / out / "dss" / name) for out in ("whole", "cut"))
        assert whole == cut and (name != "metrics.jsonl" or "loss" in cut[-2])
    assert not (tmp_path / "cut" / "dss" / "state.pt").exists()


def without_speed(path):
    return [json.loads(line) | {"tokens_per_second": 0} for line in path.read_text().splitlines()]


def test_sigint_ends_a_real_process_cleanly(files, tmp_path):
    out = tmp_path / "out"
    arguments = [*files, "--steps", "100000", "--eval_every", "5", "--save_minutes", "0", "--out", str(out)]
    process = subprocess.Popen([sys.executable, "train.py", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until((out / "standard" / "state.pt").exists)
    os.kill(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in error
    assert "interrupted at step" in error.splitlines()[-1] and "--resume goes on" in error.splitlines()[-1]
    assert (out / "standard" / "student" / "model.safetensors").exists()


def test_a_killed_run_leaves_a_state_to_resume_and_torn_log_lines_are_dropped(files, tmp_path, monkeypatch):
    arguments = [*files, *QUICK, "--method", "dss", "--save_minutes", "0"]
    assert run(*arguments, "--out", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", at_step([4], lambda model: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            run(*arguments, "--out", tmp_path / "killed")
    assert (tmp_path / "killed" / "dss" / "state.pt").exists()
    with open(tmp_path / "killed" / "dss" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert run(*arguments, "--out", tmp_path / "killed", "--resume") == 0
    assert same(weights(tmp_path / "whole" / "dss"), weights(tmp_path / "killed" / "dss"))
    lines = (tmp_path / "killed" / "dss" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3, 4, 6, 6]


def test_a_damaged_state_is_one_line(files, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "check", stop_at(2))
        assert run(*files, *QUICK, "--out", tmp_path / "out") == 130
    state = tmp_path / "out" / "standard" / "state.pt"
    state.write_bytes(b"junk")
    assert run(*files, *QUICK, "--out", tmp_path / "out", "--resume") == 2
    assert "state.pt: not the state of this run" in capsys.readouterr().err
    student = prepare(*files, *QUICK, "--out", tmp_path / "new").student
    optimizer = train.make_optimizer(student.model, parse_args([]))
    older = {name: value for name, value in vars(Progress()).items() if name != "logged"}
    for progress in (older, vars(Progress()) | {"patience": 3}):
        save_state(state, student.model, optimizer, progress)
        with pytest.raises(ValueError, match="state.pt: the state of a run by another version"):
            Keeper(state.parent, student, optimizer, parse_args([]))
