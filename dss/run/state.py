"""The state of an unfinished run, in one file: what a run needs to go on as if it had not been interrupted."""

from dataclasses import dataclass, field

import torch

from data.files import replacing


@dataclass
class Progress:
    """How far a student has come. state.pt holds it, so that a resumed run ends as an undisturbed one would."""

    step: int = 0  # optimiser steps done
    evaluated: int = 0  # the step of the last look at the validation rows
    best_step: int = 0
    best_accuracy: float = -1.0
    seconds: float = 0.0  # of training and evaluation
    tokens: int = 0  # trained on, inputs and targets
    window: dict = field(default_factory=dict)  # what the log has summed since its last line


class StateError(ValueError):
    """A file that is not the state of the run that would go on with it; the message names it."""


def save_state(path, model, optimizer, progress):
    """Write weights, optimizer, random generators and `progress`, a dict of tensors, numbers and the like,
    complete or not at all. Raises OSError if it cannot be written."""
    generators = {"cpu": torch.get_rng_state()}
    if next(model.parameters()).is_cuda:
        generators["cuda"] = torch.cuda.get_rng_state()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generators": generators}
    try:
        with replacing(path) as file:
            torch.save(state | {"progress": progress}, file)
    except RuntimeError as problem:  # what torch makes of a full disk
        raise OSError(f"{path}: cannot be written ({reason(problem)})") from None


def reason(problem):
    """The system's reason where an error followed from one, else the error's first line."""
    system = problem.__context__
    return (system.strerror if isinstance(system, OSError) else None) or str(problem).splitlines()[0]


def load_state(path, model, optimizer):
    """Put back what `save_state` wrote; returns its `progress`. Raises StateError if the file is not such a state."""
    device = next(model.parameters()).device
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["generators"]["cpu"])
        if device.type == "cuda" and "cuda" in state["generators"]:
            torch.cuda.set_rng_state(state["generators"]["cuda"])
        return state["progress"]
    except Exception as problem:  # torch.load documents no closed set of errors for a damaged file
        raise StateError(f"{path}: not the state of this run ({str(problem).splitlines()[0]})") from None
