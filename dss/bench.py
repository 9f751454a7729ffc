"""Time whole training steps and decoding beside the same T5 in transformers.

    python -m dss.bench                                              the embedded task
    python -m dss.bench --size t5-v1_1-small --data cqa_train.jsonl

A training step of the peers is that of the paper's released code: a padded forward pass for the
labels, another one for the rationales, and one backward pass of the mean of their losses. Peers
are timed with eager attention, with sdpa, and with sdpa and torch.compile. All have the same
weights, rows, threads and AdamW, and they take turns, since a busy machine slows all of them.
torch.compile is left out on a CPU, where it takes minutes, and in decoding, where it compiles for
each length. Before they are timed, peers must compute the same loss, or decode the same tokens.
"""

import platform
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import tokenizer
from data import cli, toy
from data.cli import require
from data.files import write_json
from data.jsonl import read_jsonl
from dss.batch import Sequence, count_tokens, make_step
from dss.config import SIZES
from dss.distributed import choose_device
from dss.generate import generate
from dss.linear import cast_weights
from dss.loss import distillation_loss
from dss.methods import sequences
from dss.model import T5
from dss.weights import load_t5, save_t5

OURS = "ours"
PEERS = ("eager", "sdpa", "compile")
NEW_TOKENS = 16  # decoded for each input
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}  # of a loss, relative
Row = list[Sequence]  # two sequences: question and label, question and rationale


@dataclass(frozen=True)
class BenchConfig:
    """Time training steps and decoding beside transformers, where it is installed."""

    what: tuple[Literal["training", "decoding"], ...] = ("training", "decoding")  # what to time
    data: tuple[str, ...] = ()  # rows with rationales, JSONL files; default: the embedded task
    size: Literal[tuple(SIZES)] = "tiny"  # shape of the student, which has random weights
    batch_size: int = 16  # rows of a step, and inputs decoded together
    repeats: int = 7  # timed turns, after one that warms up
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast
    json: str = ""  # file for all figures

    def check(self) -> None:
        """Raise ValueError, naming the flag, for a value that makes no sense."""
        require(self.batch_size >= 1, "batch_size", "at least 1", self)
        require(self.repeats >= 2, "repeats", "at least 2", self)


@dataclass(frozen=True)
class Setting:
    """What all implementations are given."""

    rows: list[Row]
    directory: Path  # the model, in Hugging Face's layout
    config: BenchConfig
    device: torch.device

    def autocast(self) -> torch.autocast:
        enabled = self.config.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def batch(self, turn: int) -> list[Row]:
        """The rows of a turn, the same for all implementations."""
        return random.Random(turn).sample(self.rows, self.config.batch_size)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a peer computes something else, 2 the arguments or files are wrong."""
    config = cli.parse(argv, BenchConfig, prog="dss.bench")
    report = dict(vars(config), machine=platform.processor(), torch=torch.__version__)
    differing = []
    try:
        with tempfile.TemporaryDirectory() as directory:
            setting = prepare(config, Path(directory))
            if setting.device.type == "cuda":
                report["machine"] = torch.cuda.get_device_name()
            for what in config.what:
                make = trainer if what == "training" else decoder
                report[what], some = compare(setting, make)
                differing += some
                show(f"{what}, {config.batch_size} rows", report[what])
        if config.json:
            write_json(config.json, report)
    except (OSError, ValueError) as problem:
        return cli.fail("dss.bench", 2, problem)
    if differing:
        return cli.fail(
            "dss.bench", 1, f"computes something else than ours: {', '.join(differing)}"
        )
    return 0


def prepare(config: BenchConfig, directory: Path) -> Setting:
    """Write a model with random weights. Raises OSError or ValueError, in one line, for what the
    user can put right."""
    records = toy.make_rows(0)[0]
    if config.data:
        records = [record for path in config.data for record in read_jsonl(path)]
    records = [r for r in records if r.label is not None and r.rationale is not None]
    if len(records) < config.batch_size:
        raise ValueError(
            f"{len(records)} rows have a label and a rationale; see --data, --batch-size"
        )
    texts = [text for r in records for text in (r.input, r.label, r.rationale)]
    tok = tokenizer.train(texts, directory / "spiece.model", vocab_size=4000)
    torch.manual_seed(0)
    shape = SIZES[config.size]
    save_t5(T5(replace(shape, vocab_size=shape.vocab_size or tok.vocab_size)), directory)
    rows = [sequences(record, "dss", tok) for record in records]
    return Setting(rows, directory, config, choose_device(config.device))


def load(setting: Setting, name: str) -> nn.Module:
    """The model of an implementation, always with the same weights. Raises ImportError without
    transformers."""
    if name == OURS:
        return load_t5(setting.directory).to(setting.device)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    attention = "eager" if name == "eager" else "sdpa"
    kind = transformers.AutoModelForSeq2SeqLM
    model = kind.from_pretrained(setting.directory, attn_implementation=attention)
    model = model.to(setting.device)
    if name == "compile":
        model.compile(dynamic=True)
    return model


# ---- Training ----


def our_loss(model: T5, rows: list[Row]) -> Tensor:
    """L / 2: with lambda = 1, the released recipe's mean of both losses."""
    device = model.embedding.weight.device
    step = make_step(rows, 0, device, model.config.decoder_start_token_id)
    (batch,) = step.batches
    return distillation_loss(model, batch, step.n_label, step.n_rationale, 1.0)[0] / 2


def recipe_loss(model: nn.Module, rows: list[Row]) -> Tensor:
    """The mean of L_label and L_rationale, each from a padded forward pass of its own."""
    losses = []
    for task in zip(*rows):  # all label sequences, then all rationale sequences
        input_ids = padded([sequence.input_ids for sequence in task], 0).to(model.device)
        labels = padded([sequence.target_ids for sequence in task], -100).to(model.device)
        mask = (input_ids != 0).long()
        losses.append(model(input_ids=input_ids, attention_mask=mask, labels=labels).loss)
    return sum(losses) / 2


def padded(lists: list[list[int]], value: int) -> Tensor:
    tensors = [torch.tensor(ids) for ids in lists]
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def trainer(setting: Setting, name: str) -> tuple[Callable[[list[Row]], object], float]:
    """A function that takes one optimiser step, and the loss before the first, without dropout."""
    model = load(setting, name)
    loss_of = our_loss if name == OURS else recipe_loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    cast = nullcontext
    if name == OURS and setting.config.dtype == "bfloat16":
        cast = cast_weights

    def step(rows: list[Row]) -> None:
        with cast(model):
            with setting.autocast():
                loss = loss_of(model, rows)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    model.eval()
    with torch.no_grad(), setting.autocast():
        loss = loss_of(model, setting.batch(0)).item()
    model.train()
    return step, loss


# ---- Decoding ----


def decoder(setting: Setting, name: str) -> tuple[Callable[[list[Row]], object], list[list[int]]]:
    """A function that decodes the inputs of rows greedily, and what it decodes in turn 0."""
    model = load(setting, name).eval()

    def decode(rows: list[Row]) -> list[list[int]]:
        inputs = [row[0].input_ids for row in rows]
        with setting.autocast():
            if name == OURS:
                return generate(model, inputs, NEW_TOKENS, len(inputs))
            ids = padded(inputs, 0).to(setting.device)
            greedy = dict(max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)
            outputs = model.generate(ids, attention_mask=(ids != 0).long(), **greedy)
        written = []
        for row in outputs[:, 1:].tolist():
            end = row.index(1) if 1 in row else len(row)
            written.append(row[:end])
        return written

    return decode, decode(setting.batch(0))


# ---- Comparing ----


def compare(setting: Setting, make: Callable) -> tuple[dict[str, dict], list[str]]:
    """{implementation: its figures}, and the names of the peers that compute something else.

    make: trainer or decoder. A peer that cannot run here is left out, with a line that says why.
    """
    functions = {}
    values = {}
    for name in (OURS, *PEERS):
        if name == "compile" and (make is decoder or setting.device.type == "cpu"):
            continue
        try:
            function, value = make(setting, name)
            function(setting.batch(0))
        except Exception as problem:
            if name == OURS:
                raise
            print(f"{name}: not timed: {cli.one_line(problem)[:200]}")
            continue
        functions[name] = function
        values[name] = value
    expected = values[OURS]
    differing = []
    for name, value in values.items():
        if make is trainer:
            same = abs(value / expected - 1) <= TOLERANCE[setting.config.dtype]
        else:
            same = value == expected or setting.config.dtype != "float32"
        if not same:
            differing.append(name)
    return time_in_turns(functions, setting), differing


def time_in_turns(functions: dict[str, Callable], setting: Setting) -> dict[str, dict]:
    """{name: median milliseconds, their ratio to ours in the same turn (quartiles), tokens/s}."""
    turns = [setting.batch(turn) for turn in range(setting.config.repeats + 1)]
    seconds = np.zeros((len(functions), len(turns)))
    for turn, rows in enumerate(turns):
        for place, function in enumerate(functions.values()):
            begin = time.perf_counter()
            function(rows)
            if setting.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[place, turn] = time.perf_counter() - begin
    seconds = seconds[:, 1:]  # the first turn warms up
    tokens = np.mean([count_tokens(row) for rows in turns[1:] for row in rows])
    ratios = seconds / seconds[0]
    figures = {}
    for place, name in enumerate(functions):
        low, middle, high = np.percentile(ratios[place], [25, 50, 75]).tolist()
        median = np.median(seconds[place]).item()
        figures[name] = {
            "ms": 1000 * median,
            "x ours": middle,
            "quartile 1": low,
            "quartile 3": high,
            "tokens/s": setting.config.batch_size * tokens.item() / median,
        }
    return figures


def show(title: str, figures: dict[str, dict]) -> None:
    """Print a Markdown table."""
    heads = list(figures[OURS])
    print(f"\n| {title} | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for name, row in figures.items():
        print(f"| {name} | {' | '.join(f'{value:,.4g}' for value in row.values())} |")


if __name__ == "__main__":
    cli.run("dss.bench", main)
