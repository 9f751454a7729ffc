"""Distilling Step-by-Step, the whole run on one page.

    python train.py                                   the embedded task: standard finetuning, then step-by-step
    python train.py --data train.jsonl --test-data test.jsonl --weights google/t5-v1_1-base

A teacher has written a rationale for each training question. The student, a small T5, learns two tasks from the same
question, told apart by a prefix: `predict: x -> label` and `explain: x -> rationale`, with

    L = L_label + lambda * L_rationale

and is tested on `predict:` alone, so rationales cost nothing then. Read on in dss/: config.py has the flags, rows.py
divides the rows, batch.py makes a row into two sequences and a step into packed streams, model.py is T5, loss.py the
equation, student.py what a student answers. run/ is what happens around a run.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends at once and without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import kernels
from data import cli
from data.cli import Stop
from data.files import read_json, write_json
from data.jsonl import Record, write_jsonl
from dss.batch import Examples, Step, ahead, count_tokens, make_step, sequences
from dss.config import TrainConfig, parse_args
from dss.loss import distillation_loss
from dss.model import T5
from dss.rows import Rows, load_rows, rows_for, single_rationales
from dss.run import parallel, start
from dss.run.plan import make_plan, plan_of
from dss.run.report import Log, introduce, report, say_what_was_cut
from dss.run.state import Ended, Keeper, Progress, forget_state
from dss.stats import commonest_label
from dss.student import Student
from tokenizer import T5Tokenizer


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 training failed, 2 the arguments or files are wrong, 130 interrupted."""
    try:
        with parallel.joined():
            config = parse_args(argv)
            if config.plan:
                print(plan_of(config))
                return 0
            run = prepare(config)
            notice = "stopping after this step; Ctrl-C again ends at once"
            with start.claimed(run.out, run.config, run.rows, run.student.tokenizer), Stop(notice) as stop:
                if parallel.is_first():
                    run.student.tokenizer.save(run.out)
                results = [train(run, method, stop) for method in config.method]
            if parallel.is_first():
                report(run.out, run.rows, config, results)
    except Ended as end:
        return cli.fail("train.py", end.status, end)
    except KeyboardInterrupt:
        return cli.fail("train.py", 130, "interrupted; if a state was saved, --resume goes on from it")
    except (OSError, ValueError) as error:
        return cli.fail("train.py", 2, error)
    return 0


def train(run: "Run", method: str, stop: Stop) -> dict:
    """Train a student by one method, select it on the validation rows, test it once (on the validation rows, where
    there are no test rows). Returns its result.json."""
    config, rows, out = run.config, run.rows, run.out / method
    if (out / "result.json").exists():  # under --resume: done before
        return read_json(out / "result.json")
    student = parallel.place(replace(run.student, method=method), run.device, config)
    examples, cut = make_examples(rows.train, method, config, student.tokenizer)
    say_what_was_cut(method, cut, config)
    if method == "standard-matched":
        config = replace(config, steps=matched_steps(examples, run))
    optimizer = make_optimizer(student.model, config)
    keeper = Keeper(out, student, optimizer, config)
    progress = keeper.progress
    log = Log(out / "metrics.jsonl", method, progress, config.steps)

    def validate() -> None:
        keeper.require_finite()  # a diverged student is never the best, and never saved
        right, _ = evaluate(student, rows.validation, stop, "validation")
        accuracy, progress.evaluated = sum(right) / len(right), progress.step
        if accuracy >= progress.best_accuracy:  # a tie goes to the weights that have learned longer
            keeper.keep_best(accuracy)
        log.write_accuracy(accuracy)

    with keeper, log:  # where training ends early, the keeper saves its state and says what is kept
        if progress.evaluated < progress.step and is_due(progress.step, config):  # interrupted in an evaluation
            validate()
        steps = steps_ahead(progress.step, examples, student, config)
        for step in range(progress.step, config.steps):
            work, rate = next(steps), learning_rate(step, config)
            parallel.seed(config.seed, step)
            losses, norm = train_step(student, optimizer, work, rate, config)
            progress.step, progress.tokens = step + 1, progress.tokens + work.tokens
            log.add(losses, work.tokens)
            if progress.step % config.log_every == 0 or progress.step == config.steps:
                log.write_means(rate, norm)
            if is_due(progress.step, config):
                validate()
            keeper.keep_state()
            parallel.check(stop)  # raises Interrupted, in all processes at the same step
        log.bar.close()
        keeper.keep_state(at_once=True)
        keeper.load_best()
        return test(student, rows, progress, cut, out, stop)


def train_step(
    student: Student, optimizer: torch.optim.Optimizer, work: Step, rate: float, config: TrainConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimiser step. Returns its (L, L_label, L_rationale) as a (3,) tensor, and its gradient's norm before
    clipping."""
    model = student.model.train()
    total = torch.zeros(3, device=model.embedding.weight.device)
    for batch in work.batches:
        with student.autocast():
            L, L_label, L_rationale = distillation_loss(model, batch, work.n_label, work.n_rationale, config.lam)
        L.backward()
        total += torch.stack([L.detach(), L_label, L_rationale])
    gradients = [] if config.shard else [parameter.grad for parameter in model.parameters()]  # FSDP2 has summed its own
    parallel.sum_up([total, *gradients])  # over processes: each had a part of the rows
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or float("inf"))
    norm = norm.full_tensor() if config.shard else norm
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return total, norm


def evaluate(student: Student, rows: list[Record], stop: Stop, what: str) -> tuple[list[bool], list[tuple]]:
    """(right or not, (label, rationale)) of the student's answer to each row, by `predict:` alone."""
    found, size = [], 256 * parallel.size()
    for first in tqdm(range(0, len(rows), size), desc=what, unit="batch", leave=False, delay=3):
        parallel.check(stop)
        found += parallel.share_out(lambda some: list(zip(*student.evaluate(some))), rows[first : first + size])
    return [right for right, _ in found], [answer for _, answer in found]


def test(student: Student, rows: Rows, progress: Progress, cut: Counter, out: Path, stop: Stop) -> dict:
    """Test the selected student, this once, and write predictions and result. Returns the result."""
    which, asked = ("test", rows.test) if rows.test else ("validation", rows.validation)
    right, answers = evaluate(student, asked, stop, which)
    predictions = [
        dict(id=r.id, split=which, input=r.input, label=r.label, prediction=label, correct=ok, rationale=rationale)
        for r, (label, rationale), ok in zip(asked, answers, right)
    ]
    samples = predictions[:3]
    if "standard" not in student.method:  # for the reader's eyes: no test needs the rationale
        for sample, rationale in zip(samples, student.explain([row.input for row in asked[:3]])):
            sample["rationale"] = rationale
    result = {
        "method": student.method,
        "test_accuracy": sum(right) / len(right) if rows.test else None,
        "validation_accuracy": progress.best_accuracy,
        "metric": rows.metric,
        "best_step": progress.best_step,
        "steps": progress.step,
        "rows": len(rows.train),
        "commonest_label": commonest_label([row.label for row in rows.train], asked, rows.metric)[1],
        "tokens": progress.tokens,
        "inputs_cut": cut["inputs"],
        "targets_cut": cut["targets"],
        "seconds": progress.seconds,
        "parameters": student.model.num_parameters(),
        "device": str(student.model.embedding.weight.device),
        "torch": torch.__version__,
        "samples": samples,
    }
    if parallel.is_first():
        write_jsonl(out / "predictions.jsonl", predictions)
        write_json(out / "result.json", result)
        forget_state(out)
    return result


# ---- Before training: what is wrong with arguments, rows or weights is found here, before anything is written --------


@dataclass(frozen=True)
class Run:
    config: TrainConfig
    rows: Rows
    student: Student  # untrained, on the CPU; every method starts from these weights
    device: torch.device
    out: Path


def prepare(config: TrainConfig) -> Run:
    """Raises OSError or ValueError, in one line, for what the user can put right."""
    device = start.choose_device(config.device, config.dtype)
    config = replace(config, dtype=start.choose_dtype(config.dtype, device))
    kernels.choice(device)  # raises for a DSS_KERNELS that cannot be
    if config.processes not in (0, parallel.size()):
        raise ValueError(f"--processes: torchrun --nproc_per_node={config.processes} train.py starts so many")
    rows = load_rows(config)
    out = start.find_output(config, rows.name)
    tok = start.make_tokenizer(config, rows, out)
    make_plan(config, rows, tok, device).require_fit()
    model = start.make_model(config, tok)
    start.choose_threads(config.threads, model)
    lengths = {name: getattr(config, name) for name in ("max_input_length", "max_target_length", "max_new_tokens")}
    student = Student(model, tok, metric=rows.metric, labels=rows.labels, dtype=config.dtype, **lengths)
    introduce(rows, student, config, device)
    return Run(config, rows, student, device, out)


# ---- What a step needs ----------------------------------------------------------------------------------------------


def make_examples(
    rows: list[Record], method: str, config: TrainConfig, tokenizer: T5Tokenizer
) -> tuple[Examples, Counter]:
    """For each row and each of its rationales the sequences to train on, and how many of them were cut."""
    examples, cut = Examples(), Counter()
    learned = "standard" if config.lam == 0 and method.startswith("dss") else method  # then L = L_label
    lengths = config.max_input_length, config.max_target_length
    rows = rows_for(method, rows, config.seed)
    for row in tqdm(rows, desc=f"{method}: tokenizing", unit="row", leave=False, delay=3):
        examples.add(sequences(one, learned, tokenizer, *lengths, cut) for one in single_rationales(row))
    return examples, cut


def steps_ahead(first: int, examples: Examples, student: Student, config: TrainConfig) -> Iterator[Step]:
    """The steps from `first` on, made on the host while the device computes those before."""
    model, process = student.model, (parallel.rank(), parallel.size())
    device, start_token = model.embedding.weight.device, model.config.decoder_start_token_id

    def make(step: int) -> Step:
        rows = [examples.sequences(row, epoch) for row, epoch in rows_of_step(step, len(examples), config)]
        return make_step(rows, config.micro_batch, device, start_token, *process)

    return ahead(make, range(first, config.steps))


def matched_steps(examples: Examples, run: Run) -> int:
    """The number of steps after which standard finetuning has seen as many tokens as step-by-step sees in --steps."""
    dss, _ = make_examples(run.rows.train, "dss", run.config, run.student.tokenizer)
    standard, matched = (sum(count_tokens(some.sequences(row)) for row in range(len(some))) for some in (examples, dss))
    return round(run.config.steps * matched / standard)


def make_optimizer(model: T5, config: TrainConfig) -> torch.optim.Optimizer:
    settings = dict(lr=config.learning_rate, weight_decay=config.weight_decay)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(model.parameters(), foreach=False, **settings)  # one matrix at a time: memory
    return torch.optim.AdamW(model.parameters(), betas=(0.9, config.beta2), fused=True, **settings)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then level or linearly down, reaching 0 just after the last step."""
    rise = min(1.0, (step + 1) / max(config.warmup, 1))
    fall = (config.steps - step) / max(config.steps - config.warmup, 1) if config.schedule == "linear" else 1.0
    return config.learning_rate * min(rise, fall)


def is_due(step: int, config: TrainConfig) -> bool:
    """Whether the validation rows are looked at after so many steps."""
    return step > 0 and (step % config.eval_every == 0 or step == config.steps)


def rows_of_step(step: int, n: int, config: TrainConfig) -> list[tuple[int, int]]:
    """[(row number, epoch)] of one step: the n rows in a new order each epoch, epochs joined without a gap."""
    first = step * config.batch_size
    places = [divmod(i, n) for i in range(first, first + config.batch_size)]
    return [(int(epoch_order(n, config.seed, epoch)[place]), epoch) for epoch, place in places]


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


if __name__ == "__main__":
    cli.run("train.py", main)
