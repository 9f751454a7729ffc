"""The state of an unfinished run: what it needs to go on as if it had not been interrupted.

state.pt is what torch.save writes and, behind it, the sha256 of that. state.before.pt is the state before it, for the
case that state.pt is damaged.
"""

import contextlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.files import digest, reason, replacing

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
    size = path.stat().st_size - DIGEST if path.is_file() else -1
    if size < 0:
        return False
    with open(path, "rb") as file:
        file.seek(size)
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
