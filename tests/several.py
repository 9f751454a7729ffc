"""Run a function in several processes at once, as torchrun would. They are forked from a server that has torch."""

import multiprocessing
import os
import sys

from torch.distributed import TCPStore

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["train", "dss.run.shards", "conftest", "hypothesis.strategies"])


def run(n, directory, work, *arguments):
    """The exit statuses of n processes that each call work(*arguments); what they print is in DIRECTORY/RANK.txt."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives them, as torchrun's does
    rest = (n, store.port, directory, work, arguments)
    processes = [context.Process(target=begin, args=(rank, *rest)) for rank in range(n)]
    for process in processes:
        process.start()
    return [end(process) for process in processes]


def end(process, seconds=100):
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


def begin(rank, n, port, directory, work, arguments):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    sys.stdout = sys.stderr = open(directory / f"{rank}.txt", "w", buffering=1)
    import torch

    torch.set_num_threads(1)
    sys.exit(work(*arguments))
