"""What stands before training and around it: the device and the output directory."""

import hashlib
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from data import arguments
from data.files import replacing
from dss.batch import SEPARATOR
from dss.config import METHODS
from dss.weights import locate

# What a resumed run may change: where it runs and lies, and where rows come from, as long as they are the same rows.
FREE = {"data", "eval_data", "test_data", "spiece", "method", "device", "threads", "out", "resume", "overwrite"}
FREE |= {"lr"}  # learning_rate says what it came to


def choose_device(name, dtype="float32"):
    """torch.device for "auto", "cpu" or "cuda". Raises ValueError for cuda where there is none, or none for dtype."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here")
    device = torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"--dtype bfloat16: {torch.cuda.get_device_name()} does not compute it; --dtype float32 does")
    return device


def check_tokenizer(config, tokenizer):
    """Raise ValueError if single_task lacks its separator; warn of a --spiece that is not the weights' own."""
    if "single_task" in config.method and SEPARATOR not in tokenizer.special:
        raise ValueError(f"--method single_task needs the token {SEPARATOR}, and this tokenizer has no sentinels")
    own = locate(config.weights, weights=False) / "spiece.model" if config.spiece and config.weights else None
    if own and own.exists() and own.read_bytes() != tokenizer.model:
        text = f"warning: --spiece {config.spiece} is not the tokenizer that {config.weights} was trained with"
        print(f"train.py: {text}", file=sys.stderr)


def choose_threads(asked, model):
    """Set the CPU threads: as many as asked, or, if 0, one for a small student, else what torch took at its start.

    Below 5 M parameters threads gain little, and on a busy machine, where they wait for one another, cost far more.
    """
    if asked or model.num_parameters() < 5e6:
        torch.set_num_threads(asked or 1)


def find_output(config, name):
    """The output directory: --out or runs/NAME. Raises ValueError if it holds something and no flag says what to do."""
    out = Path(config.out or Path("runs") / name)
    require_free(out, config)
    for arm in (out / method for method in config.method):
        if arm.exists() and not arm.is_dir():
            raise ValueError(f"{arm}: not a directory")
        if config.overwrite and arm.exists() and not (arm / "config.json").exists():
            raise ValueError(f"{arm} is not the output of a run; --overwrite will not delete it")
        for path in (config.weights, config.spiece, *config.data, config.eval_data, config.test_data):
            if config.overwrite and path and Path(path).resolve().is_relative_to(arm.resolve()):
                raise ValueError(f"--overwrite would delete {arm}, and with it {path}, which this run reads")
    return out


def require_free(out, config):
    """Raise ValueError unless `out` is not there, is empty, or --resume or --overwrite says what to do with it."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: not a directory")
    if out.exists() and any(out.iterdir()) and not (config.resume or config.overwrite):
        raise ValueError(f"{out} exists: --resume goes on with it, --overwrite replaces it, --out names another")


def identify(config, rows, tokenizer=None):
    """What makes two runs the same: the settings, and digests of rows and tokenizer. It becomes config.json."""
    texts = [[r.input, r.label, r.rationale] for part in (rows.train, rows.validation, rows.test) for r in part]
    identity = asdict(config) | {
        "learning_rate": config.learning_rate,
        "metric": rows.metric,
        "rows_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
    }
    return identity | ({"tokenizer_sha256": hashlib.sha256(tokenizer.model).hexdigest()} if tokenizer else {})


def claim_output(config, out, identity):
    """Make the output directory ready: empty of what --overwrite replaces, or the same run's under --resume.

    Raises ValueError, naming the setting, if any arm there, asked for or not, was started with another.
    """
    if config.resume:
        for method in METHODS:
            require_same(out / method, identity)
        if not any((out / method / "config.json").exists() for method in config.method):
            print(f"--resume: nothing to resume in {out}; starting", file=sys.stderr)
    for method in config.method:
        if config.overwrite and (out / method).exists():
            shutil.rmtree(out / method)
    out.mkdir(parents=True, exist_ok=True)


def require_same(arm, identity):
    """Raise ValueError, naming the setting, if the directory `arm` holds a run of another identity."""
    if (arm / "config.json").exists():
        before = json.loads((arm / "config.json").read_text("utf-8"))
        for key, now in json.loads(json.dumps(identity)).items():
            if key not in FREE and not same_setting(key, before.get(key), now):
                other = {"rows_sha256": "other rows", "tokenizer_sha256": "another tokenizer"}.get(key)
                other = other or f"{setting(key, before.get(key))}, not {setting(key, now)}"
                raise ValueError(f"--resume: {arm} was started with {other}")


def same_setting(key, before, now):
    if key != "weights" or not before or not now:
        return before == now
    return Path(before) == Path(now) or (Path(now).is_dir() and Path(before).resolve() == Path(now).resolve())


def setting(key, value):
    flag = arguments.flag("lr" if key == "learning_rate" else key)
    return f"no {flag}" if value in (None, "") else f"{flag} {value}"


def write_json(path, content):
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
