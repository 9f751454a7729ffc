"""A whole training step as a CUDA graph, which DSS_GRAPH=1 asks for.

The host launches about a thousand kernels in a step of T5-base, and takes longer for that than
a GPU takes to compute them. A CUDA graph is captured once: launches are recorded, not made. One
call then replays all of them. A graph repeats the same launches with the same arguments, so what
differs from step to step lies in tensors that stay where they are, and is copied into them:

    batch     padded to one shape, by sequences without weight (`Budget` in dss/batch.py)
    numbers   the counts of target tokens, by which the loss divides, and the learning rate
    seed      of dropout: torch keeps that of its generator on the device while it captures, and
              sets it before each replay to what `distributed.seed` has chosen

What is captured is train.py's `train_step` itself. It is called as it is for the first padded
batch, which compiles the kernels and makes the optimiser's state, and for each batch that is not
padded because the budget is too small for it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import kernels
from dss import distributed
from dss.batch import Batch, Step, to_device
from dss.config import TrainConfig
from dss.log import warn

BATCHES = 50  # the first ones of a run, which set the budget
Results = tuple[Tensor, Tensor]  # of train_step


def is_wanted(config: TrainConfig, device: torch.device) -> bool:
    """Whether DSS_GRAPH=1 asks for captured steps and this run can have them. If it cannot, a
    warning says why. Raises ValueError for another DSS_GRAPH."""
    asked = os.environ.get("DSS_GRAPH", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"DSS_GRAPH must be 0 or 1, got {asked!r}")
    problem = None
    if device.type != "cuda":
        problem = f"CUDA graphs need a GPU, not {device.type}"
    elif kernels.choice(device) != "triton":
        problem = "the reference operations wait for the GPU"
    elif distributed.size() > 1 or config.shard:
        problem = "several processes and --shard exchange gradients"
    elif config.micro_batch or config.checkpoint_activations:
        problem = "not with --micro-batch or --checkpoint-activations"
    if asked == "1" and problem:
        warn(f"DSS_GRAPH=1: {problem}; steps are not captured")
    return asked == "1" and problem is None


@dataclass
class Arguments:
    """What `train_step` is given, with all that differs between steps in tensors."""

    work: Step
    rate: Tensor  # scalar, fp32
    tensors: list[Tensor]  # all of them


def to_tensors(work: Step, rate: float, device: torch.device) -> Arguments:
    numbers = torch.tensor([work.n_label, work.n_rationale, rate], dtype=torch.float32)
    numbers = to_device(numbers, device)
    n_label, n_rationale, rate = numbers.unbind()
    tensors = [numbers, *tensors_of(work.batches[0])]
    return Arguments(replace(work, n_label=n_label, n_rationale=n_rationale), rate, tensors)


def tensors_of(batch: Batch) -> list[Tensor]:
    tensors = [batch.input_ids, batch.decoder_input_ids, batch.labels, batch.task]
    for segments in (batch.inputs, batch.targets):
        tensors.append(segments.cu_seqlens)
        if segments.tiles is not None:
            tensors += [segments.tiles.queries, segments.tiles.keys]
    return tensors


class CapturedStep:
    """`train_step`, called as that is, but captured and replayed where a batch is padded.

    What it returns is overwritten by the next call.
    """

    def __init__(self, train_step: Callable[..., Results]) -> None:
        self.train_step = train_step
        self.kept: Arguments | None = None  # of the first padded batch: the graph reads these
        self.graph: torch.cuda.CUDAGraph | None = None
        self.results: Results | None = None
        self.failed = False

    def __call__(
        self,
        student: object,
        optimizer: torch.optim.Optimizer,
        work: Step,
        rate: float,
        run: object,
    ) -> Results:
        given = to_tensors(work, rate, work.batches[0].labels.device)
        if self.failed or not work.padded:
            return self.train_step(student, optimizer, given.work, given.rate, run)
        if self.kept is None:
            self.kept = given
            return self.train_step(student, optimizer, given.work, given.rate, run)
        for kept, new in zip(self.kept.tensors, given.tensors, strict=True):
            kept.copy_(new)
        step = partial(self.train_step, student, optimizer, self.kept.work, self.kept.rate, run)
        if self.graph is None:
            self.capture(step, optimizer)
        if self.failed:
            return step()
        self.graph.replay()
        return self.results

    def capture(self, step: Callable[[], Results], optimizer: torch.optim.Optimizer) -> None:
        try:
            with capturable(optimizer):
                self.graph, self.results = record(step)
        except RuntimeError as problem:
            first_line = str(problem).split("\n")[0]
            warn(f"DSS_GRAPH=1: a step could not be captured ({first_line}); plain steps follow")
            self.failed = True
            optimizer.zero_grad()


def record(step: Callable[[], Results]) -> tuple[torch.cuda.CUDAGraph, Results]:
    """A graph of what the step launches, and the tensors in which each replay leaves its results.

    Other threads may use the GPU meanwhile: one packs the batches of the next steps.
    """
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    # If a capture fails, torch puts neither the current stream nor its generator back.
    same_stream = torch.cuda.stream(torch.cuda.current_stream())
    try:
        with same_stream, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = step()
    except RuntimeError:
        generator.graphsafe_set_state(before)
        raise
    return graph, results


@contextmanager
def capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """torch refuses to capture, and warns otherwise, unless an optimiser is marked so. A fused one
    has all its state on the device in either case."""
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["capturable"] = False
