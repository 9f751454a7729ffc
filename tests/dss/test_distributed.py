"""Several processes, each with a part of every step, are the same run as one."""

import os
import signal
import subprocess
import sys

import pytest
import several
import torch
from comparing import relative_error
from running import ROOT, at_step, json_lines, prepare, run, same, weights, write_rows

import train
from data.jsonl import Record
from dss import distributed
from dss.batch import make_step
from dss.config import parse_args

QUICK = (
    "--method dss --steps 20 --eval-every 10 --log-every 5 --batch-size 5 --warmup 2 "
    "--max-new-tokens 4 --dropout 0"
).split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows of very different lengths, some without a rationale."""
    rows = []
    for i in range(40):
        rationale = f"Add 1 to {i}." * (i % 5) or None
        rows.append(Record(f"r{i}", "Tom gave apples. " * (1 + i % 7), f"{i} + 1", rationale))
    return [*write_rows(tmp_path_factory.mktemp("rows"), rows, 27), *QUICK]


@pytest.fixture(scope="module")
def one(files, tmp_path_factory):
    """What a run of one process has made."""
    out = tmp_path_factory.mktemp("one") / "out"
    assert run(*files, "--out", out) == 0
    return out / "dss"


def worst_difference(a, b):
    assert a.keys() == b.keys()
    return max(relative_error(a[name], b[name]) for name in a)


def said(directory, rank=0):
    return (directory / f"{rank}.txt").read_text()


# Rows and --micro-batch: uneven, with passes of one row, fewer rows than processes.
CASES = [(5, 0), (4, 1), (2, 0)]


def compute_gradients(arguments, directory):
    """Into DIRECTORY/RANK.pt, for each of CASES: losses, norm and gradients of a step."""
    found = []
    with distributed.joined():
        for batch_size, micro_batch in CASES:
            ready = prepare(*arguments, "--clip", 0)
            examples, _ = train.make_examples(ready, "dss")
            place = (distributed.rank(), distributed.size())
            work = make_step(examples[:batch_size], micro_batch, "cpu", 0, *place)
            model = ready.placement.place(ready.student.model)
            optimizer = torch.optim.SGD([{"params": model.parameters(), "scale": 1.0}])
            optimizer.zero_grad = lambda: None
            figures = list(train.train_step(ready.student, optimizer, work, 0.0, ready))
            for parameter in model.parameters():
                gradient = parameter.grad
                if ready.config.shard:
                    gradient = gradient.full_tensor()
                figures.append(gradient)
            found.append(figures)
        torch.save(found, directory / f"{distributed.rank()}.pt")


@pytest.mark.parametrize("n, extra", [(2, []), (3, []), (2, ["--shard"]), (3, ["--shard"])])
def test_the_gradient_of_a_step_is_that_of_one_process(files, tmp_path, measured, n, extra):
    arguments = [*files, "--out", str(tmp_path / "out")]
    compute_gradients(arguments, tmp_path)
    alone = torch.load(tmp_path / "0.pt")
    together = [*arguments, *extra]
    assert several.run(n, tmp_path, compute_gradients, together, tmp_path) == [0] * n
    for rank in range(n):
        cases = zip(torch.load(tmp_path / f"{rank}.pt"), alone, strict=True)
        worst = max(relative_error(a, b) for got, want in cases for a, b in zip(got, want))
        measured(f"gradients of {n} processes {extra}", worst, 1e-6)


@pytest.mark.parametrize(
    "n, extra", [(2, "--micro-batch 2"), (3, ""), (2, "--shard --checkpoint-activations")]
)
def test_the_student_of_several_processes_is_that_of_one(files, one, tmp_path, measured, n, extra):
    """Also its answers, put together in order; and nothing is written or said twice."""
    arguments = [*files, *extra.split(), "--out", tmp_path / "all"]
    assert several.run(n, tmp_path, run, *arguments) == [0] * n, said(tmp_path)
    together = tmp_path / "all" / "dss"
    difference = worst_difference(weights(together), weights(one))
    measured(f"student of {n} processes {extra}", difference, 1e-5)
    assert json_lines(one / "predictions.jsonl") == json_lines(together / "predictions.jsonl")
    assert {path.name for path in one.iterdir()} == {path.name for path in together.iterdir()}
    losses = [line.get("loss", 0.0) for line in json_lines(one / "metrics.jsonl")]
    theirs = [line.get("loss", 0.0) for line in json_lines(together / "metrics.jsonl")]
    assert losses == pytest.approx(theirs, rel=1e-4) and any(losses)
    assert said(tmp_path).count("13 test; metric") == 1
    assert not any(said(tmp_path, rank) for rank in range(1, n))


DIES = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import train
from dss import distributed
from running import at_step, run
def die(model):
    if distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
train.train_step = at_step(14, die)
sys.exit(run(*sys.argv[1:]))
"""


@pytest.mark.parametrize("extra, others", [([], 3), (["--shard"], 1)])
def test_torchrun_ends_a_run_whose_process_dies_and_others_go_on(
    files, one, tmp_path, measured, extra, others
):
    """Process 1 of 2 is killed in step 15; another number of processes goes on from step 10."""
    (tmp_path / "dies.py").write_text(DIES)
    arguments = [*files, *extra, "--save-minutes", "0", "--out", str(tmp_path / "cut")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command = [*torchrun, "--standalone", tmp_path / "dies.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert ended.returncode == 1
    line = "train.py: another process has ended; --resume goes on from step 10; "
    kept = f"{tmp_path / 'cut' / 'dss'}/student is the best so far"
    assert line + kept in ended.stderr
    statuses = several.run(others, tmp_path, run, *arguments, "--resume")
    assert statuses == [0] * others, said(tmp_path)
    difference = worst_difference(weights(one), weights(tmp_path / "cut" / "dss"))
    measured(f"student that {others} ended for two {' '.join(extra)}", difference, 1e-5)


def signalled(arguments):
    """A run whose process 1 is asked to stop in its seventh step."""

    def ask(_):
        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    train.train_step = at_step(6, ask)
    return run(*arguments)


@pytest.mark.parametrize("extra", [[], ["--shard"]])
def test_a_signal_to_one_process_stops_all_at_the_same_step(files, tmp_path, extra):
    """They save their state, and go on to the student of a run that was not disturbed, dropout and
    all."""
    arguments = [*files, "--steps", 10, "--eval-every", 5, "--dropout", 0.1, *extra]
    assert several.run(2, tmp_path, run, *arguments, "--out", tmp_path / "whole") == [0, 0]
    cut = [*arguments, "--out", tmp_path / "cut"]
    assert several.run(2, tmp_path, signalled, cut) == [130, 130]
    printed = said(tmp_path) + said(tmp_path, 1)
    assert printed.count("train.py: dss interrupted at step 7;") == 1
    assert several.run(2, tmp_path, run, *cut, "--resume") == [0, 0]
    assert same(weights(tmp_path / "whole" / "dss"), weights(tmp_path / "cut" / "dss"))


def test_what_is_wrong_is_said_once(files, tmp_path):
    arguments = [*files, "--lr", "1e38", "--clip", "0", "--out", tmp_path / "out"]
    assert several.run(2, tmp_path, run, *arguments) == [1, 1]
    assert (said(tmp_path) + said(tmp_path, 1)).count("train.py: the loss is") == 1
    assert several.run(2, tmp_path, run, "--data", tmp_path / "none.jsonl") == [2, 2]
    assert (said(tmp_path) + said(tmp_path, 1)).count("none.jsonl: No such file") == 1


def test_a_full_disk_is_named_as_such(tmp_path, monkeypatch):
    """torch.save raises RuntimeError("unexpected pos 1280 vs 1174") for it."""

    def full(_, file):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 1280 vs 1174")

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    monkeypatch.setattr(torch, "save", full)
    replicas = distributed.Replicas(parse_args([]), torch.device("cpu"))
    with pytest.raises(OSError, match=r"state.pt: cannot be written \(No space left on device\)"):
        replicas.save_state(tmp_path / "state.pt", model, optimizer, {})
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_refused_on_a_gpu_that_does_not_compute_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with pytest.raises(ValueError, match="--dtype bfloat16: Tesla V100"):
        distributed.choose_device("auto", "bfloat16")
    device = distributed.choose_device("auto")
    assert device.type == "cuda" and distributed.choose_dtype("auto", device) == "float32"
    assert distributed.choose_device("cpu", "bfloat16").type == "cpu"
