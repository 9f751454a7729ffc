"""train.py: what a run writes, that settings reach the step, and that a step is the paper's."""

import os

import pytest
import torch
from running import (
    QUICK,
    SIX,
    counting,
    json_lines,
    prepare,
    result,
    run,
    weights,
    write_rows,
)

import tokenizer
import train
from data.files import read_json
from data.jsonl import Record
from dss.batch import LABEL, RATIONALE, join
from dss.bench import padded
from dss.config import parse_args
from dss.generate import score
from dss.methods import METHODS, PREDICT
from dss.weights import save_t5


def make_files(directory):
    """Rows to train on, two of them without a label and one without a rationale; rows to test."""
    rows = counting(24)
    bare = [Record("b", "How many?", "1 + 1"), Record("n", "x y"), Record("m", "y", None, "no")]
    return " ".join(write_rows(directory, [*rows[:20], *bare, *rows[20:]], 23))


@pytest.fixture
def files(tmp_path):
    return make_files(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output of a run of all methods."""
    directory = tmp_path_factory.mktemp("finished")
    methods = " ".join(METHODS)
    settings = f"{QUICK} --steps 6 --eval-every 3 --log-every 2 --method {methods}"
    assert run(make_files(directory), settings, "--out", directory / "out") == 0
    return directory / "out"


@pytest.mark.parametrize("method", METHODS)
def test_a_run_writes_what_the_contract_names(finished, method):
    out = finished / method
    names = {"config.json", "metrics.jsonl", "result.json", "predictions.jsonl", "student"}
    assert {path.name for path in out.iterdir()} == names
    config = read_json(out / "config.json")
    assert config["method"] == method and config["learning_rate"] == 0.03
    figures = result(finished, method)
    predictions = json_lines(out / "predictions.jsonl")
    assert [p["id"] for p in predictions] == ["r20", "r21", "r22", "r23"]
    assert sum(p["correct"] for p in predictions) / 4 == figures["test_accuracy"]
    explained = [sample["rationale"] is not None for sample in figures["samples"]]
    assert explained == [METHODS[method].learns_rationales] * 3
    lines = json_lines(out / "metrics.jsonl")
    assert [line["step"] for line in lines][:5] == [2, 3, 4, 6, 6]
    assert {"loss", "label_loss", "rationale_loss", "tokens_per_second"} <= lines[0].keys()
    assert lines[1].keys() == {"step", "validation_accuracy", "validation_score"}
    settings = parse_args(f"--steps {figures['steps']} --warmup 2".split())
    assert lines[2]["learning_rate"] == train.learning_rate(3, settings)


def test_finetuning_starts_from_public_weights(files, finished, tmp_path):
    """--weights brings its tokenizer, its shape and its dropout along; --dropout replaces the
    last."""
    pretrained = f"--weights {finished}/standard/student"
    assert run(files, SIX, pretrained, f"--lr 1e-9 --out {tmp_path}/out") == 0
    after = weights(tmp_path / "out" / "dss")
    for name, before in weights(finished / "standard").items():
        assert (before - after[name]).abs().max() < 1e-6
    model = prepare(f"{files} {pretrained} --dropout 0.25 --out {tmp_path}/new").student.model
    assert model.encoder.layers[0].self_attention.dropout_p == model.config.dropout_rate == 0.25


def test_of_free_text_the_student_with_the_lowest_loss_is_kept(tmp_path, monkeypatch):
    rows = [Record(f"r{i}", f"Diff {i}?", f"change {i} of them", "why") for i in range(40)]
    files = " ".join(write_rows(tmp_path, rows, 30))
    student = prepare(f"{files} --out {tmp_path}/none").student
    student.model.eval()
    total = 0.0
    for row in rows[:3]:
        ids = student.tokenizer.encode(row.label)
        total -= score(student.model, student.encode(PREDICT, [row.input]), [[ids]])[0][0]
    tokens = sum(len(student.tokenizer.encode(row.label)) for row in rows[:3])
    assert train.label_loss(student, rows[:3]) == pytest.approx(total / tokens, rel=1e-4)
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(train, "label_loss", lambda *_: next(losses))
    assert run(files, SIX, f"--out {tmp_path}/out") == 0
    figures = result(tmp_path / "out", "dss")
    assert figures["best_step"] == 4 and figures["validation_score"] == -1.0
    assert 0 <= figures["token_f1"] <= 1 and figures["doubt"] == ""


def test_matched_standard_trains_on_as_many_tokens_as_dss(finished):
    matched = result(finished, "standard-matched")
    assert matched["steps"] > 6
    assert matched["tokens"] == pytest.approx(result(finished, "dss")["tokens"], rel=0.1)


def test_the_learning_rate_rises_and_falls():
    for schedule, end in (("linear", 1 / 6), ("constant", 1.0)):
        config = parse_args(f"--steps 10 --warmup 4 --lr 1.0 --schedule {schedule}".split())
        rates = [train.learning_rate(step, config) for step in range(10)]
        assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[9] == pytest.approx(end)


def test_each_epoch_sees_each_row_once():
    config = parse_args("--batch-size 3 --seed 5".split())
    seen = []
    for step in range(14):
        seen += train.rows_of_step(step, 7, config)
    epochs = [tuple(seen[first : first + 7]) for first in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(epochs)) > 1
    assert len(train.rows_of_step(0, 2, config)) == 3, "a step may be larger than the data"


def test_thirty_steps_of_the_papers_settings_move_the_weights_as_transformers_does(
    files, tmp_path, transformers
):
    """The released code's trainer: linear decay without warm-up, AdamW, clipping at 1; a step is
    two padded passes, a mean each."""
    paper = "--optimizer adamw --lr 5e-5 --warmup 0 --beta2 0.999 --clip 1 --dropout 0"
    ready = prepare(f"{files} {paper} --steps 30 --batch-size 4 --out {tmp_path}/out")
    save_t5(ready.student.model, tmp_path / "first")
    model_class = transformers.T5ForConditionalGeneration
    theirs = model_class.from_pretrained(tmp_path / "first").train()
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=5e-5, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(their_optimizer, 0, 30)
    first = {name: p.detach().clone() for name, p in theirs.named_parameters()}

    examples, _ = train.make_examples(ready, "dss")
    optimizer = train.make_optimizer(ready.student.model, ready.config)
    works = train.steps_ahead(0, examples, ready.student, ready.config, "cpu")
    for step, work in enumerate(works):
        rate = train.learning_rate(step, ready.config)
        train.train_step(ready.student, optimizer, work, rate, ready)
        rows = [examples[row] for row in train.rows_of_step(step, len(examples), ready.config)]
        for task in (LABEL, RATIONALE):
            some = [s for s in join(rows) if s.task == task]
            x = padded([s.input_ids for s in some], 0)
            y = padded([s.target_ids for s in some], -100)
            theirs(input_ids=x, attention_mask=x.ne(0).long(), labels=y).loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        their_optimizer.step()
        schedule.step()
        their_optimizer.zero_grad()
    save_t5(ready.student.model, tmp_path / "last")
    last = dict(model_class.from_pretrained(tmp_path / "last").named_parameters())
    for name, want in theirs.named_parameters():
        assert (last[name] - want).norm() <= 1e-5 * want.norm(), name
        assert (want - first[name]).norm() > 1e-5 * want.norm(), "the weights have moved"


def test_scaled_rates_are_relative_to_the_initial_deviation(files, tmp_path):
    """As T5's own code draws a tensor, for d_model = 64 and d_kv = 32 of the size tiny."""
    settings = "--optimizer adamw-scaled --weight-decay 0.1 --beta2 0.9"
    ready = prepare(f"{files} {settings} --out {tmp_path}/out")
    model = ready.student.model
    optimizer = train.make_optimizer(model, ready.config)
    step(ready, optimizer, rate=0.5)
    layer = model.decoder.layers[1]
    want = {
        model.embedding.weight: 1.0,
        layer.cross_attention_norm.weight: 1.0,
        model.encoder.bias_table: 64**-0.5,
        layer.cross_attention.q.weight: (64 * 32) ** -0.5,
        layer.cross_attention.o.weight: 64**-0.5,
        layer.feed_forward.down.weight: 128**-0.5,
    }
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.9) and group["weight_decay"] == 0.1
        for parameter in want.keys() & set(group["params"]):
            assert group["lr"] == pytest.approx(0.5 * want.pop(parameter))
    assert not want


def step(ready, optimizer, rate=1.0):
    """The norm of the gradient of one step, before clipping."""
    examples, _ = train.make_examples(ready, "dss")
    work = next(train.steps_ahead(0, examples, ready.student, ready.config, "cpu"))
    _, norm = train.train_step(ready.student, optimizer, work, rate, ready)
    return norm.item()


def plain_descent(model):
    return torch.optim.SGD([{"params": model.parameters(), "scale": 1.0}])


@pytest.mark.parametrize("clip", [0.01, 0.0])
def test_gradients_are_clipped_to_the_norm_asked_for_or_not_at_all(files, tmp_path, clip):
    ready = prepare(f"{files} {SIX} --clip {clip} --dropout 0 --out {tmp_path}/out")
    model = ready.student.model
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    norm = step(ready, plain_descent(model))
    moved = torch.nn.utils.parameters_to_vector(model.parameters()) - before
    assert norm > 0.1 and moved.norm().item() == pytest.approx(clip or norm, rel=1e-3)


def test_training_begins_targets_with_the_checkpoints_start_token(files, tmp_path):
    ready = prepare(f"{files} {SIX} --out {tmp_path}/out")
    object.__setattr__(ready.student.model.config, "decoder_start_token_id", 7)
    examples, _ = train.make_examples(ready, "dss")
    (batch,) = next(train.steps_ahead(0, examples, ready.student, ready.config, "cpu")).batches
    assert set(batch.decoder_input_ids[batch.targets.cu_seqlens[:-1].long()].tolist()) == {7}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_computed_in_while_training_and_answering(files, tmp_path, dtype):
    ready = prepare(f"{files} {SIX} --dtype {dtype} --out {tmp_path}/out")
    model = ready.student.model
    found = []
    output = model.decoder.layers[0].self_attention.o
    output.register_forward_hook(lambda _, __, output: found.append(output.dtype))
    step(ready, plain_descent(model))
    ready.student.write(PREDICT, [ready.rows.test[0].input], 1)
    assert found == [getattr(torch, dtype)] * 2
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("accuracies, best", [([0.5, 0.5, 0.1], 1), ([0.5, 0.4, 0.4], 0)])
def test_the_weights_that_were_best_on_validation_are_tested_and_saved(
    files, tmp_path, monkeypatch, accuracies, best
):
    """Of equals, those that have learned longer."""
    left = iter(accuracies)
    original = train.evaluate
    seen = []

    def evaluate(student, rows, stop, what):
        right, answers = original(student, rows, stop, what)
        if what == "validation":
            right = torch.arange(10) < 10 * next(left)
            right = right.tolist()
        seen.append(torch.nn.utils.parameters_to_vector(student.model.parameters()).detach())
        return right, answers

    monkeypatch.setattr(train, "evaluate", evaluate)
    assert run(files, SIX, "--out", tmp_path / "out") == 0
    figures = result(tmp_path / "out", "dss")
    assert figures["best_step"] == 2 * (best + 1)
    assert figures["validation_accuracy"] == accuracies[best]
    *validated, tested = seen
    assert [torch.equal(tested, vector) for vector in validated] == [i == best for i in range(3)]


def test_a_student_that_does_not_fit_into_memory_is_refused(files, tmp_path, monkeypatch, refused):
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 500}  # 2 MB
    monkeypatch.setattr(os, "sysconf", sizes.get)
    said = refused(train.main, *f"{files} --device cpu --out {tmp_path}/out".split())
    assert "the cpu has 0.0 GB: take a smaller student, or --shard" in said
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_too_large_for_the_weights_is_refused(files, finished, tmp_path, capsys):
    small = tmp_path / "small"
    small.mkdir()
    tokenizer.train(["0123456789+"], small / "spiece.model", 20).save(small)
    save_t5(prepare(f"{files} --spiece {small} --out {tmp_path}/out").student.model, small)
    large = finished / "dss" / "student"
    assert run(files, f"--weights {small} --spiece {large} --out {tmp_path}/new") == 2
    assert "give the --spiece that belongs to it" in capsys.readouterr().err
