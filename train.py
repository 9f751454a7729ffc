"""Distilling Step-by-Step, the whole run on one page.

    python train.py                                   the embedded task: standard finetuning, then step-by-step
    python train.py --data train.jsonl --test-data test.jsonl --weights google/t5-v1_1-base

A teacher has written a rationale for each training question. The student, a small T5, learns two tasks from the same
question, told apart by a prefix: `predict: x -> label` and `explain: x -> rationale`, with

    L = L_label + lambda * L_rationale

and is tested on `predict:` alone, so rationales cost nothing then. Where each part is: dss/config.py has the flags,
dss/rows.py reads and divides the rows, dss/batch.py makes a row into two sequences and a step into one packed stream,
dss/model.py is T5, dss/loss.py the equation, dss/generate.py decoding, dss/run/ what happens around a run.
"""

import copy
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import kernels
import tokenizer
from data import arguments
from data.interrupt import Interrupted, Stop
from data.jsonl import write_jsonl
from dss.batch import EXPLAIN, PREDICT, SEPARATOR, count_targets, encode, pack, sequences, split_answer
from dss.config import SIZES, TrainConfig, parse_args
from dss.generate import generate
from dss.loss import distillation_loss
from dss.metrics import accuracy
from dss.model import T5
from dss.rows import Rows, load_rows, swap_rationales
from dss.run.ending import describe, end_early, save_student
from dss.run.output import (
    check_tokenizer,
    choose_device,
    choose_threads,
    claim_output,
    find_output,
    identify,
    write_json,
)
from dss.run.report import Log, introduce, report, say_what_was_cut
from dss.run.state import StateError, load_state, save_state
from dss.weights import load_t5, locate


def main(argv=None):
    """Exit status: 0 done, 1 training failed, 2 the arguments or files are wrong, 130 interrupted."""
    config = parse_args(argv)
    try:
        run = prepare(config)
    except (OSError, ValueError) as problem:
        return fail(2, problem)
    with Stop("stopping after this step; Ctrl-C again ends at once") as stop:
        try:
            results = [train_arm(run, method, stop) for method in config.method]
        except Interrupted as interruption:
            return fail(130, interruption)
        except StateError as problem:
            return fail(2, problem)
        except Exception as problem:
            if not (line := describe(problem)):
                raise
            return fail(1, line)
    report(run, results)
    return 0


# ---- Before training: everything that can be wrong with the input is found here, before anything is written ----------


@dataclass(frozen=True)
class Run:
    config: TrainConfig
    rows: Rows
    tokenizer: tokenizer.T5Tokenizer
    student: T5  # untrained, on the CPU; every arm starts from a copy
    device: torch.device
    out: Path
    identity: dict  # what config.json says


def prepare(config):
    """Raises OSError or ValueError, in one line, for whatever the user can put right."""
    device = choose_device(config.device, config.dtype)
    kernels.choice(device)
    rows = load_rows(config)
    out = find_output(config, rows.name)
    tok = make_tokenizer(config, rows, out)
    check_tokenizer(config, tok)
    student = make_student(config, tok)
    identity = identify(config, rows, tok)
    claim_output(config, out, identity)
    choose_threads(config.threads, student)
    tok.save(out)
    introduce(rows)
    size = f"{student.num_parameters():,} parameters, {tok.vocab_size:,} token ids"
    print(f"student: {config.weights or config.size}, {size}; {device}, {config.dtype}")
    return Run(config, rows, tok, student, device, out, identity)


def make_tokenizer(config, rows, out):
    """--spiece, or the weights' own, or one trained on the texts of the training rows."""
    if config.spiece or config.weights:
        return tokenizer.T5Tokenizer(config.spiece or locate(config.weights, weights=False))
    if config.resume and (out / "spiece.model").exists():
        return tokenizer.T5Tokenizer(out)
    texts = [text for r in rows.train for text in (PREDICT + r.input, EXPLAIN + r.input, r.label, r.rationale) if text]
    with tempfile.TemporaryDirectory() as directory:
        return tokenizer.train(texts, Path(directory) / "spiece.model", config.vocab_size)


def make_student(config, tok):
    """--weights, or a student of --size with T5's random initialisation."""
    if config.weights:
        student = load_t5(config.weights, dropout_rate=config.dropout)
    else:
        torch.manual_seed(config.seed)
        shape = SIZES[config.size]
        shape = replace(shape, vocab_size=shape.vocab_size or tok.vocab_size)
        student = T5(shape if config.dropout is None else replace(shape, dropout_rate=config.dropout))
    if tok.vocab_size > student.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tok.vocab_size:,} ids, but {config.weights or config.size} embeds "
            f"{student.config.vocab_size:,}; give the --spiece that belongs to it"
        )
    return student


# ---- One arm: a student trained by one method -----------------------------------------------------------------------


@dataclass
class Progress:
    """How far an arm has come. state.pt holds it, so that a resumed arm ends as an undisturbed one would."""

    step: int = 0  # optimiser steps done
    evaluated: int = 0  # the step of the last look at the validation rows
    best_step: int = 0
    best_accuracy: float = -1.0
    best: dict = field(default_factory=dict)  # the weights of best_step
    seconds: float = 0.0  # of training and evaluation
    tokens: int = 0  # trained on, inputs and targets
    window: dict = field(default_factory=dict)  # what the log has summed since its last line


def train_arm(run, method, stop):
    """Train one student, select it on the validation rows, test it once. Returns what OUT/METHOD/result.json holds."""
    out = run.out / method
    if (out / "result.json").exists():  # under --resume: this arm is finished
        (out / "state.pt").unlink(missing_ok=True)
        return json.loads((out / "result.json").read_text("utf-8"))
    if method == "standard-matched":
        run = replace(run, config=replace(run.config, steps=matched_steps(run)))
    config = run.config
    out.mkdir(exist_ok=True)
    write_json(out / "config.json", run.identity | {"method": method})

    torch.manual_seed(config.seed)
    model = copy.deepcopy(run.student).to(run.device)
    optimizer = make_optimizer(model, config)
    examples, cut = make_examples(run, method)
    say_what_was_cut(method, cut, config)
    now = Progress()
    if (out / "state.pt").exists():
        now = Progress(**load_state(out / "state.pt", model, optimizer))

    with Log(out / "metrics.jsonl", now) as log, progress_bar(config, method, now.step) as bar:
        try:
            while now.evaluated < config.steps:
                clock = time.monotonic()
                if now.step > now.evaluated and (now.step % config.eval_every == 0 or now.step == config.steps):
                    log.require_finite(model, now.step)  # a diverged student is never the best, and never saved
                    with log.paused():
                        share = select(run, method, model, now, stop)
                        log.write(now.step, validation_accuracy=share)
                        bar.write(f"{method}: step {now.step:,}, validation accuracy {share:.1%}", file=sys.stderr)
                        save_state(out / "state.pt", model, optimizer, vars(now))
                else:
                    rows = rows_of_step(now.step, len(examples), config.batch_size, config.seed)
                    rate = learning_rate(now.step, config)
                    losses, norm, tokens = train_step(run, model, optimizer, [examples[i] for i in rows], rate)
                    now.step, now.tokens = now.step + 1, now.tokens + tokens
                    log.add(losses, tokens)
                    bar.update()
                    if now.step % config.log_every == 0 or now.step == config.steps:
                        bar.set_postfix_str(log.write_means(now.step, rate, norm), refresh=False)
                now.seconds += time.monotonic() - clock
                stop.check()
            bar.close()
            model.load_state_dict(now.best)
            return finish_arm(run, method, model, now, cut, stop)
        except Exception as problem:  # Ctrl-C, a loss that is not a number, no memory, no disk
            raise end_early(problem, run, out, model, optimizer, now) from None


def train_step(run, model, optimizer, examples, rate):
    """One optimiser step on the sequences of some rows, `micro_batch` rows at a time.

    Returns the step's (L, L_label, L_rationale) as a (3,) tensor, the gradient's norm before clipping, and its tokens.
    """
    config = run.config
    n_label, n_rationale = count_targets([s for row in examples for s in row])  # of the whole step
    size = config.micro_batch or len(examples)
    total, tokens = torch.zeros(3, device=run.device), 0
    model.train()
    for start in range(0, len(examples), size):
        rows = examples[start : start + size]
        batch = pack([s for row in rows for s in row], run.device, model.config.decoder_start_token_id)
        with autocast(run):
            L, L_label, L_rationale = distillation_loss(model, batch, n_label, n_rationale, config.lam)
        L.backward()
        total += torch.stack([L.detach(), L_label, L_rationale])
        tokens += len(batch.input_ids) + len(batch.labels)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or float("inf"))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return total, norm, tokens


def select(run, method, model, now, stop):
    """Look at the validation rows; keep these weights if none were better. Returns the accuracy."""
    share, _, _ = evaluate(run, method, model, run.rows.validation, stop)
    if share >= now.best_accuracy:  # a tie goes to the weights that have learned longer
        now.best = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
        now.best_accuracy, now.best_step = share, now.step
    now.evaluated = now.step
    return share


def evaluate(run, method, model, rows, stop):
    """(label accuracy, [right or not], [(label, rationale or None)]) of the model's answers to rows, by `predict:`."""
    answers = []
    for start in range(0, len(rows), 256):
        stop.check()
        answers += answer(run, method, model, rows[start : start + 256])
    return *accuracy([label for label, _ in answers], rows, run.rows.metric), answers


def answer(run, method, model, rows):
    """[(label, rationale)] as the model predicts them. Only single_task writes a rationale before it answers."""
    config, decode = run.config, run.tokenizer.decode
    if method != "single_task":
        return [(decode(ids), None) for ids in write(run, model, PREDICT, rows, config.max_new_tokens)]
    outputs = write(run, model, PREDICT, rows, config.max_target_length)
    parts = [split_answer(ids, run.tokenizer.special[SEPARATOR]) for ids in outputs]
    return [(decode(label), decode(rationale)) for rationale, label in parts]


def write(run, model, prefix, rows, longest):
    """What the model writes for each row under a prefix: lists of at most `longest` token ids."""
    inputs = [encode(run.tokenizer, prefix + row.input, run.config.max_input_length) for row in rows]
    with autocast(run):
        return generate(model.eval(), inputs, longest)


def finish_arm(run, method, model, now, cut, stop):
    """Test the selected student, this once, and write predictions, student and result. Returns the result."""
    config, out = run.config, run.out / method
    which, rows = ("test", run.rows.test) if run.rows.test else ("validation", run.rows.validation)
    share, right, answers = evaluate(run, method, model, rows, stop)
    predictions = [
        dict(id=r.id, split=which, input=r.input, label=r.label, prediction=label, correct=ok, rationale=rationale)
        for r, (label, rationale), ok in zip(rows, answers, right)
    ]
    write_jsonl(out / "predictions.jsonl", predictions)
    samples = predictions[:3]
    if method.startswith("dss"):  # for the reader's eyes: the second task, which no test needs
        for sample, ids in zip(samples, write(run, model, EXPLAIN, rows[:3], config.max_target_length)):
            sample["rationale"] = run.tokenizer.decode(ids)
    save_student(model, run.tokenizer, out)
    result = {
        "method": method,
        "test_accuracy": share if which == "test" else None,
        "validation_accuracy": now.best_accuracy,
        "metric": run.rows.metric,
        "best_step": now.best_step,
        "steps": now.step,
        "rows": len(run.rows.train),
        "tokens": now.tokens,
        "inputs_cut": cut["inputs"],
        "targets_cut": cut["targets"],
        "seconds": now.seconds,
        "parameters": model.num_parameters(),
        "device": str(run.device),
        "torch": torch.__version__,
        "samples": samples,
    }
    write_json(out / "result.json", result)
    (out / "state.pt").unlink(missing_ok=True)
    return result


# ---- Small parts ----------------------------------------------------------------------------------------------------


def make_examples(run, method):
    """A list for each training row, the one or two sequences that the method trains on, and what was cut of them."""
    config = run.config
    rows = swap_rationales(run.rows.train, config.seed) if method == "dss-shuffled" else run.rows.train
    if config.lam == 0 and method.startswith("dss"):
        method = "standard"  # L = L_label: no need to compute what has no weight
    rows, cut = tqdm(rows, desc=f"{method}: tokenizing", unit="row", leave=False, delay=3), Counter()
    lengths = config.max_input_length, config.max_target_length
    return [sequences(row, method, run.tokenizer, *lengths, cut) for row in rows], cut


def matched_steps(run):
    """Steps in which standard finetuning trains on as many tokens as step-by-step does in --steps."""
    tokens = {
        method: sum(len(s.input_ids) + len(s.target_ids) for row in make_examples(run, method)[0] for s in row)
        for method in ("standard", "dss")
    }
    return round(run.config.steps * tokens["dss"] / tokens["standard"])


def make_optimizer(model, config):
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(step, config):
    """Linear warm-up, then level or linearly down, reaching 0 just after the last step."""
    rise = min(1.0, (step + 1) / max(config.warmup, 1))
    fall = (config.steps - step) / max(config.steps - config.warmup, 1) if config.schedule == "linear" else 1.0
    return config.learning_rate * min(rise, fall)


def rows_of_step(step, n, batch_size, seed):
    """The row numbers of one step: row numbers 0..n-1 in a new order each epoch, epochs joined without a gap."""
    places = [divmod(i, n) for i in range(step * batch_size, (step + 1) * batch_size)]
    return [int(epoch_order(n, seed, epoch)[place]) for epoch, place in places]


@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def autocast(run):
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.dtype == "bfloat16")


def progress_bar(config, method, step):
    patience = 0.5 if sys.stderr.isatty() else 30  # seconds between lines in a log file
    return tqdm(total=config.steps, initial=step, desc=method, unit="step", mininterval=patience)


fail = partial(arguments.fail, "train.py")


if __name__ == "__main__":
    arguments.run("train.py", main)
