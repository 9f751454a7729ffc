"""Short runs of train.py, as several test files make them."""

import itertools
import json
import signal
import time
from pathlib import Path

import torch

import train
from data.cli import Stop
from data.files import read_json
from data.jsonl import Record, write_jsonl
from dss.config import T5Config, parse_args
from dss.model import T5
from dss.weights import load_t5

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(
    vocab_size=61,
    d_model=24,
    d_kv=8,
    d_ff=40,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=3,
)
V1_1 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, scale_decoder_outputs=False)
QUICK = "--batch-size 4 --warmup 2 --max-target-length 12 --max-new-tokens 4"
SIX = f"{QUICK} --steps 6 --eval-every 2 --log-every 100 --method dss"


def write_rows(directory, rows, split):
    """Flags of train.py: rows[:split] to train on, and rows[split:] to be tested on."""
    write_jsonl(directory / "rows.jsonl", rows[:split])
    write_jsonl(directory / "test.jsonl", rows[split:])
    return ["--data", str(directory / "rows.jsonl"), "--test-data", str(directory / "test.jsonl")]


def student(**shape):
    """A T5 of the SMALL shape or of another, always with the same random weights."""
    torch.manual_seed(0)
    return T5(T5Config(**SMALL | shape))


def counting(n):
    """n Records whose answers are equations."""
    rows = []
    for i in range(n):
        rows.append(Record(f"r{i}", f"Tom gave {i} apples.", f"{i} + 1", f"Add 1 to {i}.", f"{i}"))
    return rows


def few_rows(directory):
    """Flags for 16 training and 4 test rows, as one text."""
    return " ".join(write_rows(directory, counting(20), 16))


def run(*arguments):
    """train.py on a command line, in one piece or several."""
    return train.main(" ".join(map(str, arguments)).split())


def prepare(*arguments):
    return train.prepare(parse_args(" ".join(map(str, arguments)).split()))


def watched(name, act):
    """The function `name` of train.py, but each of its calls begins with act(*arguments)."""
    original = getattr(train, name)

    def function(*arguments):
        act(*arguments)
        return original(*arguments)

    return function


def at_step(step, act):
    """train.train_step, but `act(model)` happens before the call number `step`, from 0."""
    calls = iter(range(1000))

    def act_once(student, *_):
        if next(calls) == step:
            act(student.model)

    return watched("train_step", act_once)


def stop_at(n):
    """data.cli.Stop.check, but Ctrl-C comes when it is called for the n-th time."""
    check = Stop.check
    calls = itertools.count(1)

    def signalled(stop):
        if next(calls) == n:
            signal.raise_signal(signal.SIGINT)
        check(stop)

    return signalled


def wait_until(holds, seconds=100):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)


def json_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def result(out, method):
    return read_json(out / method / "result.json")


def weights(directory):
    """Those of the student in OUT/METHOD."""
    return load_t5(directory / "student").state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
