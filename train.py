"""Distilling Step-by-Step, the whole run on one page.

    python train.py                      the embedded task: standard finetuning, then step-by-step
    python train.py --data train.jsonl --test-data test.jsonl --weights google/t5-v1_1-base

A teacher has written a rationale for each training question. The student, a small T5, learns two
tasks from the same question, told apart by a prefix: `predict: x -> label` and `explain: x ->
rationale`, with

    L = L_label + lambda * L_rationale

and is tested on `predict:` alone, so rationales cost nothing then. Read this file top-down. One
step calls three others: dss/methods.py (a row becomes the two sequences), dss/batch.py (the
sequences of a step become one packed stream) and dss/loss.py (the equation), which calls
dss/model.py (T5).
"""

import contextlib
import copy
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import kernels
from data import cli
from data.files import read_json, write_json
from data.jsonl import Record, write_jsonl
from dss import distributed, graph
from dss.aids import Renaming, look_alike, table_deviation
from dss.batch import Batch, Budget, Sequence, Step, ahead, count_tokens, join, make_step
from dss.checkpoint import Checkpoint, Ended, claimed, find_output, forget_state
from dss.config import SIZES, T5Config, TrainConfig, parse_args
from dss.log import Log, Progress, introduce, warn_of_cut_sequences
from dss.loss import distillation_loss
from dss.methods import METHODS, require_methods, sequences
from dss.model import T5
from dss.report import measure, reason_to_doubt, report
from dss.rows import Rows, load_rows, make_tokenizer
from dss.stats import measure_baselines
from dss.student import Prediction, Student
from dss.weights import load_t5, read_config, resolve_checkpoint
from tokenizer import T5Tokenizer


@dataclass(frozen=True)
class Run:
    """What all methods of a run share."""

    config: TrainConfig
    rows: Rows
    student: Student  # untrained, on the CPU; every method starts from these weights
    placement: distributed.Replicas  # or its subclass Shards: where the weights are
    out: Path
    captures: bool = False  # whether steps are replayed as a CUDA graph (dss/graph.py)

    @cached_property
    def baselines(self) -> dict[str, float | None]:
        return measure_baselines(self.rows)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 training failed, 2 the arguments or files are wrong, 130
    interrupted."""
    with distributed.process_group() as own_stderr:
        try:
            run = prepare(parse_args(argv))
            train_all(run)
        except Ended as end:
            with contextlib.redirect_stderr(own_stderr if end.local else sys.stderr):
                status = cli.fail("train.py", end.status, end)
            if end.local and distributed.size() > 1:  # the others are not here to leave together
                raise SystemExit(status) from None
            return status
        except (OSError, ValueError) as error:
            return cli.fail("train.py", 2, error)
    return 0


def train_all(run: Run) -> None:
    notice = "stopping after this step; Ctrl-C again ends at once"
    tokenizer = run.student.tokenizer
    with claimed(run.out, run.config, run.rows, tokenizer), cli.Stop(notice) as stop:
        if distributed.is_first():
            tokenizer.save(run.out)
        results = [train(run, method, stop) for method in run.config.method]
    if distributed.is_first():
        report(run.out, run.rows, results)


def train(run: Run, method: str, stop: cli.Stop) -> dict:
    """Train a student by one method, select it on the validation rows, test it once. Returns its
    result.json."""
    out = run.out / method
    if (out / "result.json").exists():  # under --resume: done before
        return read_json(out / "result.json")
    examples, cut = make_examples(run, method)
    config = replace(run.config, steps=number_of_steps(run, method, examples))
    model = run.placement.place(copy.deepcopy(run.student.model))
    student = replace(run.student, method=method, model=model)
    optimizer = make_optimizer(model, config)
    checkpoint = Checkpoint(out, student, optimizer, run.placement, config)
    progress = checkpoint.progress
    log = Log(out / "metrics.jsonl", method, progress, config.steps)
    warn_of_cut_sequences(method, cut)
    take_step = graph.CapturedStep(train_step) if run.captures else train_step

    def validate() -> None:
        current = checkpoint.whole_student()
        right, _ = evaluate(current, run.rows.validation, stop, "validation")
        accuracy = sum(right) / len(right)
        score = accuracy
        if run.rows.free_text:
            score = -label_loss(current, run.rows.validation)
        checkpoint.keep_if_best(current, accuracy, score)
        log.write_accuracy(accuracy, score)

    with checkpoint, log:  # if training ends early, the checkpoint says what is kept
        if is_due(progress.step, config) and progress.evaluated < progress.step:
            validate()  # the run was interrupted in this evaluation
        device = run.placement.device
        for work in steps_ahead(progress.step, examples, student, config, device, run.captures):
            rate = learning_rate(progress.step, config)
            distributed.seed(config.seed, progress.step)
            losses, norm = take_step(student, optimizer, work, rate, run)
            progress.step += 1
            progress.tokens += work.tokens
            log.add_step(losses, work.tokens)
            if progress.step % config.log_every == 0 or progress.step == config.steps:
                log.write_means(rate, norm)
            if is_due(progress.step, config):
                validate()
            checkpoint.keep_state()
            distributed.check(stop)  # raises Interrupted, in all processes at the same step
        log.bar.close()
        checkpoint.keep_state(at_once=True)
        best = replace(student, model=checkpoint.load_best())
        return test_once(best, run, progress, cut, stop)


def train_step(
    student: Student,
    optimizer: torch.optim.Optimizer,
    work: Step,
    rate: float | Tensor,
    run: Run,
) -> tuple[Tensor, Tensor]:
    """One optimiser step. Returns its (L, L_label, L_rationale) as a (3,) tensor, and its
    gradient's norm before clipping."""
    model = student.model.train()
    losses = torch.zeros(3, device=run.placement.device)
    for batch in work.batches:  # one, without --micro-batch
        # In bfloat16, this casts all weights together; a layer that is computed again in the
        # backward pass needs them, too.
        with run.placement.cast(model):
            with student.autocast():
                L, L_label, L_rationale = distillation_loss(
                    model, batch, work.n_label, work.n_rationale, run.config.lam
                )
            L.backward()
        losses += torch.stack([L.detach(), L_label, L_rationale])
    run.placement.sum_gradients(model, losses)  # over processes: each had a part of the rows
    norm = run.placement.clip(model, run.config.clip or float("inf"))
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    optimizer.step()
    optimizer.zero_grad()
    return losses, norm


def evaluate(
    student: Student, rows: list[Record], stop: cli.Stop, what: str
) -> tuple[list[bool], list[Prediction]]:
    """(right or not, the student's Prediction) for each row, by `predict:` alone."""
    inputs = [row.input for row in rows]
    answers = []
    at_a_time = 256 * distributed.size()
    for first in tqdm(range(0, len(rows), at_a_time), what, unit="batch", leave=False, delay=3):
        distributed.check(stop)
        answers += distributed.share_out(student.predict, inputs[first : first + at_a_time])
    right = [student.is_right(answer.label, row) for answer, row in zip(answers, rows)]
    return right, answers


@torch.no_grad()
def label_loss(student: Student, rows: list[Record]) -> float:
    """The mean cross-entropy of the rows' label tokens, in nats."""
    model = student.model.eval()
    lengths = (student.max_input_length, student.max_target_length)
    examples = [sequences(row, student.method, student.tokenizer, *lengths) for row in rows]
    device = model.embedding.weight.device
    step = make_step(examples, student.batch_size, device, model.config.decoder_start_token_id)

    def losses(batches: list[Batch]) -> list[float]:
        with student.autocast():
            found = [distillation_loss(model, batch, step.n_label, 0, 0.0) for batch in batches]
        return [loss.item() for loss, _, _ in found]

    return sum(distributed.share_out(losses, step.batches))


def test_once(student: Student, run: Run, progress: Progress, cut: Counter, stop: cli.Stop) -> dict:
    """Test the selected student, this once, and write predictions and result. Returns the result.

    Without test rows, the predictions are those of the validation rows.
    """
    rows = run.rows
    right, answers = evaluate(student, rows.asked, stop, rows.asked_name)
    predictions = []
    for row, answer, is_right in zip(rows.asked, answers, right):
        prediction = {
            "id": row.id,
            "split": rows.asked_name,
            "input": row.input,
            "label": row.label,
            "prediction": answer.label,
            "correct": is_right,
            "rationale": answer.rationale,
        }
        predictions.append(prediction)
    samples = predictions[:3]
    if METHODS[student.method].learns_rationales:  # to show them: no test needs a rationale
        rationales = student.explain([sample["input"] for sample in samples])
        samples = [s | {"rationale": text} for s, text in zip(samples, rationales)]
    result = {
        "method": student.method,
        "test_accuracy": sum(right) / len(right) if rows.test else None,
        "validation_accuracy": progress.best_accuracy,
        "validation_score": progress.best_score,
        "metric": rows.metric,
        "best_step": progress.best_step,
        "steps": progress.step,
        "rows": len(rows.train),
        "tokens": progress.tokens,
        "inputs_cut": cut["inputs"],
        "targets_cut": cut["targets"],
        "seconds": progress.seconds,
        "parameters": student.model.num_parameters(),
        "device": str(run.placement.device),
        "torch": torch.__version__,
        "samples": samples,
        **run.baselines,
    }
    result |= measure(student, rows, right, answers)
    result["doubt"] = reason_to_doubt(result, run.out / student.method / "metrics.jsonl")
    if distributed.is_first():
        out = run.out / student.method
        write_jsonl(out / "predictions.jsonl", predictions)
        write_json(out / "result.json", result)
        forget_state(out)
    return result


# ---- What a step needs ---------------------------------------------------------------------------


def make_examples(run: Run, method: str) -> tuple[list[list[Sequence]], Counter]:
    """The sequences of each training row, as arrays, which take a quarter of a list's memory; and
    how many were cut."""
    config = run.config
    rows = METHODS[method].change_rows(run.rows.train, config.seed)
    cut = Counter()
    examples = []
    for row in tqdm(rows, f"{method}: tokenizing", unit="row", leave=False, delay=3):
        found = sequences(
            row,
            method,
            run.student.tokenizer,
            config.max_input_length,
            config.max_target_length,
            cut,
        )
        examples.append([Sequence(array("i", x), array("i", y), task) for x, y, task in found])
    return examples, cut


def number_of_steps(run: Run, method: str, examples: list[list[Sequence]]) -> int:
    """--steps, or as many as see the same number of tokens as another method sees in --steps."""
    other = METHODS[method].match_tokens_of
    if not other:
        return run.config.steps
    its_examples, _ = make_examples(run, other)
    its_tokens = sum(count_tokens(row) for row in its_examples)
    own_tokens = sum(count_tokens(row) for row in examples)
    return round(run.config.steps * its_tokens / own_tokens)


def steps_ahead(
    first: int,
    examples: list[list[Sequence]],
    student: Student,
    config: TrainConfig,
    device: torch.device,
    captures: bool = False,
) -> Iterator[Step]:
    """The steps from `first` on, packed on the host while the device computes those before.

    captures: pad them all to one shape, that of the longest of the first ones of the run.
    """
    start_token = student.model.config.decoder_start_token_id
    rank = distributed.rank()
    size = distributed.size()
    renaming = Renaming(student.tokenizer, student.labels, config.rename_words)

    def rows_of(step: int) -> list[list[Sequence]]:
        return [examples[i] for i in rows_of_step(step, len(examples), config)]

    budget = None
    if captures:
        budget = Budget.of([join(rows_of(step)) for step in range(graph.BATCHES)])

    def make(step: int) -> Step:
        rows = rows_of(step)
        if config.rename_words:
            generator = np.random.default_rng((config.seed, step))
            rows = [renaming.rename(row, generator) for row in rows]
        return make_step(rows, config.micro_batch, device, start_token, rank, size, budget)

    return ahead(make, range(first, config.steps))


def rows_of_step(step: int, n: int, config: TrainConfig) -> list[int]:
    """The numbers of a step's rows: the n rows in a new order each epoch, epochs joined without a
    gap."""
    first = step * config.batch_size
    rows = []
    for place in range(first, first + config.batch_size):
        epoch, place_in_epoch = divmod(place, n)
        rows.append(int(epoch_order(n, config.seed, epoch)[place_in_epoch]))
    return rows


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def make_optimizer(model: T5, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW. With scaled rates, the rate of a tensor is that of the step times the deviation with
    which the tensor is initialised (at least 1e-3): a step changes all of them by a like share."""
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = 1.0
        if config.scales_rates:
            scale = max(model.initial_deviation(name), 1e-3)
        if config.scales_rates and config.look_alike and name == "encoder.bias_table":
            scale = table_deviation(model)
        groups.setdefault(scale, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "scale": scale} for scale, parameters in groups.items()],
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then level or linearly down, reaching 0 just after the last step."""
    rise = min(1.0, (step + 1) / max(config.warmup, 1))
    if config.schedule == "constant":
        return config.learning_rate * rise
    fall = (config.steps - step) / max(config.steps - config.warmup, 1)
    return config.learning_rate * min(rise, fall)


def is_due(step: int, config: TrainConfig) -> bool:
    """Whether the validation rows are answered after so many steps."""
    return step > 0 and (step % config.eval_every == 0 or step == config.steps)


# ---- Before training: bad arguments, rows and weights are found before anything is written -------


def prepare(config: TrainConfig) -> Run:
    """Raises OSError or ValueError, in one line, for what the user can put right."""
    require_methods(config.method)
    device = distributed.choose_device(config.device)
    config = replace(config, dtype=distributed.choose_dtype(config.dtype, device))
    kernels.choice(device)  # raises for a DSS_KERNELS that is impossible here
    captures = graph.is_wanted(config, device)
    rows = load_rows(config)
    out = find_output(config, rows.name)
    tokenizer = make_tokenizer(config, rows, out)
    shape = shape_of(config, tokenizer)
    with torch.device("meta"):
        parameters = T5(shape).num_parameters()
    state_bytes = distributed.require_memory(parameters, config, device)
    model = make_model(config, shape)
    if config.threads or parameters < 5e6:  # more threads would slow a small student down
        torch.set_num_threads(config.threads or 1)
    answers = config.answers
    if answers == "auto":
        answers = "likeliest" if rows.metric == "choice" else "write"
    if answers == "likeliest" and rows.metric != "choice" and not rows.labels:
        raise ValueError(
            "--answers likeliest: neither choices in the inputs nor a closed set of labels"
        )
    student = Student(
        model,
        tokenizer,
        metric=rows.metric,
        labels=rows.labels,
        answers=answers,
        max_input_length=config.max_input_length,
        max_target_length=config.max_target_length,
        max_new_tokens=config.max_new_tokens,
        dtype=config.dtype,
    )
    introduce(rows, student, config, device, state_bytes)
    placement = distributed.placement(config, device)
    return Run(config, rows, student, placement, out, captures)


def shape_of(config: TrainConfig, tokenizer: T5Tokenizer) -> T5Config:
    """The student's shape. Raises ValueError for a tokenizer with more ids than it embeds."""
    shape = SIZES[config.size]
    if config.weights:
        shape = read_config(resolve_checkpoint(config.weights, weights=False) / "config.json")
    if shape.vocab_size == 0:
        shape = replace(shape, vocab_size=tokenizer.vocab_size)
    if tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, but {config.weights or config.size} "
            f"embeds {shape.vocab_size:,}; give the --spiece that belongs to it"
        )
    if config.dropout is not None:
        shape = replace(shape, dropout_rate=config.dropout)
    return shape


def make_model(config: TrainConfig, shape: T5Config) -> T5:
    """--weights, or a T5 with random weights."""
    if config.weights:
        return load_t5(config.weights, shape.dropout_rate)
    torch.manual_seed(config.seed)
    model = T5(shape)
    if config.look_alike:
        look_alike(model)
    return model


if __name__ == "__main__":
    cli.run("train.py", main)
