"""How a run ends before its time: what is kept of it, and the one line that says why."""

import torch

from data.arguments import one_line
from data.interrupt import Interrupted
from dss.run.state import save_state
from dss.weights import save_t5


class Failed(Exception):
    """Training cannot go on; the message says why, and what is kept."""


def end_early(problem, run, out, model, optimizer, now):
    """Keep what an arm has when `problem` ends it: the best student, and on Ctrl-C the state to go on from.

    Returns what to raise: Interrupted, or Failed, or `problem` itself if it is a mistake of the program's.
    """
    if isinstance(problem, Interrupted):
        try:
            require_finite(model, now.step)
            save_state(out / "state.pt", model, optimizer, vars(now))
        except (FloatingPointError, OSError) as second:
            problem = second
    kept, interrupted = f"{out}/student is the best so far", isinstance(problem, Interrupted)
    try:
        if now.best:
            model.load_state_dict(now.best)
        if now.best or interrupted:
            save_student(model, run.tokenizer, out)
        else:
            kept = f"{out} has no student, for none was evaluated"
    except OSError as second:
        kept = f"the best student could not be saved either: {one_line(second)}"
    if interrupted:
        return Interrupted(f"interrupted at step {now.step:,} of {out.name}; {kept}, --resume goes on")
    line = describe(problem)
    return Failed(f"{line}; {kept}") if line else problem


def describe(problem):
    """One line for what can end a run under way, None for an exception that only a mistake of the program's raises."""
    line = one_line(problem)
    if isinstance(problem, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in line:
        return "out of memory; --micro-batch N computes the same steps N rows at a time"
    return line if isinstance(problem, (Failed, FloatingPointError, OSError)) else None


def diverged(what, step):
    return FloatingPointError(f"{what} by step {step:,}; try a smaller --lr, with --overwrite")


def require_finite(model, step):
    """Raise FloatingPointError unless all weights are finite numbers. Waits for the device, once."""
    if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        raise diverged("a weight is no longer a finite number", step)


def save_student(model, tokenizer, out):
    save_t5(model, out / "student")
    tokenizer.save(out / "student")
