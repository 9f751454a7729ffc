"""A run that ends early keeps what it has, and goes on as if it had not been interrupted."""

import shutil
from unittest.mock import Mock

import pytest
import torch
from running import (
    QUICK,
    SIX,
    at_step,
    few_rows,
    json_lines,
    result,
    run,
    same,
    stop_at,
    weights,
)

import train
from data.cli import Interrupted, Stop
from data.jsonl import Record, write_jsonl
from dss.weights import load_t5


@pytest.fixture
def files(tmp_path):
    return few_rows(tmp_path)


@pytest.fixture
def six(files, tmp_path):
    """A run of six steps; `out` is its output."""
    return f"{files} {SIX} --out {tmp_path}/out"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out" / "dss"


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


# ---- It ends early -------------------------------------------------------------------------------


def spoil(model):
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))


def test_a_diverged_student_is_never_the_best_nor_saved_and_the_best_is_kept(
    six, out, monkeypatch, capsys
):
    """Also if it diverges between two lines of the log."""
    monkeypatch.setattr(train, "train_step", at_step(5, spoil))
    assert run(six, "--save-minutes 0") == 1
    line = last_line(capsys)
    assert line.startswith("train.py: the loss is nan by step 6; try a smaller --lr")
    assert f"{out}/student is the best so far" in line
    state = torch.load(out / "state.pt")
    assert state["progress"]["step"] == 4
    for tensor in [*weights(out).values(), *state["model"].values()]:
        assert tensor.isfinite().all()


def test_weights_that_a_step_made_infinite_are_not_kept(six, out, capsys):
    """The loss of the step was finite, its update was not."""
    assert run(six, "--lr 1e38 --clip 0 --eval-every 1") == 1
    assert "has no student, because none was evaluated" in last_line(capsys)
    assert not (out / "state.pt").exists()


def test_ctrl_c_on_a_diverged_run_saves_no_state(six, out, monkeypatch, capsys):
    def spoil_and_stop(model):
        spoil(model)
        monkeypatch.setattr(Stop, "check", Mock(side_effect=Interrupted))

    monkeypatch.setattr(train, "train_step", at_step(0, spoil_and_stop))
    assert run(six) == 1
    assert "no longer a finite number" in last_line(capsys)
    assert not (out / "state.pt").exists()


@pytest.mark.parametrize(
    "error, words",
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "out of memory; --micro-batch N"),
        (RuntimeError("DefaultCPUAllocator: can't"), "out of memory; --micro-batch N"),
        (OSError(28, "No space left on device", "x/state.pt"), "x/state.pt: No space left"),
    ],
)
def test_an_error_in_training_keeps_the_best_student(six, out, monkeypatch, capsys, error, words):
    monkeypatch.setattr(train, "train_step", at_step(3, Mock(side_effect=error)))
    assert run(six) == 1
    line = last_line(capsys)
    assert line.startswith(f"train.py: {words}") and "student is the best so far" in line
    load_t5(out / "student")


# ---- And goes on ---------------------------------------------------------------------------------

SEVEN = f"{SIX} --dropout 0.1 --steps 7 --eval-every 3 --log-every 5 --save-minutes 0"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that was not interrupted has made."""
    directory = tmp_path_factory.mktemp("whole")
    files = few_rows(directory)
    assert run(files, SEVEN, f"--out {directory}/out") == 0
    return directory / "out" / "dss"


def require_same_run(whole, cut):
    assert same(weights(whole), weights(cut))
    for name in ("predictions.jsonl", "metrics.jsonl"):
        for want, got in zip(json_lines(whole / name), json_lines(cut / name), strict=True):
            assert want | {"tokens_per_second": 0} == got | {"tokens_per_second": 0}
    assert {path.name for path in whole.iterdir()} == {path.name for path in cut.iterdir()}


@pytest.mark.parametrize("asked", [1, 3, 11])
def test_an_interrupted_run_resumes_to_the_same_student(
    six, out, whole, capsys, monkeypatch, asked
):
    """Wherever it was: in a step, an evaluation or the test. Dropout, order, selection, and the
    losses since the last line of the log go on as they were."""
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "check", stop_at(asked))
        assert run(six, SEVEN) == 130
    assert "--resume goes on" in last_line(capsys) and (out / "state.pt").exists()
    assert run(six, SEVEN, "--resume") == 0
    require_same_run(whole, out)


def test_a_killed_run_resumes_from_its_state_without_torn_log_lines(six, out, whole, monkeypatch):
    """A bug keeps its traceback."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", at_step(5, lambda model: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            run(six, SEVEN)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert run(six, SEVEN, "--resume") == 0
    require_same_run(whole, out)


def test_a_damaged_state_or_one_of_another_version_is_one_line(six, out, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "check", stop_at(2))
        assert run(six) == 130
    state = out / "state.pt"
    sound = state.read_bytes()
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 1  # in a tensor
    older = torch.load(state)
    older["progress"]["patience"] = 3
    for damaged in (b"", sound[:-1], flipped):
        state.write_bytes(damaged)
        assert run(six, "--resume") == 2
        assert "state.pt: not the state of this run" in last_line(capsys)
    torch.save(older, state)
    assert run(six, "--resume") == 2
    assert "state.pt: the state of a run by another version" in last_line(capsys)


# ---- The output directory ------------------------------------------------------------------------


def test_an_output_directory_that_exists_needs_resume_or_overwrite(files, out, refused):
    out.parent.mkdir()
    line = f"{files} {QUICK} --steps 2 --out {out.parent} --method dss"
    assert run(line) == 0, "an empty directory is free to use"
    first = (out / "result.json").stat().st_mtime_ns
    (out / "state.pt").write_bytes(b"of a run that was killed as it ended")
    said = refused(train.main, *line.split())
    assert "--resume goes on with it, --overwrite replaces it" in said
    assert run(line, "standard --resume") == 0
    assert (out / "result.json").stat().st_mtime_ns == first, "what is finished stays"
    assert result(out.parent, "standard")["steps"] == 2 and not (out / "state.pt").exists()
    assert run(line, "--overwrite") == 0
    assert (out / "result.json").stat().st_mtime_ns != first


def test_overwrite_deletes_nothing_but_runs_and_not_what_the_run_reads(six, out, tmp_path, refused):
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("years of work")
    assert "will not delete" in refused(train.main, *six.split(), "--overwrite")
    (out / "thesis.tex").unlink()
    out.rmdir()
    assert run(six, "--steps 1") == 0
    rows = shutil.copy(tmp_path / "rows.jsonl", out / "student")
    given = {"--weights": out / "student", "--spiece": out / "student" / "spiece.model"}
    for flag, path in (given | {"--data": rows}).items():
        said = refused(train.main, *six.split(), flag, path, "--overwrite")
        assert f"--overwrite would delete {out}, and with it {path}" in said


def test_resume_compares_with_every_method_in_the_directory(files, tmp_path, capsys):
    """Also with those that are not asked for: all are compared in one table."""
    line = f"{files} {QUICK} --steps 2 --out {tmp_path}/out --resume --method"
    assert run(line, "standard") == 0
    changed = {"--lr 0.5": "learning_rate 0.03, not 0.5", "--dropout 0.5": "dropout None, not 0.5"}
    for flag, words in changed.items():
        for method in ("standard", "dss"):
            assert run(line, method, flag) == 2
            assert f"standard was started with {words};" in last_line(capsys)
    assert run(line, "standard --lr 0.03") == 0
    write_jsonl(tmp_path / "rows.jsonl", [Record("new", "x", str(i)) for i in range(16)])
    assert run(line, "standard") == 2
    assert "was started with rows_sha256" in last_line(capsys)
