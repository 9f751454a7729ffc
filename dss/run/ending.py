"""How training ends early: what is kept of it, and the one line that says why."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from data.arguments import one_line
from data.interrupt import Interrupted
from dss.model import T5
from dss.run.state import Progress, save_state
from dss.student import Student


class Ended(Exception):
    """Training ended early. The message says why and what is kept; `status` is the program's exit status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def keeping(out: Path, student: Student, optimizer: torch.optim.Optimizer, now: Progress) -> Iterator[None]:
    """Keep what there is when the block ends early: the best student and, on Ctrl-C, the state to go on from.

    Raises Ended, or what ended the block if it is a mistake of the program's.
    """
    try:
        yield
    except Exception as error:
        kept, error = keep(error, out, student, optimizer, now)
        if isinstance(error, Interrupted):
            line = f"interrupted at step {now.step:,} of {out.name}; {kept}, --resume goes on"
            raise Ended(130, line) from None
        if line := describe(error):
            raise Ended(1, f"{line}; {kept}") from None
        raise


def keep(
    error: Exception, out: Path, student: Student, optimizer: torch.optim.Optimizer, now: Progress
) -> tuple[str, Exception]:
    """Save what can be saved after `error`. Returns what was kept, in words, and the error to report."""
    if isinstance(error, Interrupted):
        try:
            require_finite(student.model, now.step)
            save_state(out / "state.pt", student.model, optimizer, vars(now))
        except (FloatingPointError, OSError) as second:
            error = second
    if not now.best and not isinstance(error, Interrupted):
        return f"{out} has no student, because none was evaluated", error
    try:
        if now.best:
            student.model.load_state_dict(now.best)
        student.save(out / "student")
    except OSError as second:
        return f"the best student could not be saved either: {one_line(second)}", error
    return f"{out}/student is the best so far", error


def describe(error: Exception) -> str | None:
    """One line for what can end a run under way, None for what only a mistake of the program's raises."""
    line = one_line(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in line:
        return "out of memory; --micro-batch N computes the same steps N rows at a time"
    return line if isinstance(error, (FloatingPointError, OSError)) else None


def diverged(what: str, step: int) -> FloatingPointError:
    return FloatingPointError(f"{what} by step {step:,}; try a smaller --lr, with --overwrite")


def require_finite(model: T5, step: int) -> None:
    """Raise FloatingPointError unless all weights are finite numbers. Waits for the device, once."""
    if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        raise diverged("a weight is no longer a finite number", step)
