"""The output directory of a run: found, claimed, and compared with what it holds."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from data.arguments import flag
from data.files import locked, read_json
from dss.config import METHODS, TrainConfig
from dss.rows import Rows
from dss.run import parallel
from tokenizer import T5Tokenizer

# What a resumed run may change: the machine, the place of its output, and that of its rows if they are the same rows.
FREE = {"data", "eval_data", "test_data", "spiece", "method", "device", "threads", "out", "resume", "overwrite"}
FREE |= {"checkpoint_activations", "save_minutes", "plan", "processes", "device_gb", "lr"}  # identify() has lr's value


def find_output(config: TrainConfig, name: str) -> Path:
    """The output directory: --out or runs/NAME. Raises ValueError if it holds something and no flag says what to do."""
    out = Path(config.out or Path("runs") / name)
    require_free(out, config)
    for directory in (out / method for method in config.method):
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"{directory}: not a directory")
        if config.overwrite and directory.exists() and not (directory / "config.json").exists():
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
def claimed(out: Path, config: TrainConfig, identity: dict) -> Iterator[None]:
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
        parallel.wait_for_all()
        yield


def require_same(directory: Path, identity: dict) -> None:
    """Raise ValueError, naming the setting, if OUT/METHOD holds a run of another identity."""
    if (directory / "config.json").exists():
        before = read_json(directory / "config.json")
        for key, now in json.loads(json.dumps(identity)).items():
            if key not in FREE and not same_setting(key, before.get(key), now):
                other = {"rows_sha256": "other rows", "tokenizer_sha256": "another tokenizer"}.get(key)
                other = other or f"{setting(key, before.get(key))}, not {setting(key, now)}"
                raise ValueError(f"--resume: {directory} was started with {other}; another --out starts anew")


def same_setting(key: str, before: object, now: object) -> bool:
    if key == "weights" and before and now:
        return Path(before).resolve() == Path(now).resolve()
    return before == now or (key == "dtype" and now == "auto")


def setting(key: str, value: object) -> str:
    name = flag("lr" if key == "learning_rate" else key)
    return f"no {name}" if value in (None, "") else f"{name} {value}"


def forget_state(out: Path) -> None:
    """Delete from OUT/METHOD what only an unfinished run needs."""
    for path in [*out.glob("state*"), out / "best.json"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
