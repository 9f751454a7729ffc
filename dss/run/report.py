"""What a run says: its first lines, metrics.jsonl on the way, and the report at the end."""

import contextlib
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.files import parse_json
from data.jsonl import read_lines
from dss.config import METHODS, TrainConfig
from dss.rows import Rows, count_shared
from dss.run import parallel
from dss.run.state import Progress
from dss.stats import commonest_label, paired_interval
from dss.student import Student


def introduce(rows: Rows, student: Student, config: TrainConfig, device: torch.device) -> None:
    """Print what is trained where, and what there is to train, select and test it on. On stderr: which inputs are in
    two places, and likely mistakes."""
    where = f"{parallel.size()} x {device.type}" if parallel.size() > 1 else str(device)
    where += f", {student.dtype}"
    where += " (--dtype bfloat16 is faster)" if device.type == "cuda" and student.dtype == "float32" else ""
    size = f"{student.model.num_parameters():,} parameters, {student.tokenizer.vocab_size:,} token ids"
    print(f"student: {config.weights or config.size}, {size}; {where}")
    with_rationale = sum(r.rationale is not None for r in rows.train)
    say = f"{len(rows.train):,} training row{'s' * (len(rows.train) != 1)}, {with_rationale:,} with a rationale"
    say += f" ({rows.unlabelled:,} more without a label)" if rows.unlabelled else ""
    print(f"{rows.name}: {say}; {len(rows.validation):,} validation, {len(rows.test):,} test; metric: {rows.metric}")
    places = zip(("validation", "test"), count_shared(rows), (rows.validation, rows.test))
    shared = [f"{n:,} of {len(part):,} {name} inputs" for name, n, part in places if n]
    if shared:
        print(f"{rows.name}: {' and '.join(shared)} are training inputs too", file=sys.stderr)
    if config.warmup >= config.steps:
        line = f"--warmup {config.warmup:,} is not over within --steps {config.steps:,}: the learning rate only rises"
        print(f"train.py: warning: {line}", file=sys.stderr)
    spellings = {}
    for label in {r.label for part in (rows.train, rows.validation, rows.test) for r in part if rows.metric == "text"}:
        spellings.setdefault(label.casefold(), []).append(label)
    for different in [sorted(labels) for labels in spellings.values() if len(labels) > 1][:3]:
        line = f"the labels {' and '.join(map(repr, different))} differ in case alone and count as different"
        print(f"train.py: warning: {line}", file=sys.stderr)


def say_what_was_cut(method: str, cut: Counter, config: TrainConfig) -> None:
    """cut: {"inputs": number, "targets": number} of the sequences that a method trains on."""
    longest = dict(inputs=config.max_input_length, targets=config.max_target_length)
    parts = [f"{cut[kind]:,} {kind} cut at {longest[kind]:,} tokens" for kind in longest if cut[kind]]
    if parts:
        print(f"{method}: {', '.join(parts)}; see --max-input-length, --max-target-length", file=sys.stderr)


class Log(contextlib.AbstractContextManager):
    """metrics.jsonl: a line for every `log_every` steps, with means over them, and one for each evaluation; and the
    progress bar.

    What has been summed since the last line is `progress.window`, which state.pt holds, so that the line after an
    interruption has the means of an undisturbed run.
    """

    def __init__(self, path: Path, method: str, progress: Progress, steps: int) -> None:
        """Go on after `progress`: what was written later, before an interruption, is cut off."""
        self.path, self.progress, self.clock = path, progress, time.monotonic()
        if parallel.is_first():
            with open(path, "ab") as file:
                file.truncate(min(progress.logged, file.tell()))
        patience = 0.5 if sys.stderr.isatty() else 30  # seconds between lines in a log file
        self.bar = tqdm(total=steps, initial=progress.step, desc=method, unit="step", mininterval=patience)

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, losses: torch.Tensor, tokens: int) -> None:
        """losses: (3,) tensor of one step, left on its device until they are asked for."""
        window = self.progress.window
        window["losses"] = window["losses"].to(losses.device, non_blocking=True) + losses
        window["steps"] += 1
        window["tokens"] += tokens
        self.tick(training=True)
        self.bar.update()

    def tick(self, training: bool) -> None:
        """The time since the last tick counts for the run, and for the speed if it was spent on training."""
        before, self.clock = self.clock, time.monotonic()
        self.progress.seconds += self.clock - before
        self.progress.window["seconds"] += self.clock - before if training else 0.0

    def write_means(self, rate: float, norm: torch.Tensor) -> None:
        """Write the means of the steps since the last time. Raises FloatingPointError if the loss is not finite."""
        window = self.progress.window
        loss, label, rationale = (window["losses"] / window["steps"]).tolist()  # waits for the device
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        self.tick(training=True)
        speed = round(window["tokens"] / max(window["seconds"], 1e-9))
        losses = dict(loss=loss, label_loss=label, rationale_loss=rationale)
        self.write(**losses, learning_rate=rate, gradient_norm=norm.item(), tokens_per_second=speed)
        self.progress.window = Progress().window  # a new one
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,} tokens/s", refresh=False)

    def write_accuracy(self, accuracy: float) -> None:
        """Write what an evaluation, which has just ended, found."""
        self.tick(training=False)
        self.write(validation_accuracy=accuracy)
        line = f"{self.bar.desc}: step {self.progress.step:,}, validation accuracy {accuracy:.1%}"
        self.bar.write(line, file=sys.stderr)

    def write(self, **figures: float) -> None:
        if parallel.is_first():
            with open(self.path, "ab") as file:
                file.write((json.dumps({"step": self.progress.step} | figures) + "\n").encode())
                self.progress.logged = file.tell()


def report(out: Path, rows: Rows, config: TrainConfig, results: list[dict]) -> None:
    """Print what came of the methods: a table, the difference that rationales made, three answers, where files are."""
    which, asked = ("test", rows.test) if rows.test else ("validation", rows.validation)
    print(f"\n{'method':<18}{'rows':>7}{'steps':>8}{'best at':>9}{'validation':>12}{'test':>8}{'tokens':>9}{'time':>9}")
    for r in results:
        test = "-" if r["test_accuracy"] is None else f"{r['test_accuracy']:.1%}"
        print(
            f"{r['method']:<18}{r['rows']:>7,}{r['steps']:>8,}{r['best_step']:>9,}{r['validation_accuracy']:>12.1%}"
            f"{test:>8}{tqdm.format_sizeof(r['tokens']):>9}{r['seconds'] // 60:>6.0f}m{r['seconds'] % 60:02.0f}s"
        )
    label, accuracy = commonest_label([row.label for row in rows.train], asked, rows.metric)
    print(f"always answering {label!r}, the commonest label in training: {accuracy:.1%}")
    by_method = {r["method"]: correct(out / r["method"]) for r in results}
    for method in [m for m in by_method if m != "standard" and "standard" in by_method]:
        gain, low, high = (100 * x for x in paired_interval([by_method[method] - by_method["standard"]]))
        print(
            f"{method} - standard: {gain:+.1f} points of label accuracy [{low:+.1f}, {high:+.1f}] "
            f"on {len(asked):,} {which} rows, 95 % interval over questions"
        )
    for r in results:
        if why := too_short(r, out / r["method"] / "metrics.jsonl", accuracy):
            print(f"{r['method']}: {why}")
    shown = next((r for r in results if r["method"] == "dss"), results[-1])
    gold = "teacher's" if config.labels == "teacher" and which == "validation" and not config.eval_data else "gold"
    print(f"\nThe first {len(shown['samples'])} {which} rows, as the {shown['method']} student answers them:")
    for sample in shown["samples"]:
        texts = (" ".join((sample[key] or "").split()) for key in ("input", "prediction", "rationale"))
        question, answer, why = (text if len(text) <= 400 else f"{text[:396]} ..." for text in texts)
        print(f"\n  question   {question}\n  predicted  {answer or '(nothing)'}   ({gold}: {sample['label']})")
        if why:
            print(f"  because    {why}")
    print(f"\n{out}/METHOD/ holds result.json, predictions.jsonl, metrics.jsonl and student/, for transformers too.")
    trained, left = ([m for m in METHODS if (out / m / "result.json").exists() == done] for done in (True, False))
    if left:
        print(f"Next: the same command with --resume --method {' '.join(trained)} NAME adds a student")
        print(f"      (NAME is one of {', '.join(left)})")


def too_short(result: dict, metrics: Path, commonest: float) -> str:
    """Why a run's accuracy may say little about its method: a text, empty if nothing speaks against it."""
    lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    losses = [line["label_loss"] for line in lines if "label_loss" in line]
    tenth = max(1, len(losses) // 10)
    before, last = (sum(part) / tenth for part in (losses[-2 * tenth : -tenth], losses[-tenth:]))
    if result["validation_accuracy"] <= commonest + 0.01:
        return "no better than the commonest label; try more --steps, another student or pretrained --weights"
    if before - last > max(0.1 * before, 0.02) and result["best_step"] == result["steps"]:  # nats a token
        return "trained too briefly to be judged: its loss was falling fast, its last evaluation was its best"
    return ""


def correct(directory: Path) -> np.ndarray:
    """0 or 1 for each question of OUT/METHOD/predictions.jsonl."""
    with open(path := directory / "predictions.jsonl", "rb") as file:
        lines = [parse_json(line, where)["correct"] for where, _, line in read_lines(file, str(path))]
    return np.array(lines, dtype=int)
