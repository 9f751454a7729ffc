"""Several processes on one run: `torchrun --nproc_per_node=N train.py ...`. torch.distributed does the work.

Every process goes through the same steps. Of each step's rows it computes a part; losses and gradients are summed over
all processes, which then take the same optimiser step. Rows to evaluate are shared out, too. The first process alone
writes files and shows progress. A process that is alone does everything, and nothing here costs it anything.

A process that dies takes the others along: each waits, in a thread, for the last word of its neighbour, whose
connection breaks if it ends without one.
"""

import contextlib
import copy
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from data.cli import Stop
from dss.config import TrainConfig
from dss.model import T5
from dss.student import Student

MOMENT = 3.0  # seconds in which a process ends by itself when another has died
STORE: list[dist.Store] = []  # torchrun's, of the run that this process has joined


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return rank() == 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that torchrun started, if it did, for the block. All but the first are silent.

    Where the block raises, all processes end. The first to raise says why; in the others it is a SystemExit.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    store, mine, n = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=mine, world_size=n)
    words = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    STORE[:] = [store]
    watcher = threading.Thread(target=watch, args=((mine + 1) % n, words, sys.stderr), daemon=True)
    watcher.start()

    def leave() -> None:
        dist.send(torch.zeros(1), (mine - 1) % n, group=words)
        watcher.join()
        dist.destroy_process_group()

    try:
        with open(os.devnull, "w") as nowhere:
            out, err = (nowhere, nowhere) if mine else (sys.stdout, sys.stderr)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                yield
        leave()
    except BaseException as error:
        for number in (signal.SIGTERM, signal.SIGINT):  # torchrun's are on their way where another process has ended
            signal.signal(number, signal.SIG_IGN)
        first, status = speaks_first(str(mine)), getattr(error, "status", 1)
        if status == 130:  # interrupted: all end at the same step
            leave()
        if first:
            raise
        raise SystemExit(2 if isinstance(error, (OSError, ValueError)) else status) from None


def watch(neighbour: int, words: dist.ProcessGroup, terminal: TextIO) -> None:
    """Wait for the neighbour's last word. If it dies without one, so does this process, a moment later at most."""
    try:
        dist.recv(torch.zeros(1), neighbour, group=words)
    except RuntimeError:
        mine = str(rank())
        speaks_first(f"{mine} {neighbour}")
        time.sleep(2 * MOMENT)  # the main thread ends by itself, unless it waits on a GPU for the dead process
        if speaks_first(mine):
            kept = "if a state was saved, --resume goes on from it"
            print(f"train.py: process {neighbour} has ended; {kept}", file=terminal, flush=True)
        os._exit(1)


def speaks_first(mine: str) -> bool:
    """Whether this process is the first to end the run, and so the one that says why. mine: rank [who was lost]."""
    try:
        return STORE[0].compare_set("ended", "", mine).decode().split()[0] == mine.split()[0]
    except dist.DistError:  # the process that kept the store has ended, and has said why
        return False


def lost(error: Exception) -> str:
    """If `error` followed from the end of another process, a line that says so, else nothing."""
    for _ in range(int(10 * MOMENT)) if size() > 1 and isinstance(error, RuntimeError) else ():
        if STORE[0].check(["ended"]):
            _, *number = STORE[0].get("ended").decode().split()
            return f"process {number[0]} has ended" if number else "another process has ended"
        time.sleep(0.1)
    return ""


# ---- What all processes do together ---------------------------------------------------------------------------------


def wait_for_all() -> None:
    if size() > 1:
        dist.barrier()


def highest(number: int) -> int:
    """The highest of the processes' numbers."""
    if size() == 1:
        return number
    agreed = torch.tensor(number)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return int(agreed)


def anyone(condition: bool) -> bool:
    """Whether the condition holds in any process."""
    return bool(highest(int(condition)))


def check(stop: Stop) -> None:
    """`stop.check()`, but all processes stop where one is asked to."""
    if size() > 1:
        stop.requested = anyone(stop.requested)
    stop.check()


def seed(number: int, step: int) -> None:
    """Seed a step's dropout: each process draws its own, the same whenever the step is computed."""
    torch.manual_seed(int(np.random.SeedSequence([number, step, rank()]).generate_state(1, np.uint64)[0]))


def sum_up(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all processes."""
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors] if size() > 1 else ():
        work.wait()


def share_out(work: Callable[[list], list], items: list) -> list:
    """work(items), a result for each item: each process works on some of them, and has the results of all."""
    if size() == 1:
        return work(items)
    n, parts = size(), [None] * size()
    dist.all_gather_object(parts, work(items[rank() :: n]))
    return [parts[i % n][i // n] for i in range(len(items))]


# ---- The student, on one device or several --------------------------------------------------------------------------


def place(student: Student, device: torch.device, config: TrainConfig) -> Student:
    """A student to train: whole on `device`, or with --shard this process's part of it. Given to the last of the run's
    methods, the student itself, else a copy."""
    if config.shard:
        from dss.run import shards

        student = shards.ShardedStudent.part_of(student, device)
    else:
        last = student.method == config.method[-1]
        student = replace(student, model=(student.model if last else copy.deepcopy(student.model)).to(device))
    for layer in layers(student.model) if config.checkpoint_activations else ():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # which computes it once more
    return student


def layers(model: T5) -> list[torch.nn.Module]:
    return [*model.encoder.layers, *model.decoder.layers]
