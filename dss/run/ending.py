"""What is kept of training while it goes on and where it ends early, and the one line that says why it did."""

import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from data.arguments import Interrupted, one_line
from data.files import write_json
from dss.config import TrainConfig
from dss.model import T5
from dss.run import parallel
from dss.run.state import Progress
from dss.student import Student


class Ended(Exception):
    """Training ended early. The message says why and what is kept; `status` is the program's exit status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Keeper(AbstractContextManager):
    """In a `with` block of training: keeps the best student so far, and from time to time the state to go on from.

    The block ends early with Ended, which says what is kept, or with what a mistake of the program's raises.
    """

    def __init__(
        self, out: Path, student: Student, optimizer: torch.optim.Optimizer, progress: Progress, config: TrainConfig
    ) -> None:
        self.out, self.student, self.optimizer, self.progress, self.config = out, student, optimizer, progress, config
        self.saved, self.clock = progress.step, time.monotonic()

    def keep_best(self, accuracy: float) -> None:
        """Keep the student as the best so far, with this accuracy on the validation rows."""
        parallel.save_student(self.student, self.out / "student", self.config)
        best = dict(best_step=self.progress.step, best_accuracy=accuracy)
        vars(self.progress).update(best)
        if parallel.is_first():
            write_json(self.out / "best.json", best)

    def keep_state(self, at_once: bool = False) -> None:
        """Save the state if it is time to, after --save-minutes or an evaluation, or `at_once`."""
        minutes = self.config.save_minutes
        due = time.monotonic() - self.clock > 60 * minutes if minutes else self.progress.evaluated == self.progress.step
        if parallel.anyone(due or at_once) and self.saved != self.progress.step:
            path, files = parallel.state_of(self.out, self.config)
            if self.config.shard or parallel.is_first():
                files.save_state(path, self.student.model, self.optimizer, vars(self.progress))
            parallel.wait_for_all()
            self.saved, self.clock = self.progress.step, time.monotonic()

    def __exit__(self, _: type | None, error: BaseException | None, __: object) -> None:
        if isinstance(error, Interrupted):
            try:
                require_finite(self.student.model, self.progress.step)
                self.keep_state(at_once=True)
                if not self.progress.best_step:
                    parallel.save_student(self.student, self.out / "student", self.config)
            except (FloatingPointError, OSError) as second:
                raise Ended(1, f"{one_line(second)}; {self.kept()}") from None
            best = "the best so far" if self.progress.best_step else "the current one, none was evaluated yet"
            line = f"interrupted at step {self.progress.step:,} of {self.out.name}; {self.out}/student is {best}"
            raise Ended(130, f"{line}, --resume goes on") from None
        if not isinstance(error, Exception):
            return
        line, kept = one_line(error), self.kept()
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in line:
            line = "out of memory; --micro-batch N computes the same steps N rows at a time"
        elif lost := parallel.lost(error):
            line, kept = lost, f"{kept}, --resume goes on from step {self.saved:,}"
        elif not isinstance(error, (FloatingPointError, OSError)):
            return  # only a mistake of the program's raises anything else, and keeps its traceback
        raise Ended(1, f"{line}; {kept}") from None

    def kept(self) -> str:
        """What there is of the best student, in words."""
        if not self.progress.best_step:
            return f"{self.out} has no student, because none was evaluated"
        return f"{self.out}/student is the best so far"


def diverged(what: str, step: int) -> FloatingPointError:
    return FloatingPointError(f"{what} by step {step:,}; try a smaller --lr, with --overwrite")


def require_finite(model: T5, step: int) -> None:
    """Raise FloatingPointError unless all weights are finite numbers. Waits for the device, once."""
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    if parallel.anyone(not torch.stack([part.isfinite().all() for part in parts]).all()):
        raise diverged("a weight is no longer a finite number", step)
