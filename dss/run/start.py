"""What stands before training: the device, the threads, the tokenizer and the untrained model."""

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from dss.batch import EXPLAIN, PREDICT, SEPARATOR
from dss.config import SIZES, T5Config, TrainConfig
from dss.model import T5
from dss.rows import Rows, as_list
from dss.weights import load_t5, locate, read_config
from tokenizer import T5Tokenizer, train


def choose_device(name: str, dtype: str = "float32") -> torch.device:
    """The device for "auto", "cpu" or "cuda": under torchrun, a GPU for each process of a machine.

    Raises ValueError for cuda where there is none, or none for this process or dtype.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if "LOCAL_RANK" in os.environ else torch.device("cuda")
    if device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"{torch.cuda.device_count()} GPUs here, too few for torchrun's --nproc_per_node")
        torch.cuda.set_device(device)
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"--dtype bfloat16: {torch.cuda.get_device_name()} does not compute it; --dtype float32 does")
    return device


def choose_dtype(asked: str, device: torch.device) -> str:
    """ "float32" or "bfloat16", as asked; for "auto" bfloat16 where a GPU computes it."""
    if asked != "auto":
        return asked
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def choose_threads(asked: int, model: T5) -> None:
    """Set the CPU threads: as many as asked, or, if 0, one for a small student, else what torch took at its start.

    Below 5 M parameters threads gain little, and on a busy machine, where they wait for one another, they cost more.
    """
    if asked or model.num_parameters() < 5e6:
        torch.set_num_threads(asked or 1)


def make_tokenizer(config: TrainConfig, rows: Rows, out: Path) -> T5Tokenizer:
    """--spiece, or the weights' own, or one trained on the texts of the training rows.

    Raises ValueError where a method needs a separator and there is none; warns of a --spiece that is not the weights'.
    """
    if config.spiece or config.weights:
        tokenizer = T5Tokenizer(config.spiece or locate(config.weights, weights=False))
    elif config.resume and (out / "spiece.model").exists():
        tokenizer = T5Tokenizer(out)
    else:
        texts = [
            text
            for row in rows.train[:: -(-len(rows.train) // 50_000)]  # more take minutes and change little
            for text in (PREDICT + row.input, EXPLAIN + row.input, row.label, *as_list(row.rationale))
        ]
        with tempfile.TemporaryDirectory() as directory:
            tokenizer = train(texts, Path(directory) / "spiece.model", config.vocab_size)
    for method in {"single_task", "label_first"} & set(config.method):
        if SEPARATOR not in tokenizer.special:
            raise ValueError(f"--method {method} needs the token {SEPARATOR}, and this tokenizer has no sentinels")
    own = locate(config.weights, weights=False) / "spiece.model" if config.spiece and config.weights else None
    if own and own.exists() and own.read_bytes() != tokenizer.model:
        text = f"warning: --spiece {config.spiece} is not the tokenizer that {config.weights} was trained with"
        print(f"train.py: {text}", file=sys.stderr)
    return tokenizer


def shape_of(config: TrainConfig, tokenizer: T5Tokenizer) -> T5Config:
    """The shape of the student, of which no weights need be there yet."""
    shape = read_config(locate(config.weights, weights=False) / "config.json") if config.weights else SIZES[config.size]
    dropout = shape.dropout_rate if config.dropout is None else config.dropout
    return replace(shape, vocab_size=shape.vocab_size or tokenizer.vocab_size, dropout_rate=dropout)


def make_model(config: TrainConfig, tokenizer: T5Tokenizer) -> T5:
    """--weights, or a T5 of --size with random weights. Raises ValueError for a tokenizer with too many ids."""
    if config.weights:
        model = load_t5(config.weights, config.dropout, mapped=config.shard)
    else:
        torch.manual_seed(config.seed)
        model = T5(shape_of(config, tokenizer))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, but {config.weights or config.size} embeds "
            f"{model.config.vocab_size:,}; give the --spiece that belongs to it"
        )
    return model
