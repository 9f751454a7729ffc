"""Run a function in several processes, as torchrun would, but forked from a server with torch."""

import multiprocessing
import os
import sys

from torch.distributed import TCPStore

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(  # torch._dynamo: the first optimiser of a process imports it
    ["train", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
)


def run(n, directory, work, *arguments):
    """The exit statuses of n processes that each call work(*arguments). What they print is in
    DIRECTORY/RANK.txt."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = dict(
        WORLD_SIZE=str(n),
        LOCAL_WORLD_SIZE=str(n),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the store outlives them, as torchrun's does
    )
    processes = []
    for rank in range(n):
        own = environment | dict(RANK=str(rank), LOCAL_RANK=str(rank))
        log = directory / f"{rank}.txt"
        processes.append(context.Process(target=begin, args=(own, log, work, arguments)))
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in processes]


def begin(environment, log, work, arguments):
    os.environ |= environment
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    import torch

    torch.set_num_threads(1)
    sys.exit(work(*arguments))
