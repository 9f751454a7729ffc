"""A run that ends early keeps what it has, and goes on as if it had not been interrupted."""

import io
import shutil
import signal
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from running import (
    QUICK,
    ROOT,
    SIX,
    at_step,
    counting,
    json_lines,
    result,
    run,
    same,
    stop_at,
    wait_until,
    weights,
    write_rows,
)

import train
from data.cli import Interrupted, Stop
from data.jsonl import Record, write_jsonl
from dss.weights import load_t5


@pytest.fixture
def files(tmp_path):
    return write_rows(tmp_path, counting(20), 16)


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


# ---- It ends early -------------------------------------------------------------------------------


def spoil(model):
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))


def test_a_diverged_student_is_never_the_best_nor_saved_and_the_best_is_kept(
    files, tmp_path, monkeypatch, capsys
):
    """Also if it diverges between two lines of the log."""
    monkeypatch.setattr(train, "train_step", at_step(5, spoil))
    assert run(*files, *SIX, "--save-minutes", 0, "--out", tmp_path / "out") == 1
    line = last_line(capsys)
    assert line.startswith("train.py: the loss is nan by step 6; try a smaller --lr")
    assert "dss/student is the best so far" in line
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out" / "dss").values())
    state = torch.load(tmp_path / "out" / "dss" / "state.pt", weights_only=True)
    assert state["progress"]["step"] == 4
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_weights_that_a_step_made_infinite_are_not_kept(files, tmp_path, capsys):
    """The loss of the step was finite, its update was not."""
    settings = ["--lr", 1e38, "--clip", 0, "--eval-every", 1]
    assert run(*files, *SIX, *settings, "--out", tmp_path / "out") == 1
    assert "has no student, because none was evaluated" in last_line(capsys)
    assert not (tmp_path / "out" / "dss" / "state.pt").exists()


def test_ctrl_c_on_a_diverged_run_saves_no_state(files, tmp_path, monkeypatch, capsys):
    def spoil_and_stop(model):
        spoil(model)
        monkeypatch.setattr(Stop, "check", Mock(side_effect=Interrupted))

    monkeypatch.setattr(train, "train_step", at_step(0, spoil_and_stop))
    assert run(*files, *SIX, "--out", tmp_path / "out") == 1
    assert "no longer a finite number" in last_line(capsys)
    assert not (tmp_path / "out" / "dss" / "state.pt").exists()


CPU_MEMORY = "[enforce fail] DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    "error, words",
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "out of memory; --micro-batch N"),
        (RuntimeError(CPU_MEMORY), "out of memory; --micro-batch N"),
        (OSError(28, "No space left on device", "x/state.pt"), "x/state.pt: No space left"),
        (RuntimeError("shapes do not match"), None),
    ],
)
def test_an_error_in_training_keeps_the_best_student(
    files, tmp_path, monkeypatch, capsys, error, words
):
    monkeypatch.setattr(train, "train_step", at_step(3, Mock(side_effect=error)))
    arguments = [*files, *SIX, "--out", tmp_path / "out"]
    if words is None:
        with pytest.raises(RuntimeError, match="shapes"):  # a bug keeps its traceback
            run(*arguments)
    else:
        assert run(*arguments) == 1
        line = last_line(capsys)
        assert line.startswith(f"train.py: {words}") and "student is the best so far" in line
    load_t5(tmp_path / "out" / "dss" / "student")


def test_sigint_ends_a_real_process_cleanly(files, tmp_path):
    out = tmp_path / "out"
    settings = [*files, "--steps", "100000", "--eval-every", "5", "--save-minutes", "0"]
    command = [sys.executable, "train.py", *settings, "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until((out / "standard" / "state.pt").exists)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in error
    line = error.splitlines()[-1]
    assert "interrupted at step" in line and "--resume goes on" in line
    load_t5(out / "standard" / "student")


# ---- And goes on ---------------------------------------------------------------------------------

SEVEN = [*SIX, *"--dropout 0.1 --steps 7 --eval-every 3 --log-every 5".split()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that was not interrupted has made."""
    directory = tmp_path_factory.mktemp("whole")
    assert run(*write_rows(directory, counting(20), 16), *SEVEN, "--out", directory / "out") == 0
    return directory / "out" / "dss"


def without_speed(path):
    return [line | {"tokens_per_second": 0} for line in json_lines(path)]


def require_same_run(whole, cut):
    assert same(weights(whole), weights(cut))
    for name in ("predictions.jsonl", "metrics.jsonl"):
        assert without_speed(whole / name) == without_speed(cut / name)
    assert {path.name for path in whole.iterdir()} == {path.name for path in cut.iterdir()}


@pytest.mark.parametrize("asked", [1, 3, 4, 5, 9, 11])
def test_an_interrupted_run_resumes_to_the_same_student(
    files, whole, tmp_path, capsys, monkeypatch, asked
):
    """Wherever it was: in a step, an evaluation or the test. Dropout, order, selection, and the
    losses since the last line of the log go on as they were."""
    arguments = [*files, *SEVEN, "--out", tmp_path / "cut"]
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "check", stop_at(asked))
        assert run(*arguments) == 130
    assert "--resume goes on" in last_line(capsys)
    cut = tmp_path / "cut" / "dss"
    assert (cut / "state.pt").exists()
    load_t5(cut / "student")
    assert run(*arguments, "--resume") == 0
    require_same_run(whole, cut)


def test_a_killed_run_resumes_from_its_state_without_torn_log_lines(
    files, whole, tmp_path, monkeypatch
):
    arguments = [*files, *SEVEN, "--save-minutes", 0, "--out", tmp_path / "killed"]
    killed = tmp_path / "killed" / "dss"
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", at_step(5, lambda model: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            run(*arguments)
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert run(*arguments, "--resume") == 0
    require_same_run(whole, killed)


def test_a_damaged_state_or_one_of_another_version_is_one_line(
    files, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    arguments = [*files, *SIX, "--out", out, "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "check", stop_at(2))
        assert run(*arguments) == 130
    state = out / "dss" / "state.pt"
    sound = state.read_bytes()
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 1  # in a tensor
    for damaged in (b"", sound[:-1], flipped):
        state.write_bytes(damaged)
        assert run(*arguments) == 2
        assert "state.pt: not the state of this run" in last_line(capsys)
    older = torch.load(io.BytesIO(sound))
    older["progress"]["patience"] = 3
    torch.save(older, state)
    assert run(*arguments) == 2
    assert "state.pt: the state of a run by another version" in last_line(capsys)


# ---- The output directory ------------------------------------------------------------------------


def test_an_output_directory_that_exists_needs_resume_or_overwrite(files, tmp_path, refused):
    out = tmp_path / "out"
    out.mkdir()
    arguments = [*files, *QUICK, "--steps", 2, "--out", out, "--method", "standard"]
    assert run(*arguments) == 0, "an empty directory is free to use"
    finished = out / "standard" / "result.json"
    first = finished.stat().st_mtime_ns
    (out / "standard" / "state.pt").write_bytes(b"of a run that was killed as it ended")
    said = refused(train.main, *arguments)
    assert "--resume goes on with it, --overwrite replaces it" in said
    assert run(*arguments, "dss", "--resume") == 0
    assert finished.stat().st_mtime_ns == first, "what is finished is not repeated"
    assert result(out, "dss")["steps"] == 2 and not (out / "standard" / "state.pt").exists()
    assert run(*arguments, "--overwrite") == 0
    assert finished.stat().st_mtime_ns != first and (out / "dss").exists()


def test_overwrite_deletes_nothing_but_runs(files, tmp_path, refused):
    precious = tmp_path / "out" / "dss" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    arguments = [*files, *SIX, "--out", tmp_path / "out", "--overwrite"]
    assert "will not delete" in refused(train.main, *arguments)
    assert precious.read_text() == "years of work"
    precious.unlink()
    assert run(*arguments) == 0, "an empty directory is no loss"


def test_overwrite_does_not_delete_what_the_run_reads(files, tmp_path, refused):
    out = tmp_path / "out"
    assert run(*files, *SIX, "--steps", 1, "--out", out) == 0
    student = out / "dss" / "student"
    shutil.copy(files[1], student / "rows.jsonl")
    paths = {"--weights": student, "--spiece": student / "spiece.model"}
    for flag, path in (paths | {"--data": student / "rows.jsonl"}).items():
        said = refused(train.main, *files, *SIX, flag, path, "--out", out, "--overwrite")
        assert f"--overwrite would delete {student.parent}, and with it {path}" in said
        assert student.exists()


def test_resume_compares_with_every_method_in_the_directory(files, tmp_path, capsys):
    """Also with those that are not asked for: all are compared in one table."""
    arguments = [*files, *QUICK, "--steps", 2, "--out", tmp_path / "out"]
    assert run(*arguments, "--method", "standard", "--resume") == 0
    assert f"nothing to resume in {tmp_path / 'out'}; starting" in capsys.readouterr().err
    for now, before in (("--lr 0.5", "--lr 0.02"), ("--dropout 0.5", "no --dropout")):
        for method in ("standard", "dss"):
            assert run(*arguments, "--method", method, *now.split(), "--resume") == 2
            assert f"standard was started with {before}, not {now};" in last_line(capsys)
    assert run(*arguments, "--method", "standard", "--lr", 0.02, "--resume") == 0
    rows = [Record("new", f"How many are {i}?", f"{i} + 1") for i in range(16)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert run(*arguments, "--method", "standard", "--resume") == 2
    assert "was started with other rows" in last_line(capsys)


def test_the_same_weights_named_otherwise_are_the_same(files, whole, tmp_path, capsys):
    student = whole / "student"
    arguments = [*files, *QUICK, "--steps", 1, "--method", "standard", "--out", tmp_path / "out"]
    assert run(*arguments, "--weights", student) == 0
    assert run(*arguments, "--weights", f"{student}/", "--resume") == 0
    shutil.copytree(student, tmp_path / "other")
    assert run(*arguments, "--weights", tmp_path / "other", "--resume") == 2
    assert "--weights" in last_line(capsys)
