"""What train.py promises beyond a clean run: how it ends early, what it refuses to join, and what it says."""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from running import at_step, counting, prepare, result, run, same, watched, weights, write_rows

import tokenizer
import train
from data.cli import Interrupted, Stop, guard_streams
from data.files import write_json
from data.jsonl import Record, write_jsonl
from dss.config import parse_args
from dss.rows import load_rows
from dss.run.report import correct, too_short
from dss.run.start import choose_device
from dss.run.state import save_state
from dss.weights import load_t5

QUICK = "--batch_size 4 --warmup 2 --max_target_length 12 --max_new_tokens 4".split()
SIX = [*QUICK, "--steps", "6", "--eval_every", "2", "--log_every", "100", "--method", "dss"]


@pytest.fixture
def files(tmp_path):
    return write_rows(tmp_path, counting(20), 16)


@pytest.fixture
def pretrained(files, tmp_path):
    """A directory of weights with a tokenizer: a student of one step."""
    assert run(*files, *QUICK, "--steps", "1", "--method", "standard", "--out", tmp_path / "first") == 0
    return tmp_path / "first" / "standard" / "student"


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


def spoil(model):
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))


def test_a_diverged_student_is_never_the_best_nor_saved_and_the_best_is_kept(files, tmp_path, monkeypatch, capsys):
    """The loss was looked at every --log_every steps alone: NaN weights were selected in between, and saved."""
    monkeypatch.setattr(train, "train_step", at_step([5], spoil))
    monkeypatch.setattr(train, "evaluate", scripted([0.5, 0.2]))
    assert run(*files, *SIX, "--save_minutes", "0", "--out", tmp_path / "out") == 1
    line = last_line(capsys)
    assert line.startswith("train.py: the loss is nan by step 6") and "--lr, with --overwrite" in line
    assert "dss/student is the best so far" in line
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out" / "dss").values())
    state = torch.load(tmp_path / "out" / "dss" / "state.pt", weights_only=True)
    assert state["progress"]["best_step"] == 2 and state["progress"]["step"] == 4
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_weights_that_a_last_step_made_infinite_are_not_kept(files, tmp_path, monkeypatch, capsys):
    """The loss of the step was finite, its update was not."""
    assert run(*files, *SIX, "--lr", "1e38", "--clip", "0", "--eval_every", "1", "--out", tmp_path / "out") == 1
    assert "has no student, because none was evaluated" in last_line(capsys)
    assert not (tmp_path / "out" / "dss" / "state.pt").exists()


def test_ctrl_c_on_a_diverged_run_saves_no_state(files, tmp_path, monkeypatch, capsys):
    def spoil_and_stop(model):
        spoil(model)
        monkeypatch.setattr(Stop, "check", Mock(side_effect=Interrupted))

    monkeypatch.setattr(train, "train_step", at_step([0], spoil_and_stop))
    assert run(*files, *SIX, "--out", tmp_path / "out") == 1
    assert "no longer a finite number" in last_line(capsys) and not (tmp_path / "out" / "dss" / "state.pt").exists()


@pytest.mark.parametrize(
    "error, words",
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "out of memory; --micro-batch N"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory; --micro-batch N"),
        (OSError(28, "No space left on device", "x/state.pt"), "x/state.pt: No space left on device"),
        (RuntimeError("shapes do not match"), None),
    ],
)
def test_an_error_in_training_keeps_the_best_student(files, tmp_path, monkeypatch, capsys, error, words):
    monkeypatch.setattr(train, "train_step", at_step([3], Mock(side_effect=error)))
    if words:
        assert run(*files, *SIX, "--out", tmp_path / "out") == 1
        line = last_line(capsys)
        assert line.startswith(f"train.py: {words}") and "dss/student is the best so far" in line
    else:
        with pytest.raises(RuntimeError, match="shapes"):  # a mistake of the program's keeps its traceback
            run(*files, *SIX, "--out", tmp_path / "out")
    load_t5(tmp_path / "out" / "dss" / "student")


def test_a_full_disk_is_named_as_such(tmp_path, monkeypatch):
    """torch.save raises RuntimeError("unexpected pos 1280 vs 1174") for it."""

    def full(_, file):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 1280 vs 1174")

    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"state.pt: cannot be written \(No space left on device\)"):
        save_state(tmp_path / "state.pt", model, torch.optim.SGD(model.parameters()), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("handler, heard", [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_closed_terminal_asks_a_run_to_stop_unless_nohup_has_it_ignored(handler, heard):
    was = signal.signal(signal.SIGHUP, handler)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested == heard
    finally:
        signal.signal(signal.SIGHUP, was)


def test_resume_compares_with_every_arm_in_the_directory(files, tmp_path, capsys):
    """`--resume --method dss --lr 0.5` put a run of another learning rate beside standard's, into one table."""
    arguments = [*files, *QUICK, "--steps", "2", "--out", tmp_path / "out"]
    assert run(*arguments, "--method", "standard", "--resume") == 0
    assert f"nothing to resume in {tmp_path / 'out'}; starting" in capsys.readouterr().err
    old = {"lr": "--lr 0.001", "dropout": "no --dropout", "seed": "--seed 0", "subsample": "--subsample 1.0"}
    for name, was in old.items():
        for method in ("standard", "dss"):
            assert run(*arguments, "--method", method, f"--{name}", "0.5" if name != "seed" else "1", "--resume") == 2
            assert f"standard was started with {was}, not --{name} " in last_line(capsys)
    assert run(*arguments, "--method", "standard", "--lr", "0.001", "--resume") == 0, "the same rate, said aloud"
    assert "nothing to resume" not in capsys.readouterr().err


def test_the_same_weights_named_otherwise_are_the_same(files, pretrained, tmp_path, capsys):
    arguments = [*files, *QUICK, "--steps", "1", "--method", "standard", "--out", tmp_path / "out"]
    assert run(*arguments, "--weights", pretrained) == 0
    assert run(*arguments, "--weights", f"{pretrained}/", "--resume") == 0
    shutil.copytree(pretrained, tmp_path / "other")
    assert run(*arguments, "--weights", tmp_path / "other", "--resume") == 2
    assert "--weights" in last_line(capsys)


@pytest.mark.parametrize("method, least", [("standard", 0), ("dss", 1), ("dss-shuffled", 2), ("single_task", 1)])
def test_a_method_without_the_rationales_it_needs_is_refused(tmp_path, method, least):
    """It trained as another method, under its own name in the table."""
    path = tmp_path / "rows.jsonl"
    config = parse_args(["--data", str(path), "--eval_data", str(path), "--method", method])
    for number in range(3):
        write_jsonl(path, [Record(f"r{i}", f"q {i}", "x", "why" if i < number else None) for i in range(9)])
        if number < least:
            with pytest.raises(ValueError, match=f"rows.jsonl: .* a rationale, too few for --method {method};"):
                load_rows(config)
        else:
            load_rows(config)


def test_single_task_is_refused_where_there_is_no_separator(files, pretrained, tmp_path, refused):
    (pretrained / "tokenizer_config.json").write_text('{"extra_ids": 0}')
    for spiece in (pretrained, pretrained / "spiece.model"):
        flags = ["--spiece", spiece, "--method", "single_task", "--out", tmp_path / "out"]
        assert "--method single_task needs the token <extra_id_0>" in refused(train.main, *files, *flags)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_not_the_weights_own_is_warned_of(files, pretrained, spiece, tmp_path, capsys):
    (tmp_path / "small").mkdir()
    tokenizer.train(["a b c"], tmp_path / "small" / "spiece.model", 12)
    prepare(*files, "--weights", pretrained, "--spiece", pretrained / "spiece.model", "--out", tmp_path / "a")
    assert "warning" not in capsys.readouterr().err
    prepare(*files, "--weights", pretrained, "--spiece", tmp_path / "small", "--out", tmp_path / "b")
    assert "warning: --spiece" in last_line(capsys)


def test_overwrite_does_not_delete_what_the_run_reads(files, pretrained, refused):
    """`--overwrite --weights OUT/standard/student` deleted its own first weights, before reading them."""
    out = pretrained.parents[1]
    for flag in ("--weights", "--spiece", "--data"):
        path = pretrained if flag == "--weights" else pretrained / "spiece.model"
        if flag == "--data":
            path = shutil.copy(files[1], pretrained / "rows.jsonl")
        arguments = [*files, *QUICK, flag, path, "--method", "standard", "--out", out, "--overwrite"]
        assert f"--overwrite would delete {pretrained.parent}" in refused(train.main, *arguments)
        assert pretrained.exists()


def test_bfloat16_is_refused_on_a_gpu_that_does_not_compute_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with pytest.raises(ValueError, match="--dtype bfloat16: Tesla V100"):
        choose_device("auto", "bfloat16")
    assert choose_device("auto").type == "cuda" and choose_device("cpu", "bfloat16").type == "cpu"


def test_inputs_in_two_places_and_texts_that_were_cut_are_counted(files, tmp_path, capsys):
    Path(files[3]).write_text(Path(files[1]).read_text().split("\n")[0] + "\n" + Path(files[3]).read_text())
    limits = ["--max_input_length", "6", "--max_target_length", "5", "--vocab_size", "100", "--eval_data", files[1]]
    assert run(*files, *QUICK, "--steps", "1", "--method", "dss", *limits, "--out", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert "16 of 16 validation inputs and 1 of 5 test inputs are training inputs too" in error
    found = result(tmp_path / "out", "dss")
    assert found["inputs_cut"] and 16 <= found["targets_cut"] <= 32
    cut = f"dss: {found['inputs_cut']} inputs cut at 6 tokens, {found['targets_cut']} targets cut at 5 tokens; see"
    assert cut in error


def scripted(shares, seen=None):
    """train.evaluate, but the validation accuracies are `shares`; `seen` collects the weights that were looked at."""
    left, original = iter(shares), train.evaluate

    def evaluate(student, rows, stop, what):
        right, answers = original(student, rows, stop, what)
        if what == "validation":
            right = [True] * round(10 * (share := next(left))) + [False] * round(10 * (1 - share))
        if seen is not None:
            seen.append({name: tensor.clone() for name, tensor in student.model.state_dict().items()})
        return right, answers

    return evaluate


@pytest.mark.parametrize("shares, best", [([0.2, 0.5, 0.1], 1), ([0.5, 0.5, 0.1], 1), ([0.5, 0.4, 0.4], 0)])
def test_the_weights_that_were_best_on_validation_are_tested_and_saved(files, tmp_path, monkeypatch, shares, best):
    """A tie goes to the weights that have learned longer."""
    seen = []
    monkeypatch.setattr(train, "evaluate", scripted(shares, seen))
    assert run(*files, *SIX, "--out", tmp_path / "out") == 0
    figures = result(tmp_path / "out", "dss")
    assert figures["best_step"] == 2 * (best + 1) and figures["validation_accuracy"] == shares[best]
    assert len(seen) == 4 and same(seen[3], seen[best]) and same(weights(tmp_path / "out" / "dss"), seen[best])
    assert not same(seen[0], seen[1]) and not same(seen[1], seen[2])


def test_schedule_decay_rates_and_weight_decay_reach_the_optimiser(files, tmp_path, monkeypatch):
    used, original = [], train.train_step

    def spy(student, optimizer, *rest):
        result = original(student, optimizer, *rest)
        used.append(dict(optimizer.param_groups[0]))
        return result

    monkeypatch.setattr(train, "train_step", spy)
    settings = ["--beta2", "0.9", "--weight_decay", "0.3", "--lr", "0.01"]
    assert run(*files, *SIX, *settings, "--out", tmp_path / "out") == 0
    config = parse_args([*SIX, *settings])
    assert [group["lr"] for group in used] == [train.learning_rate(step, config) for step in range(6)]
    assert {group["betas"] for group in used} == {(0.9, 0.9)} and {group["weight_decay"] for group in used} == {0.3}


def one_step(run):
    """(norm before clipping, how far the weights moved) of one step of plain gradient descent with rate 1."""
    examples, _ = train.make_examples(run.rows.train, "dss", run.config, run.student.tokenizer)
    weights = list(run.student.model.parameters())
    before = [p.detach().clone() for p in weights]
    work = next(train.steps_ahead(0, examples, run.student, run.config))
    _, norm = train.train_step(run.student, torch.optim.SGD(weights, lr=1.0), work, 1.0, run.config)
    return norm.item(), torch.stack([(p - b).norm() for p, b in zip(weights, before)]).norm().item()


def test_gradients_are_clipped_to_the_norm_asked_for_or_not_at_all(files, tmp_path):
    for clip in (0.01, 0.0):
        ready = prepare(*files, *SIX, "--clip", clip, "--dropout", 0, "--out", tmp_path / str(clip))
        norm, moved = one_step(ready)
        assert norm > 0.1 and moved == pytest.approx(clip or norm, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_computed_in_while_training_and_answering(files, tmp_path, dtype):
    ready, found = prepare(*files, *SIX, "--dtype", dtype, "--out", tmp_path / "out"), []
    ready.student.model.decoder.layers[0].self_attention.q.register_forward_hook(lambda _, __, y: found.append(y.dtype))
    one_step(ready)
    ready.student.write("predict", [ready.rows.test[0].input], 1)
    assert found == [getattr(torch, dtype)] * 2
    assert all(p.dtype == torch.float32 for p in ready.student.model.parameters())


def test_training_begins_targets_with_the_checkpoints_start_token(files, pretrained, tmp_path, monkeypatch):
    config = json.loads((pretrained / "config.json").read_text()) | {"decoder_start_token_id": 7}
    (pretrained / "config.json").write_text(json.dumps(config))
    first = []
    see = lambda _, batch, *__: first.extend(batch.decoder_input_ids[batch.targets.cu_seqlens[:-1].long()].tolist())
    monkeypatch.setattr(train, "distillation_loss", watched("distillation_loss", see))
    ready = prepare(*files, *SIX, "--weights", pretrained, "--out", tmp_path / "out")
    one_step(ready)
    assert first == [7] * 8


def test_a_runs_speed_leaves_its_evaluations_out(files, tmp_path, monkeypatch):
    passed = [0.0]
    monkeypatch.setattr("dss.run.report.time", SimpleNamespace(monotonic=lambda: sum(passed)))
    monkeypatch.setattr(train, "evaluate", watched("evaluate", lambda *_: passed.append(1000.0)))
    monkeypatch.setattr(train, "train_step", watched("train_step", lambda *_: passed.append(1.0)))
    assert run(*files, *SIX, "--out", tmp_path / "out") == 0
    *_, line, _ = (tmp_path / "out" / "dss" / "metrics.jsonl").read_text().splitlines()
    tokens = result(tmp_path / "out", "dss")["tokens"]
    assert json.loads(line)["tokens_per_second"] == round(tokens / 6)


def test_the_report_shows_three_answers_and_what_to_run_next(files, tmp_path, capsys):
    arguments = [*files, *QUICK, "--steps", "1", "--out", tmp_path / "out"]
    assert run(*arguments, "--method", "standard") == 0
    shown = capsys.readouterr().out
    assert shown.count("  question   ") == 3 and "(nothing)   (gold: 16 + 1)" in shown
    finished = result(tmp_path / "out", "standard")
    assert len(finished["samples"]) == 3
    finished["samples"][0]["input"] = "字" * 500
    write_json(tmp_path / "out" / "standard" / "result.json", finished)
    assert run(*arguments, "--method", "standard", "--resume") == 0
    assert "字" * 396 + " ...\n" in capsys.readouterr().out, "a long text without spaces is cut, too"
    assert "with --resume --method standard NAME adds a student" in shown and "data.toy" not in shown
    assert run(*arguments, "--method", "standard", "dss", "--resume") == 0
    assert "dss - standard:" in capsys.readouterr().out


def test_a_full_log_costs_the_display_not_the_run(files, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w", buffering=1))
    guard_streams()
    assert run(*files, *SIX, "--out", tmp_path / "out") == 0
    with contextlib.suppress(OSError):  # of what could not be written
        sys.stderr.close()


def test_labels_of_the_teacher_are_not_called_gold(files, tmp_path, capsys):
    arguments = [*files[:2], *QUICK, "--steps", "1", "--method", "standard", "--labels", "teacher"]
    assert run(*arguments, "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "(teacher's: " in shown and "gold" not in shown


def test_a_terminal_without_unicode_does_not_end_the_report(monkeypatch):
    """PYTHONIOENCODING=ascii: the first é of a question was a traceback, after hours of training."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    guard_streams()  # with which every program begins
    print("café")
    stream.flush()
    assert stream.buffer.getvalue() == b"caf?\n"


def test_a_run_too_short_to_judge_says_so_and_one_at_the_end_of_its_loss_does_not(tmp_path):
    """A loss that fell from 0.038 to 0.030 nats was called "falling fast", in the very first run of a newcomer."""
    for losses, commonest, why in ([2.0, 1.0], 0.5, "fall"), ([0.038, 0.030], 0.5, ""), ([2.0, 1.0], 0.9, "no better"):
        (tmp_path / "m").write_text("".join(f'{{"label_loss": {loss}}}\n' for loss in losses))
        said = too_short(dict(validation_accuracy=0.9, best_step=9, steps=9), tmp_path / "m", commonest)
        assert why in said and bool(why) == bool(said)


def test_a_line_separator_in_a_question_is_no_end_of_its_line(tmp_path):
    """str.splitlines cuts at U+2028, too: the report of a finished run failed."""
    write_jsonl(tmp_path / "predictions.jsonl", [dict(input="a\u2028b\x85", correct=True)])
    assert correct(tmp_path).tolist() == [1]
