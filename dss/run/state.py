"""What is kept of an unfinished run: the best student so far, and a state from which it goes on as if it had not been
interrupted. And the one line that says why a run ended early.

state.pt is what torch.save writes, followed by the sha256 of that. state.before.pt is the state before it, for the
case that state.pt is damaged.
"""

import contextlib
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.cli import Interrupted, one_line
from data.files import digest, read_json, reason, replacing, write_json
from dss.config import TrainConfig
from dss.run import parallel
from dss.student import Student
from dss.weights import load_t5

BEFORE = "state.before.pt"
DIGEST = 32  # bytes


@dataclass
class Progress:
    """How far a student has come. state.pt holds it, so that a resumed run ends as an undisturbed one would."""

    step: int = 0  # optimiser steps done
    evaluated: int = 0  # the step of the last look at the validation rows
    best_step: int = 0
    best_accuracy: float = -1.0
    seconds: float = 0.0  # of training and evaluation
    tokens: int = 0  # trained on, inputs and targets
    logged: int = 0  # bytes of metrics.jsonl
    window: dict = field(  # what the log has summed since its last line
        default_factory=lambda: dict(losses=torch.zeros(3, dtype=torch.float64), steps=0, tokens=0, seconds=0.0)
    )


class Ended(Exception):
    """Training ended early. The message says why and what is kept; `status` is the program's exit status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Keeper(contextlib.AbstractContextManager):
    """In a `with` block of training: keeps the best student so far, and from time to time the state to go on from.

    The block ends early with Ended, which says what is kept, or with the original exception, where that is a bug.
    """

    def __init__(self, out: Path, student: Student, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        """Put back the state that was saved, if any, on any number of processes. Raises ValueError if it does not fit.

        It is OUT/METHOD/state.pt, or with --shard the directory state/, to which each process writes its part.
        """
        self.out, self.student, self.optimizer, self.config = out, student, optimizer, config
        self.path, self.save, load = out / "state.pt", save_state, load_state
        if config.shard:
            from dss.run import shards  # a second of imports, only where it is needed

            self.path, self.save, load = out / "state", shards.save_state, shards.load_state
        progress = load(self.path, student.model, optimizer)
        if progress and (out / "best.json").exists():  # newer than the state, or as old
            progress |= read_json(out / "best.json")
        if progress and progress.keys() != vars(Progress()).keys():
            raise ValueError(f"{self.path}: the state of a run by another version of this program; try --overwrite")
        self.progress = Progress(**progress)
        self.saved, self.clock = self.progress.step, time.monotonic()

    def keep_best(self, accuracy: float) -> None:
        """Keep the student as the best so far, with this accuracy on the validation rows."""
        self.save_student()
        best = dict(best_step=self.progress.step, best_accuracy=accuracy)
        vars(self.progress).update(best)
        if parallel.is_first():
            write_json(self.out / "best.json", best)

    def load_best(self) -> None:
        """Give the student the weights that it had at its best."""
        best = load_t5(self.out / "student")
        if self.config.shard:
            self.student.load_weights(best)
        else:
            self.student.model.load_state_dict(best.state_dict())

    def keep_state(self, at_once: bool = False) -> None:
        """Save the state if it is time to, after --save-minutes or an evaluation, or `at_once`."""
        minutes = self.config.save_minutes
        due = time.monotonic() - self.clock > 60 * minutes if minutes else self.progress.evaluated == self.progress.step
        if parallel.anyone(due or at_once) and self.saved != self.progress.step:
            if self.config.shard or parallel.is_first():
                self.save(self.path, self.student.model, self.optimizer, vars(self.progress))
            parallel.wait_for_all()
            self.saved, self.clock = self.progress.step, time.monotonic()

    def save_student(self) -> None:
        if self.config.shard or parallel.is_first():  # all have a part of a sharded student; the first one writes it
            self.student.save(self.out / "student")
        parallel.wait_for_all()

    def require_finite(self) -> None:
        """Raise FloatingPointError unless all weights are finite numbers. Waits for the device, once."""
        parts = [p.to_local() if hasattr(p, "to_local") else p for p in self.student.model.parameters()]
        if parallel.anyone(not torch.stack([part.isfinite().all() for part in parts]).all()):
            raise FloatingPointError("a weight is no longer a finite number")

    def __exit__(self, _: type | None, error: BaseException | None, __: object) -> None:
        step, kept = self.progress.step, f"{self.out}/student is the best so far"
        if not self.progress.best_step:
            kept = f"{self.out} has no student, because none was evaluated"
        if isinstance(error, Interrupted):
            try:
                self.require_finite()
                self.keep_state(at_once=True)
                if not self.progress.best_step:
                    self.save_student()
                    kept = f"{self.out}/student is the current one, none was evaluated yet"
                line = f"{self.out.name} interrupted at step {step:,}; {kept}, --resume goes on"
                raise Ended(130, line) from None
            except (FloatingPointError, OSError) as second:
                error = second
        line = one_line(error)
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in line:
            line = "out of memory; --micro-batch N computes the same steps N rows at a time"
        elif isinstance(error, FloatingPointError):
            line += f" by step {step:,}; try a smaller --lr, with --overwrite"
        elif lost := parallel.lost(error):
            line, kept = lost, f"{kept}, --resume goes on from step {self.saved:,}"
        elif not isinstance(error, OSError):
            return  # there is no error, or a mistake of the program's, which keeps its traceback
        raise Ended(1, f"{line}; {kept}") from None


def forget_state(out: Path) -> None:
    """Delete from OUT/METHOD what only an unfinished run needs."""
    for path in [*out.glob("state*"), out / "best.json"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# ---- state.pt -------------------------------------------------------------------------------------------------------


def save_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: dict) -> None:
    """Write weights, optimizer and `progress`, a dict of tensors, numbers and the like, complete or not at all. A
    step seeds its own dropout, so no generator is kept. Raises OSError if it cannot be written."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": progress}
    try:
        with replacing(path) as file:
            torch.save(state, file)
            file.flush()
            file.write(digest(file.name))
            path.with_name(BEFORE).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # there is none, or a file system without hard links
                os.link(path, path.with_name(BEFORE))
    except RuntimeError as problem:  # what torch makes of a full disk
        raise OSError(f"{path}: cannot be written ({reason(problem)})") from None


def load_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Put back what `save_state` wrote last, or, with a line on stderr, what it wrote before if that is damaged.
    Returns its `progress`, {} if there is neither. Raises ValueError, naming the file, if neither is sound or the sound
    one not of this model and optimizer."""
    files = path, path.with_name(BEFORE)
    if not any(file.exists() for file in files):
        return {}
    sound = next(filter(is_sound, files), None)
    if sound is None:
        raise ValueError(f"{path}: not the state of this run, or damaged, and {BEFORE} is no better; try --overwrite")
    if sound != path:
        print(f"{path}: damaged; going on with {BEFORE}, the state before it", file=sys.stderr)
    try:
        state = torch.load(sound, map_location="cpu", weights_only=True)
        moments = state["optimizer"]["state"]
        kept = {i: shapes(of) for i, of in moments.items()}
        if shapes(state["model"]) != shapes(model.state_dict()) or (kept and kept != expected(optimizer)):
            raise ValueError("its tensors have other shapes")  # given to the fused AdamW, they would crash Python
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        return state["progress"]
    except Exception as problem:  # torch.load documents no closed set of errors for a damaged file
        raise ValueError(f"{sound}: not the state of this run ({reason(problem)})") from None


def is_sound(path):
    """Whether a file ends in the digest of all before it."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        size = file.seek(max(0, path.stat().st_size - DIGEST))
        return file.read() == digest(path, size)


def shapes(tensors):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def expected(optimizer):
    """{number of a parameter: the `shapes` of what AdamW or Adafactor keeps of it}."""
    result = {}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        kept = dict(step=(), exp_avg=p.shape, exp_avg_sq=p.shape)
        if isinstance(optimizer, torch.optim.Adafactor):
            factors = dict(row_var=(*p.shape[:-1], 1), col_var=(*p.shape[:-2], 1, p.shape[-1]))
            kept = dict(step=()) | (factors if p.dim() > 1 else dict(variance=p.shape))
        result[i] = {name: (tuple(shape), torch.float32) for name, shape in kept.items()}
    return result
