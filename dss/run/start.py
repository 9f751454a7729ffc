"""What is set up before training: device, threads, tokenizer, untrained model and output directory."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import torch

from data.cli import flag
from data.files import locked, read_json, write_json
from dss.batch import EXPLAIN, PREDICT, SEPARATOR
from dss.config import METHODS, SIZES, T5Config, TrainConfig
from dss.model import T5
from dss.rows import Rows, as_list
from dss.run import parallel
from dss.run.state import forget_state
from dss.weights import load_t5, resolve_checkpoint, read_config
from tokenizer import T5Tokenizer, train

# What a resumed run may change: the machine, the place of its output, and that of its rows if they are the same rows.
FREE = {"data", "eval_data", "test_data", "spiece", "method", "device", "threads", "out", "resume", "overwrite"}
FREE |= {"checkpoint_activations", "save_minutes", "plan", "processes", "device_gb", "lr"}  # identify() has lr's value


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
        tokenizer = T5Tokenizer(config.spiece or resolve_checkpoint(config.weights, weights=False))
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
    own = resolve_checkpoint(config.weights, weights=False) / "spiece.model" if config.spiece and config.weights else None
    if own and own.exists() and own.read_bytes() != tokenizer.model:
        text = f"warning: --spiece {config.spiece} is not the tokenizer that {config.weights} was trained with"
        print(f"train.py: {text}", file=sys.stderr)
    return tokenizer


def shape_of(config: TrainConfig, tokenizer: T5Tokenizer) -> T5Config:
    """The shape of the student, of which no weights need be there yet."""
    shape = read_config(resolve_checkpoint(config.weights, weights=False) / "config.json") if config.weights else SIZES[config.size]
    dropout = shape.dropout_rate if config.dropout is None else config.dropout
    return replace(shape, vocab_size=shape.vocab_size or tokenizer.vocab_size, dropout_rate=dropout)


def make_model(config: TrainConfig, tokenizer: T5Tokenizer) -> T5:
    """--weights, or a T5 of --size with random weights. Raises ValueError for a tokenizer with too many ids."""
    if config.weights:
        model = load_t5(config.weights, config.dropout)
    else:
        torch.manual_seed(config.seed)
        model = T5(shape_of(config, tokenizer))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, but {config.weights or config.size} embeds "
            f"{model.config.vocab_size:,}; give the --spiece that belongs to it"
        )
    return model


# ---- The output directory: found, claimed, and compared with what it holds ------------------------------------------


def find_output(config: TrainConfig, name: str) -> Path:
    """The output directory: --out or runs/NAME. Raises ValueError if it holds something and no flag says what to do."""
    out = Path(config.out or Path("runs") / name)
    require_free(out, config)
    for directory in (out / method for method in config.method):
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"{directory}: not a directory")
        ours = not directory.exists() or (directory / "config.json").exists() or not any(directory.iterdir())
        if config.overwrite and not ours:
            raise ValueError(f"{directory} is not the output of a run; --overwrite will not delete it")
        for path in (config.weights, config.spiece, *config.data, config.eval_data, config.test_data):
            if config.overwrite and path and Path(path).resolve().is_relative_to(directory.resolve()):
                raise ValueError(f"--overwrite would delete {directory}, and with it {path}, which this run reads")
    return out


def require_free(out: Path, config: TrainConfig) -> None:
    """Raise ValueError unless `out` is not there, is empty, or --resume or --overwrite says what to do with it."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: not a directory")
    if out.exists() and any(out.iterdir()) and not (config.resume or config.overwrite):
        raise ValueError(f"{out} exists: --resume goes on with it, --overwrite replaces it, --out names another")


def identify(config: TrainConfig, rows: Rows, tokenizer: T5Tokenizer | None = None) -> dict:
    """What makes two runs the same: the settings, and digests of rows and tokenizer. It becomes config.json."""
    digest = hashlib.sha256()
    for record in chain(rows.train, rows.validation, rows.test):
        digest.update(json.dumps([record.input, record.label, record.rationale]).encode())
    identity = asdict(config) | dict(learning_rate=config.learning_rate, metric=rows.metric)
    identity["rows_sha256"] = digest.hexdigest()
    if tokenizer:
        identity["tokenizer_sha256"] = hashlib.sha256(tokenizer.model).hexdigest()
    return identity


@contextmanager
def claimed(out: Path, config: TrainConfig, rows: Rows, tokenizer: T5Tokenizer) -> Iterator[None]:
    """Hold the output directory for the block; the first process holds it for all. With --overwrite, old output is
    deleted; with --resume, it must be of the same run.

    Raises ValueError, naming the setting, if any method there, asked for or not, was trained with another, and
    BlockingIOError if another process trains there.
    """
    parallel.wait_for_all()  # all have looked at what is there
    with ExitStack() as held:
        if parallel.is_first():
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out / "run"))
            identity = identify(config, rows, tokenizer)
            if config.resume:
                for method in METHODS:
                    require_same(out / method, identity)
                if not any((out / method / "config.json").exists() for method in config.method):
                    print(f"--resume: nothing to resume in {out}; starting", file=sys.stderr)
            for method in config.method:
                if config.overwrite and (out / method).exists():
                    shutil.rmtree(out / method)
                (out / method).mkdir(exist_ok=True)
                if (out / method / "result.json").exists():
                    forget_state(out / method)
                else:
                    write_json(out / method / "config.json", identity | {"method": method})
        parallel.wait_for_all()
        yield


def require_same(directory: Path, identity: dict) -> None:
    """Raise ValueError, naming the setting, if OUT/METHOD holds a run of another identity."""
    if not (directory / "config.json").exists():
        return
    before = read_json(directory / "config.json")
    for key, now in json.loads(json.dumps(identity)).items():
        was = before.get(key)
        same = key in FREE or was == now or (key == "dtype" and now == "auto")
        if not same and not (key == "weights" and was and now and Path(was).resolve() == Path(now).resolve()):
            other = {"rows_sha256": "other rows", "tokenizer_sha256": "another tokenizer"}.get(key)
            other = other or f"{setting(key, was)}, not {setting(key, now)}"
            raise ValueError(f"--resume: {directory} was started with {other}; another --out starts anew")


def setting(key: str, value: object) -> str:
    name = flag("lr" if key == "learning_rate" else key)
    return f"no {name}" if value in (None, "") else f"{name} {value}"
