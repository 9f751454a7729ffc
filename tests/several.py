"""Run a function in several processes at once, as torchrun would. They are forked from a server that has torch."""

import multiprocessing
import os
import socket
import sys

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["train", "dss.run.shards", "conftest", "hypothesis.strategies"])


def start(n, directory, work, *arguments):
    """n processes, each of which calls work(*arguments); what they print is in DIRECTORY/RANK.txt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=begin, args=(r, n, port, directory, work, arguments)) for r in range(n)]
    for process in processes:
        process.start()
    return processes


def run(n, directory, work, *arguments):
    """The exit statuses of `start`'s processes, when all have ended."""
    return [end(process) for process in start(n, directory, work, *arguments)]


def end(process, seconds=100):
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


def begin(rank, n, port, directory, work, arguments):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stdout = sys.stderr = open(directory / f"{rank}.txt", "w", buffering=1)
    import torch

    torch.set_num_threads(1)
    sys.exit(work(*arguments))
