"""What a run says before and while it trains: its first lines, metrics.jsonl and the progress
bar."""

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

from data.answers import written
from data.jsonl import Record
from dss import distributed
from dss.config import TrainConfig
from dss.methods import PREDICT
from dss.rows import Rows, sample_rows
from dss.student import Student
from tokenizer.t5 import UNK


def introduce(
    rows: Rows, student: Student, config: TrainConfig, device: torch.device, state_bytes: float
) -> None:
    """Print what is trained where, and the rows to train, select and test it on; warnings go to
    standard error.

    state_bytes: what weights, gradients and optimiser state take on each device.
    """
    where = f"{device}, {student.dtype}"
    if distributed.size() > 1:
        where = f"{distributed.size()} x {device.type}, {student.dtype}"
    size = f"{student.model.num_parameters():,} parameters"
    ids = f"{student.tokenizer.vocab_size:,} token ids"
    megabytes = f"{state_bytes / 1e6:,.1f} MB"
    print(f"student: {config.weights or config.size}, {size}, {ids}; {where}")
    print(f"memory: weights, gradients and optimiser state take {megabytes}")

    with_rationale = sum(row.rationale is not None for row in rows.train)
    training = f"{len(rows.train):,} training rows, {with_rationale:,} with a rationale"
    if rows.unlabelled:
        training += f" ({rows.unlabelled:,} more without a label)"
    others = f"{len(rows.validation):,} validation, {len(rows.test):,} test"
    print(f"{rows.name}: {training}; {others}; metric: {rows.metric}")
    held_out = rows.validation + rows.test
    warn_of_rows(rows, held_out)
    warn_of_texts(rows, held_out, student)


def warn(text: str) -> None:
    print(f"train.py: warning: {text}", file=sys.stderr)


def warn_of_rows(rows: Rows, held_out: list[Record]) -> None:
    total = f"of {len(held_out):,} validation and test"
    inputs = {row.input for row in rows.train}
    shared = sum(row.input in inputs for row in held_out)
    if shared:
        warn(f"{shared:,} {total} inputs are training inputs too")
    labels = {written(row.label) for row in rows.train}
    unseen = sum(written(row.label) not in labels for row in held_out)
    if rows.free_text:
        warn(
            "nearly all labels differ (free text): the student with the lowest validation loss is "
            "kept, and token F1 is reported"
        )
    elif rows.metric == "text" and unseen:
        warn(f"{unseen:,} {total} labels are no training row's label")
    number = len(rows.validation)
    if number < 50:
        width = 196 / math.sqrt(number + 3.84)  # in points: Wilson's interval at 50 %
        warn(
            f"{number} validation rows: the 95 % interval of an accuracy is up to {width:.0f} "
            "points wide; see --eval-data, --eval-fraction"
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


def warn_of_cut_sequences(method: str, cut: Counter) -> None:
    """cut: {"inputs": number, "targets": number} of the sequences that a method trains on."""
    if cut.total():
        numbers = f"{cut['inputs']:,} inputs and {cut['targets']:,} targets"
        warn(f"{method}: {numbers} are cut; see --max-input-length, --max-target-length")


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
