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


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A run on rows of very different lengths, some without a rationale."""
    rows = []
    for i in range(40):
        rationale = f"Add 1 to {i}." * (i % 5) or None
        rows.append(Record(f"r{i}", "Tom gave apples. " * (1 + i % 7), f"{i} + 1", rationale))
    flags = " ".join(write_rows(tmp_path_factory.mktemp("rows"), rows, 27))
    settings = "--steps 8 --eval-every 4 --log-every 2 --batch-size 5 --warmup 2 --dropout 0"
    return f"{flags} {settings} --max-new-tokens 4 --method dss"


@pytest.fixture(scope="module")
def one(files, tmp_path_factory):
    """What a run of one process has made."""
    out = tmp_path_factory.mktemp("one") / "out"
    assert run(files, f"--out {out}") == 0
    return out / "dss"


def difference(a, b):
    """The largest of the tensors' relative differences."""
    a = weights(a)
    b = weights(b)
    return max(relative_error(a[name], b[name]) for name in a)


def said(directory, rank=0):
    return (directory / f"{rank}.txt").read_text()


# Rows and --micro-batch: uneven, with passes of one row, fewer rows than processes.
CASES = [(4, 1), (2, 0)]


def compute_gradients(line, directory):
    """Into DIRECTORY/RANK.pt, for each of CASES: losses, norm and gradients of a step, by plain
    processes and then with --shard."""
    found = []
    with distributed.process_group():
        place = (distributed.rank(), distributed.size())
        for extra in ("", "--shard"):
            for batch_size, micro_batch in CASES:
                ready = prepare(f"{line} {extra} --clip 0")
                examples, _ = train.make_examples(ready, "dss")
                work = make_step(examples[:batch_size], micro_batch, "cpu", 0, *place)
                model = ready.placement.place(ready.student.model)
                optimizer = torch.optim.SGD([{"params": model.parameters(), "scale": 1.0}])
                optimizer.zero_grad = lambda: None
                found += train.train_step(ready.student, optimizer, work, 0.0, ready)
                for parameter in model.parameters():
                    gradient = parameter.grad
                    found.append(gradient.full_tensor() if extra else gradient)
        torch.save(found, directory / f"{distributed.rank()}.pt")


def test_the_gradient_of_a_step_is_that_of_one_process(files, tmp_path, measured):
    line = f"{files} --out {tmp_path}/out"
    assert several.run(1, tmp_path, compute_gradients, line, tmp_path) == [0], said(tmp_path)
    alone = torch.load(tmp_path / "0.pt")
    assert several.run(3, tmp_path, compute_gradients, line, tmp_path) == [0] * 3
    for rank in range(3):
        together = torch.load(tmp_path / f"{rank}.pt")
        worst = max(relative_error(a, b) for a, b in zip(together, alone, strict=True))
        measured("gradients of 3 processes, plain and with --shard", worst, 1e-6)


@pytest.mark.parametrize(
    "n, extra", [(3, "--micro-batch 2"), (2, "--shard --checkpoint-activations")]
)
def test_the_student_of_several_processes_is_that_of_one(files, one, tmp_path, measured, n, extra):
    """Also its answers, put together in order; and nothing is written or said twice."""
    line = f"{files} {extra} --out {tmp_path}/all"
    assert several.run(n, tmp_path, run, line) == [0] * n, said(tmp_path)
    together = tmp_path / "all" / "dss"
    measured(f"student of {n} processes {extra}", difference(together, one), 1e-5)
    assert json_lines(one / "predictions.jsonl") == json_lines(together / "predictions.jsonl")
    assert {path.name for path in one.iterdir()} == {path.name for path in together.iterdir()}
    want = [line.get("loss", 0.0) for line in json_lines(one / "metrics.jsonl")]
    losses = [line.get("loss", 0.0) for line in json_lines(together / "metrics.jsonl")]
    assert losses == pytest.approx(want, rel=1e-4) and any(losses)
    assert said(tmp_path).count("13 test; metric") == 1
    assert not any(said(tmp_path, rank) for rank in range(1, n))


def signal_one(number, step, line):
    """A run whose process 1 gets a signal before a step."""

    def send(_):
        if distributed.rank() == 1:
            os.kill(os.getpid(), number)

    train.train_step = at_step(step, send)
    return run(line)


DIES = f"""
import signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "dss")!r}, {str(ROOT / "tests")!r}]
from test_distributed import signal_one
sys.exit(signal_one(signal.SIGKILL, 6, " ".join(sys.argv[1:])))
"""


def test_torchrun_ends_a_run_whose_process_dies_and_one_process_goes_on(
    files, one, tmp_path, measured
):
    (tmp_path / "dies.py").write_text(DIES)
    line = f"{files} --save-minutes 0 --out {tmp_path}/cut"
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node=2 {tmp_path}/dies.py"
    command = [sys.executable, *torchrun.split(), *line.split()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    words = "train.py: another process has ended; --resume goes on from step 4; "
    kept = f"{tmp_path}/cut/dss/student is the best so far"
    assert ended.returncode == 1 and words + kept in ended.stderr
    assert run(line, "--resume") == 0
    measured("student that one ended for two", difference(one, tmp_path / "cut" / "dss"), 1e-5)


def test_shards_of_a_run_whose_process_died_are_loaded_by_three(files, one, tmp_path, measured):
    line = f"{files} --shard --save-minutes 0 --out {tmp_path}/cut"
    statuses = several.run(2, tmp_path, signal_one, signal.SIGKILL, 6, line)
    assert statuses == [1, -signal.SIGKILL] and "--resume goes on from step 4" in said(tmp_path)
    assert several.run(3, tmp_path, run, line, "--resume") == [0] * 3, said(tmp_path)
    measured("student that three ended for two", difference(one, tmp_path / "cut" / "dss"), 1e-5)


def test_a_signal_to_one_process_stops_all_at_the_same_step(files, tmp_path):
    """They go on to the student of a run that was not disturbed, dropout and all."""
    line = f"{files} --dropout 0.1 --shard --out {tmp_path}"
    assert several.run(2, tmp_path, run, f"{line}/whole") == [0, 0]
    statuses = several.run(2, tmp_path, signal_one, signal.SIGTERM, 6, f"{line}/cut")
    assert statuses == [130, 130]
    printed = said(tmp_path) + said(tmp_path, 1)
    assert printed.count("train.py: dss interrupted at step 7;") == 1
    assert several.run(2, tmp_path, run, f"{line}/cut --resume") == [0, 0]
    assert same(weights(tmp_path / "whole" / "dss"), weights(tmp_path / "cut" / "dss"))


@pytest.mark.parametrize(
    "extra, status, words", [("--lr 1e38 --clip 0", 1, "the loss is"), ("--spiece no", 2, "no: ")]
)
def test_what_is_wrong_is_said_once(files, tmp_path, extra, status, words):
    assert several.run(2, tmp_path, run, files, extra, f"--out {tmp_path}/out") == [status] * 2
    assert (said(tmp_path) + said(tmp_path, 1)).count(f"train.py: {words}") == 1


def test_a_full_disk_is_named_as_such(tmp_path, monkeypatch):
    """torch.save raises RuntimeError("unexpected pos 1280 vs 1174") for it."""

    def full(_, file):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 1280 vs 1174")

    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(torch, "save", full)
    replicas = distributed.Replicas(parse_args([]), torch.device("cpu"))
    with pytest.raises(OSError, match=r"state.pt: cannot be written \(No space left on device\)"):
        replicas.save_state(tmp_path / "state.pt", model, torch.optim.SGD(model.parameters()), {})
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_not_chosen_where_a_gpu_only_emulates_it(monkeypatch):
    for computes in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda _=computes, **__: _)
        chosen = distributed.choose_dtype("auto", torch.device("cuda"))
        assert chosen == ("bfloat16" if computes else "float32")
