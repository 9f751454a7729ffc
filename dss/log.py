"""What a run says: its first lines, metrics.jsonl and the progress bar, and the report at the
end."""

import contextlib
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.answers import merge_labels, token_f1, written
from data.jsonl import Record, read_lines
from dss import distributed
from dss.config import TrainConfig
from dss.methods import BASELINE, METHODS, PREDICT
from dss.rows import Rows, sample_rows
from dss.stats import (
    COVERAGES,
    accuracy_at,
    bag_of_words,
    calibration_error,
    commonest_label,
    macro_f1,
    paired_interval,
)
from dss.student import Answer, Student
from tokenizer.t5 import UNK

MOST_BAG_ROWS = 50_000  # with more training rows a bag of words would take minutes
LONGEST_SAMPLE = 100  # characters of a text in the report


def introduce(
    rows: Rows, student: Student, config: TrainConfig, device: torch.device, state_bytes: float
) -> None:
    """Print what is trained where, and the rows to train, select and test it on; warnings go to
    standard error.

    state_bytes: what weights, gradients and optimiser state take on each device.
    """
    where = str(device)
    if distributed.size() > 1:
        where = f"{distributed.size()} x {device.type}"
    where += f", {student.dtype}"
    if device.type == "cuda" and student.dtype == "float32":
        where += " (--dtype bfloat16 is faster)"
    size = f"{student.model.num_parameters():,} parameters"
    ids = f"{student.tokenizer.vocab_size:,} token ids"
    print(f"student: {config.weights or config.size}, {size}, {ids}; {where}")
    print(f"memory: weights, gradients and optimiser state take {format_bytes(state_bytes)}")

    with_rationale = sum(row.rationale is not None for row in rows.train)
    training = f"{len(rows.train):,} training rows, {with_rationale:,} with a rationale"
    if rows.unlabelled:
        training += f" ({rows.unlabelled:,} more without a label)"
    others = f"{len(rows.validation):,} validation, {len(rows.test):,} test"
    print(f"{rows.name}: {training}; {others}; metric: {rows.metric}")
    warn_of_shared_inputs(rows)
    if rows.free_text:
        warn(
            "nearly all labels differ (free text): the student with the lowest validation loss is "
            "kept, and token F1 is reported"
        )
    elif rows.metric == "text":
        warn_of_labels(rows, rows.validation + rows.test)
    warn_of_texts(rows, rows.validation + rows.test, student)
    number = len(rows.validation)
    if number < 50:
        width = 196 / math.sqrt(number + 3.84)  # in points: Wilson's interval at 50 %
        warn(
            f"{number} validation rows: the 95 % interval of an accuracy is up to {width:.0f} "
            "points wide; see --eval-data, --eval-fraction"
        )
    if config.warmup >= config.steps:
        warn(
            f"--warmup {config.warmup:,} is not over within --steps {config.steps:,}: "
            "the learning rate only rises"
        )


def format_bytes(number: float) -> str:
    if number < 1e9:
        return f"{number / 1e6:.1f} MB"
    return f"{number / 1e9:.1f} GB"


def warn(text: str) -> None:
    print(f"train.py: warning: {text}", file=sys.stderr)


def warn_of_shared_inputs(rows: Rows) -> None:
    known = {row.input for row in rows.train}
    shared = []
    for name, part in (("validation", rows.validation), ("test", rows.test)):
        number = sum(row.input in known for row in part)
        if number:
            shared.append(f"{number:,} of {len(part):,} {name} inputs")
    if shared:
        print(f"{rows.name}: {' and '.join(shared)} are training inputs too", file=sys.stderr)


def warn_of_labels(rows: Rows, held_out: list[Record]) -> None:
    """Warn of labels that differ in case, `_`, `-` and spaces alone, and of those that no training
    row has."""
    known = {written(row.label) for row in rows.train}
    others = [written(row.label) for row in held_out]
    spelling = merge_labels(sorted(known | set(others)), "class")
    alike = [f"{label!r} and {other!r}" for label, other in spelling.items() if label != other]
    if alike:
        warn(f"labels that are nearly alike count as different: {'; '.join(alike[:3])}")
    unseen = sum(label not in known for label in others)
    if unseen:
        warn(
            f"{unseen:,} of {len(others):,} validation and test labels are no training row's label"
        )


def warn_of_texts(rows: Rows, held_out: list[Record], student: Student) -> None:
    """Count the labels that are too long to be written, the held-out inputs that are cut, and the
    unknown tokens (of many rows, in a sample)."""
    encode = student.tokenizer.encode
    everything = rows.train + held_out
    longest = student.max_new_tokens + 1  # with </s>
    long = sum(len(encode(row.label)) > longest for row in everything)
    if long and student.answers == "write":
        limit = f"an answer may be (--max-new-tokens {student.max_new_tokens:,})"
        warn(f"{long:,} of {len(everything):,} labels are longer than {limit}")
    longest = student.max_input_length
    cut = sum(len(encode(PREDICT + row.input)) > longest for row in held_out)
    if cut:
        warn(
            f"{cut:,} validation and test inputs cut at {longest:,} tokens; see --max-input-length"
        )
    shares = {}
    for name in ("input", "label", "rationale"):
        ids = [encode(getattr(row, name) or "") for row in sample_rows(everything)]
        shares[name] = np.mean(np.concatenate(ids) == UNK)
    if any(shares.values()):
        parts = [f"{share:.2%} of the {name}s" for name, share in shares.items()]
        warn(f"tokens that are unknown to the tokenizer (<unk>): {', '.join(parts)}")


def warn_of_cut_sequences(method: str, cut: Counter, config: TrainConfig) -> None:
    """cut: {"inputs": number, "targets": number} of the sequences that a method trains on."""
    parts = []
    if cut["inputs"]:
        parts.append(f"{cut['inputs']:,} inputs cut at {config.max_input_length:,} tokens")
    if cut["targets"]:
        parts.append(f"{cut['targets']:,} targets cut at {config.max_target_length:,} tokens")
    if parts:
        flags = "--max-input-length, --max-target-length"
        print(f"{method}: {', '.join(parts)}; see {flags}", file=sys.stderr)


@dataclass
class Progress:
    """How far a student has come. The saved state holds it, so that a resumed run ends as an
    undisturbed one would."""

    step: int = 0  # optimiser steps done
    evaluated: int = 0  # the step of the last evaluation on the validation rows
    best_step: int = 0
    best_accuracy: float = -1.0
    best_score: float = -math.inf  # the accuracy, or of free text the loss times -1
    seconds: float = 0.0  # of training and evaluation
    tokens: int = 0  # trained on, inputs and targets
    logged: int = 0  # bytes of metrics.jsonl
    # What the log has summed since its last line:
    window_losses: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    window_steps: int = 0
    window_tokens: int = 0
    window_seconds: float = 0.0


class Log(contextlib.AbstractContextManager):
    """metrics.jsonl: a line every `log_every` steps, with means over them, and one for each
    evaluation; and the progress bar.

    What has been summed since the last line is in `Progress`, which the saved state holds, so that
    the line after an interruption has the means of an undisturbed run.
    """

    def __init__(self, path: Path, method: str, progress: Progress, steps: int) -> None:
        """Go on after `progress`: what was written later, before an interruption, is cut off."""
        self.path = path
        self.progress = progress
        self.clock = time.monotonic()
        if distributed.is_first():
            with open(path, "ab") as file:
                file.truncate(min(progress.logged, file.tell()))
        seconds_between_lines = 0.5 if sys.stderr.isatty() else 30
        self.bar = tqdm(
            total=steps,
            initial=progress.step,
            desc=method,
            unit="step",
            mininterval=seconds_between_lines,
        )

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add_step(self, losses: torch.Tensor, tokens: int) -> None:
        """losses: the (3,) tensor of one step, left on its device until a line is written."""
        p = self.progress
        p.window_losses = p.window_losses.to(losses.device, non_blocking=True) + losses
        p.window_steps += 1
        p.window_tokens += tokens
        p.window_seconds += self.lap()
        self.bar.update()

    def lap(self) -> float:
        """The seconds since the last call, which also count as time of the run."""
        before = self.clock
        self.clock = time.monotonic()
        self.progress.seconds += self.clock - before
        return self.clock - before

    def write_means(self, rate: float, norm: torch.Tensor) -> None:
        """Write the means of the steps since the last time. Raises FloatingPointError if the loss
        is not finite."""
        p = self.progress
        loss, label_loss, rationale_loss = (p.window_losses / p.window_steps).tolist()  # waits
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        p.window_seconds += self.lap()
        speed = round(p.window_tokens / max(p.window_seconds, 1e-9))
        self.write(
            loss=loss,
            label_loss=label_loss,
            rationale_loss=rationale_loss,
            learning_rate=rate,
            gradient_norm=norm.item(),
            tokens_per_second=speed,
        )
        p.window_losses = torch.zeros(3, dtype=torch.float64)
        p.window_steps = 0
        p.window_tokens = 0
        p.window_seconds = 0.0
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,} tokens/s", refresh=False)

    def write_accuracy(self, accuracy: float, score: float) -> None:
        """Write what an evaluation, which has just ended, found. score: what students are selected
        by."""
        self.lap()
        self.write(validation_accuracy=accuracy, validation_score=score)
        step = self.progress.step
        line = f"{self.bar.desc}: step {step:,}, validation accuracy {accuracy:.1%}"
        self.bar.write(line, file=sys.stderr)

    def write(self, **figures: float) -> None:
        if distributed.is_first():
            with open(self.path, "ab") as file:
                line = json.dumps({"step": self.progress.step} | figures) + "\n"
                file.write(line.encode())
                self.progress.logged = file.tell()


# ---- Figures of a test ---------------------------------------------------------------------------


def measure_baselines(rows: Rows) -> dict[str, float | None]:
    """The accuracies of simple predictors on the rows that students are compared on."""
    labels = [row.label for row in rows.train]
    _, commonest = commonest_label(labels, rows.asked, rows.metric)
    bag = None
    if rows.labels and len(rows.train) <= MOST_BAG_ROWS:
        bag = bag_of_words(rows.train, rows.validation, rows.asked, rows.labels)
    return {"commonest_label": commonest, "bag_of_words": bag}


def reliability(student: Student, rows: Rows, right: list[bool], answers: list[Answer]) -> dict:
    """Token F1 of free text; macro-F1, expected calibration error and accuracies at coverages,
    where labels are a closed set. A student's confidence is the probability of its answer among the
    labels."""
    gold = [written(row.label) for row in rows.asked]
    said = [written(answer.label) for answer in answers]
    if rows.free_text:
        return {"token_f1": np.mean([token_f1(a, b) for a, b in zip(said, gold)]).item()}
    if not rows.labels:
        return {}
    figures = {"macro_f1": macro_f1(said, gold)}
    if METHODS[student.method].label_position == "last":  # its label cannot be scored
        return figures
    pairs = list(zip(rows.asked, said))
    labels = [written(label) for label in rows.labels]

    def confidences(some: list[tuple[Record, str]]) -> list[float]:
        scores = student.score([row.input for row, _ in some], [labels] * len(some))
        return [scores[i].get(label, 0.0) for i, (_, label) in enumerate(some)]

    confidence = np.array(distributed.share_out(confidences, pairs))
    correct = np.array(right, dtype=float)
    figures["calibration_error"] = calibration_error(confidence, correct)
    for coverage in COVERAGES:
        figures[f"accuracy_at_{coverage}"] = accuracy_at(coverage, confidence, correct)
    return figures


# ---- The report at the end -----------------------------------------------------------------------


def report(out: Path, rows: Rows, config: TrainConfig, results: list[dict]) -> None:
    """Print a table of the methods, the difference that rationales made, three answers, and where
    the files are."""
    print_table(results)
    label, accuracy = commonest_label([row.label for row in rows.train], rows.asked, rows.metric)
    print(
        f"always answering {shorten_text(label)!r}, the commonest label in training: {accuracy:.1%}"
    )
    if results[0]["bag_of_words"] is not None:
        print(f"a bag of words (dss/stats.py): {results[0]['bag_of_words']:.1%}")
    print_differences(out, rows, results)
    for result in results:
        if "token_f1" in result:
            print(f"{result['method']}: token F1 {result['token_f1']:.1%}")
        if result["doubt"]:
            print(f"{result['method']}: {result['doubt']}")
    print_reliability(results)
    print_samples(rows, config, results)
    print(
        f"\n{out}/METHOD/ holds result.json, predictions.jsonl, metrics.jsonl and student/, "
        "for transformers too."
    )
    trained = [name for name in METHODS if (out / name / "result.json").exists()]
    left = [name for name in METHODS if name not in trained]
    if left:
        print(
            f"Next: the same command with --resume --method {' '.join(trained)} NAME adds a student"
        )
        print(f"      (NAME is one of {', '.join(left)})")


def print_table(results: list[dict]) -> None:
    print(
        f"\n{'method':<18}{'rows':>7}{'steps':>8}{'best at':>9}{'validation':>12}{'test':>8}"
        f"{'tokens':>9}{'time':>9}"
    )
    for r in results:
        test = "-"
        if r["test_accuracy"] is not None:
            test = f"{r['test_accuracy']:.1%}"
        minutes, seconds = divmod(r["seconds"], 60)
        print(
            f"{r['method']:<18}{r['rows']:>7,}{r['steps']:>8,}{r['best_step']:>9,}"
            f"{r['validation_accuracy']:>12.1%}{test:>8}{tqdm.format_sizeof(r['tokens']):>9}"
            f"{minutes:>6.0f}m{seconds:02.0f}s"
        )


def print_reliability(results: list[dict]) -> None:
    """How far each student's probabilities can be trusted, where labels are a closed set."""
    columns = {"macro_f1": "macro-F1", "calibration_error": "ECE"}
    for coverage in COVERAGES:
        columns[f"accuracy_at_{coverage}"] = f"at {coverage:.0%} coverage"
    shown = [result for result in results if "macro_f1" in result]
    if not shown:
        return
    heads = "".join(f"{head:>18}" for head in columns.values())
    print(f"\n{'method':<18}{heads}")
    for result in shown:
        cells = ["-" if name not in result else f"{result[name]:.1%}" for name in columns]
        print(f"{result['method']:<18}" + "".join(f"{cell:>18}" for cell in cells))


def print_differences(out: Path, rows: Rows, results: list[dict]) -> None:
    """Compare every method with the baseline, question by question, if that was trained too."""
    right = {r["method"]: read_correct(out / r["method"]) for r in results}
    baseline = right.pop(BASELINE, None)
    if baseline is None:
        return
    for method in right:
        mean, low, high = paired_interval([right[method] - baseline])
        print(
            f"{method} - {BASELINE}: {100 * mean:+.1f} points of label accuracy "
            f"[{100 * low:+.1f}, {100 * high:+.1f}] on {len(rows.asked):,} {rows.asked_name} rows, "
            "95 % interval over questions"
        )


def read_correct(directory: Path) -> np.ndarray:
    """(n,) of 0 or 1: whether each prediction in OUT/METHOD/predictions.jsonl is right."""
    path = directory / "predictions.jsonl"
    with open(path, "rb") as file:
        right = [json.loads(line)["correct"] for _, _, line in read_lines(file, str(path))]
    return np.array(right, dtype=int)


def reason_to_doubt(result: dict, metrics: Path) -> str:
    """Why a run's accuracy may say little about its method; an empty text if nothing speaks against
    it. result: a result.json; metrics: the metrics.jsonl beside it."""
    losses = []
    for line in metrics.read_text("utf-8").splitlines():
        figures = json.loads(line)
        if "label_loss" in figures:
            losses.append(figures["label_loss"])
    tenth = max(1, len(losses) // 10)
    last = sum(losses[-tenth:]) / tenth
    before = sum(losses[-2 * tenth : -tenth]) / tenth
    at_most_commonest = result["validation_accuracy"] <= result["commonest_label"] + 0.01
    if at_most_commonest and "token_f1" not in result:
        return (
            "no better than the commonest label; try more --steps, another student or "
            "pretrained --weights"
        )
    accuracy = result["test_accuracy"]
    if accuracy is None:
        accuracy = result["validation_accuracy"]
    if result["bag_of_words"] is not None and accuracy < result["bag_of_words"]:
        return "less accurate than a bag of words: nothing follows from comparing it"
    fell_fast = before - last > max(0.1 * before, 0.02)  # nats a token
    if fell_fast and result["best_step"] == result["steps"]:
        return (
            "trained too briefly to be judged: its loss was falling fast, its last evaluation "
            "was its best"
        )
    return ""


def print_samples(rows: Rows, config: TrainConfig, results: list[dict]) -> None:
    """Print three questions as one of the students answers them: the first that explains, if any
    does."""
    shown = results[-1]
    for result in reversed(results):
        if METHODS[result["method"]].learns_rationales:
            shown = result
    from_teacher = config.labels == "teacher" and not rows.test and not config.eval_data
    gold = "teacher's" if from_teacher else "gold"
    samples = shown["samples"]
    method = shown["method"]
    print(
        f"\nThe first {len(samples)} {rows.asked_name} rows, as the {method} student answers them:"
    )
    for sample in samples:
        answer = shorten_text(sample["prediction"]) or "(nothing)"
        print(f"\n  question   {shorten_text(sample['input'])}")
        print(f"  predicted  {answer}   ({gold}: {shorten_text(sample['label'])})")
        if sample["rationale"]:
            print(f"  because    {shorten_text(sample['rationale'])}")


def shorten_text(text: str) -> str:
    """On one line, and cut where it is long."""
    line = " ".join(text.split())
    if len(line) > LONGEST_SAMPLE:
        return line[: LONGEST_SAMPLE - 4] + " ..."
    return line
