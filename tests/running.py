"""Short runs of train.py, as several test files make them."""

import json
import time
from pathlib import Path

import torch

import train
from data.jsonl import Record, write_jsonl
from dss.config import T5Config, parse_args
from dss.model import T5
from dss.weights import load_t5

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(vocab_size=61, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_decoder_layers=2, num_heads=3)
V1_1 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, scale_decoder_outputs=False)


def write_rows(directory, rows, split):
    """The flags of train.py for rows[:split] to train on and rows[split:] to be tested on."""
    write_jsonl(directory / "rows.jsonl", rows[:split])
    write_jsonl(directory / "test.jsonl", rows[split:])
    return ["--data", str(directory / "rows.jsonl"), "--test_data", str(directory / "test.jsonl")]


def student(**shape):
    """A T5 of the SMALL shape or of another, always with the same random weights."""
    torch.manual_seed(0)
    return T5(T5Config(**SMALL | shape))


def counting(n):
    """n Records whose answers are equations."""
    return [Record(f"r{i}", f"Tom gave {i} apples.", f"{i} + 1", f"Add 1 to {i}.", f"{i}") for i in range(n)]


def run(*arguments):
    return train.main([str(a) for a in arguments])


def prepare(*arguments):
    return train.prepare(parse_args([str(a) for a in arguments]))


def watched(name, act):
    """The function `name` of train.py, but each of its calls begins with act(*arguments)."""
    original = getattr(train, name)

    def function(*arguments):
        act(*arguments)
        return original(*arguments)

    return function


def at_step(steps, act):
    """train.train_step, but before its calls of the numbers `steps` (from 0) `act(model)` happens."""
    calls = iter(range(1000))
    return watched("train_step", lambda student, *_: act(student.model) if next(calls) in steps else None)


def wait_until(holds, seconds=100):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)


def result(out, method):
    return json.loads((out / method / "result.json").read_text())


def weights(arm):
    return load_t5(arm / "student").state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
