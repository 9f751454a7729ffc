"""Several processes, each with a part of every step: the same run as one process, whatever ends it."""

import copy
import json
import os
import signal
from dataclasses import replace

import pytest
import several
import torch
from comparing import relative_error
from hypothesis import given
from hypothesis import strategies as st
from running import run, same, watched, weights, write_rows

import train
from data.jsonl import Record
from dss.batch import Sequence, count_tokens, make_step, share_tokens
from dss.config import parse_args
from dss.run import parallel

QUICK = "--steps 20 --eval_every 10 --log_every 5 --batch_size 5 --warmup 2 --max_new_tokens 4 --dropout 0".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows of very different lengths, some without a rationale."""
    texts = [("Tom gave apples. " * (1 + i % 7), f"{i} + 1", f"Add 1 to {i}." * (i % 5) or None) for i in range(40)]
    rows = [Record(f"r{i}", *of) for i, of in enumerate(texts)]
    return [*write_rows(tmp_path_factory.mktemp("rows"), rows, 27), "--method", "dss", *QUICK]


@pytest.fixture(scope="module")
def one(files, tmp_path_factory):
    """What a run of one process has made."""
    out = tmp_path_factory.mktemp("one")
    assert run(*files, "--out", out) == 0
    return out / "dss"


def apart(a, b):
    """The largest relative difference of two state dicts."""
    assert a.keys() == b.keys()
    return max(relative_error(a[name], b[name]) for name in a)


ids = st.lists(st.integers(2, 99), min_size=1, max_size=30)
rows_of = st.lists(st.lists(st.builds(Sequence, ids, ids, st.sampled_from([0, 1])), min_size=1, max_size=2), min_size=1)


@given(rows_of, st.integers(1, 5))
def test_the_rows_of_a_step_are_shared_out_whole_and_evenly(rows, n):
    parts = share_tokens(rows, n)
    assert sorted(row for part in parts for row in part) == sorted(rows) and len(parts) == n
    tokens = [sum(map(count_tokens, part)) for part in parts]
    assert max(tokens) - min(tokens) <= max(map(count_tokens, rows))


@given(rows_of, st.integers(1, 4), st.integers(0, 3))
def test_all_processes_take_as_many_passes(rows, n, micro_batch):
    steps = [make_step(rows, micro_batch, "cpu", 0, rank, n) for rank in range(n)]
    assert len({len(step.batches) for step in steps}) == 1
    assert len({step[1:] for step in steps}) == 1 and steps[0].tokens == sum(map(count_tokens, rows))
    trained = sum(int((batch.task >= 0).sum()) for step in steps for batch in step.batches)
    assert trained == steps[0].n_label + steps[0].n_rationale


CASES = [(5, 0), (4, 1), (2, 0)]  # rows and --micro-batch: uneven, with passes of one row, fewer rows than processes


def steps_of(arguments, directory):
    """The gradients of CASES, of all processes together and of this one alone, into DIRECTORY/RANK.pt."""
    found = []
    with parallel.joined():
        for shard in ([], ["--shard"]):
            for batch, micro in CASES:
                config = parse_args([*arguments, "--micro_batch", str(micro), "--clip", "0", *shard])
                run = train.prepare(config)
                examples, _ = train.make_examples(run.rows.train, "dss", config, run.student.tokenizer)
                rows = [examples.sequences(row) for row in range(batch)]
                whole = replace(run.student, model=copy.deepcopy(run.student.model))
                student = parallel.place(run.student, run.device, config)
                together = step_of(student, make_step(rows, micro, "cpu", 0, parallel.rank(), parallel.size()), config)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(parallel, "size", lambda: 1)
                    alone = step_of(whole, make_step(rows, 0, "cpu"), replace(config, shard=False))
                found.append((f"{' '.join(shard)} {batch} rows, --micro-batch {micro}", together, alone))
        torch.save(found, directory / f"{parallel.rank()}.pt")


def step_of(student, work, config):
    """[losses, norm, gradients] of a step that changes nothing."""
    optimizer = torch.optim.SGD(student.model.parameters(), lr=0.0)
    optimizer.zero_grad = lambda: None
    results = train.train_step(student, optimizer, work, 0.0, config)
    gradients = [p.grad for p in student.model.parameters()]
    return [*results, *(g.full_tensor() if config.shard else g for g in gradients)]


@pytest.mark.parametrize("n", [2, 3])
def test_the_gradient_of_a_step_is_that_of_one_process(files, tmp_path, measured, n):
    arguments = [*files, "--out", str(tmp_path / "out")]
    assert several.run(n, tmp_path, steps_of, arguments, tmp_path) == [0] * n, (tmp_path / "0.txt").read_text()
    for rank in range(n):
        for case, together, alone in torch.load(tmp_path / f"{rank}.pt"):
            worst = max(relative_error(a, b) for a, b in zip(together, alone, strict=True))
            measured(f"gradients of {n} processes, {case}", worst, 1e-6)


@pytest.mark.parametrize("n, extra", [(2, "--micro_batch 2"), (3, ""), (2, "--shard --checkpoint_activations")])
def test_the_student_of_several_processes_is_that_of_one(files, one, tmp_path, measured, n, extra):
    """Also its answers, put together in order; and nothing is written or said twice."""
    arguments, together = [*files, *extra.split(), "--out", tmp_path / "all"], tmp_path / "all" / "dss"
    assert several.run(n, tmp_path, run, *arguments) == [0] * n, said(tmp_path)
    measured(f"student of {n} processes {extra}", apart(weights(together), weights(one)), 1e-5)
    assert (one / "predictions.jsonl").read_text() == (together / "predictions.jsonl").read_text()
    assert {p.name for p in one.iterdir()} == {p.name for p in together.iterdir()}
    losses, theirs = (read_losses(arm / "metrics.jsonl") for arm in (one, together))
    assert losses == pytest.approx(theirs, rel=1e-4)
    assert said(tmp_path).count("13 test; metric") == 1 and all(not said(tmp_path, r) for r in range(1, n))


@pytest.mark.parametrize("extra", [[], ["--shard"]])
def test_a_run_whose_process_dies_ends_with_a_line_and_goes_on_with_fewer(files, one, tmp_path, measured, extra):
    """Process 1 of 2 is killed in the middle of step 14, and one process goes on from step 10."""
    cut = [*files, *extra, "--save_minutes", "0", "--out", tmp_path / "cut"]
    assert several.run(2, tmp_path, at_step, 14, 1, signal.SIGKILL, cut) == [1, -signal.SIGKILL]
    kept = f"{tmp_path / 'cut' / 'dss'}/student is the best so far, --resume goes on from step 10"
    assert said(tmp_path).splitlines()[-1] == f"train.py: process 1 has ended; {kept}"
    assert several.run(1, tmp_path, run, *cut, "--resume") == [0]
    difference = apart(weights(one), weights(tmp_path / "cut" / "dss"))
    measured(f"student that one process ended for two {' '.join(extra)}", difference, 1e-5)


@pytest.mark.parametrize("extra", [[], ["--shard"]])
def test_a_signal_to_one_process_stops_all_at_the_same_step(files, tmp_path, extra):
    """They save their state, and go on to the student of an undisturbed run, dropout and all."""
    arguments = [*files, "--steps", "10", "--eval_every", "5", "--dropout", "0.1", *extra]
    assert several.run(2, tmp_path, run, *arguments, "--out", tmp_path / "whole") == [0, 0]
    cut = [*arguments, "--out", tmp_path / "cut"]
    assert several.run(2, tmp_path, at_step, 6, 1, signal.SIGTERM, cut) == [130, 130]
    assert (said(tmp_path) + said(tmp_path, 1)).count("train.py: dss interrupted at step 7;") == 1
    assert several.run(2, tmp_path, run, *cut, "--resume") == [0, 0]
    whole, cut = (weights(tmp_path / name / "dss") for name in ("whole", "cut"))
    assert same(whole, cut)


def at_step(step, rank, number, arguments):
    """A run in which process `rank` gets the signal `number` in the middle of a step."""
    calls = iter(range(1000))
    kill = lambda *_: next(calls) == step and parallel.rank() == rank and os.kill(os.getpid(), number)
    train.distillation_loss = watched("distillation_loss", kill)
    return run(*arguments)


def test_what_is_wrong_is_said_once(files, tmp_path):
    arguments = [*files, "--lr", "1e38", "--clip", "0", "--out", tmp_path / "out"]
    assert several.run(2, tmp_path, run, *arguments) == [1, 1]
    assert (said(tmp_path) + said(tmp_path, 1)).count("train.py: the loss is") == 1
    assert several.run(2, tmp_path, run, "--data", tmp_path / "none.jsonl") == [2, 2]
    assert (said(tmp_path) + said(tmp_path, 1)).count("none.jsonl: No such file") == 1


def said(directory, rank=0):
    return (directory / f"{rank}.txt").read_text()


def read_losses(metrics):
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
