"""What a run keeps: its output directory, the best student so far, and a state from which an
unfinished run goes on as if it had not been interrupted."""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import torch

from data.cli import Interrupted, one_line
from data.files import locked, read_json, write_json
from dss import distributed
from dss.config import TrainConfig
from dss.log import Progress
from dss.methods import METHODS
from dss.model import T5
from dss.rows import Rows
from dss.student import Student
from dss.weights import load_t5
from tokenizer import T5Tokenizer


class Ended(Exception):
    """Training ended early. The message says why and what is kept."""

    def __init__(self, status: int, message: str, local: bool = False) -> None:
        """status: the program's exit status. local: other processes do not have this error."""
        super().__init__(message)
        self.status = status
        self.local = local


@dataclass
class Checkpoint(contextlib.AbstractContextManager):
    """In a `with` block of training: keeps the best student so far, and from time to time the state
    to go on from.

    A state that was saved in `out`, by any number of processes, is put back at once; ValueError if
    it does not fit. If training ends early, the block raises Ended, which says what is kept, or,
    for a bug, the original exception.
    """

    out: Path  # OUT/METHOD
    student: Student
    optimizer: torch.optim.Optimizer
    placement: distributed.Replicas
    config: TrainConfig

    def __post_init__(self) -> None:
        self.state_path = self.out / self.placement.state_name
        self.progress = self.load_progress()
        self.saved_step = self.progress.step
        self.saved_time = time.monotonic()

    def load_progress(self) -> Progress:
        saved = self.placement.load_state(self.state_path, self.student.model, self.optimizer)
        if saved and (self.out / "best.json").exists():  # newer than the state, or as old
            saved |= read_json(self.out / "best.json")
        if saved and saved.keys() != vars(Progress()).keys():
            raise ValueError(
                f"{self.state_path}: the state of a run by another version of this program; "
                "--overwrite starts anew"
            )
        return Progress(**saved)

    def whole_student(self) -> Student:
        """The student as it is now, with all its weights, in every process. Raises
        FloatingPointError if a weight is not finite: a diverged student is never evaluated, and
        never saved."""
        model = self.placement.whole(self.student.model)
        finite = [parameter.isfinite().all() for parameter in model.parameters()]
        if not torch.stack(finite).all():
            raise FloatingPointError("a weight is no longer a finite number")
        return replace(self.student, model=model)

    def keep_if_best(self, student: Student, accuracy: float, score: float) -> None:
        """Keep a student with this accuracy and score on the validation rows, if none had a higher
        score. Of equals the last is kept, which has learned longer."""
        self.progress.evaluated = self.progress.step
        if score < self.progress.best_score:
            return
        best = {"best_step": self.progress.step, "best_accuracy": accuracy, "best_score": score}
        vars(self.progress).update(best)
        if distributed.is_first():
            student.save(self.out / "student")
            write_json(self.out / "best.json", best)
        distributed.wait_for_all()

    def load_best(self) -> T5:
        """The model that was best on the validation rows."""
        return load_t5(self.out / "student").to(self.placement.device)

    def keep_state(self, at_once: bool = False) -> None:
        """Save the state if it is time to, after --save-minutes or an evaluation, or `at_once`."""
        if self.config.save_minutes:
            due = time.monotonic() - self.saved_time > 60 * self.config.save_minutes
        else:
            due = self.progress.evaluated == self.progress.step
        if distributed.anyone(due or at_once) and self.saved_step != self.progress.step:
            self.placement.save_state(
                self.state_path, self.student.model, self.optimizer, vars(self.progress)
            )
            self.saved_step = self.progress.step
            self.saved_time = time.monotonic()

    def __exit__(self, _: type | None, error: BaseException | None, __: object) -> None:
        if error is None:
            return
        if isinstance(error, Interrupted):
            try:
                self.whole_student()  # a diverged one is not kept
                self.keep_state(at_once=True)
            except (FloatingPointError, OSError) as second_error:
                error = second_error
        line = one_line(error)
        local = True
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if isinstance(error, Interrupted):
            line = f"{self.out.name} interrupted at step {self.progress.step:,}"
            raise Ended(130, f"{line}; {self.what_is_kept()}, --resume goes on")
        if out_of_memory or "DefaultCPUAllocator" in line:
            line = "out of memory; --micro-batch N computes the same steps N rows at a time"
        elif isinstance(error, FloatingPointError):
            line += f" by step {self.progress.step:,}; try a smaller --lr, with --overwrite"
            local = False
        elif distributed.size() > 1 and distributed.has_lost_a_process(error):
            line = f"another process has ended; --resume goes on from step {self.saved_step:,}"
        elif not isinstance(error, OSError):
            return  # a bug, which keeps its traceback
        raise Ended(1, f"{line}; {self.what_is_kept()}", local) from None

    def what_is_kept(self) -> str:
        if self.progress.best_step:
            return f"{self.out}/student is the best so far"
        return f"{self.out} has no student, because none was evaluated"


def forget_state(out: Path) -> None:
    """Delete from OUT/METHOD what only an unfinished run needs."""
    for path in [*out.glob("state*"), out / "best.json"]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# ---- The output directory: found, claimed, and compared with what it holds -----------------------

# What a resumed run may change: the machine, the place of its output, that of its rows if they are
# the same rows, and how its learning rate is written ("learning_rate" holds the value).
MAY_CHANGE = {
    "data", "eval_data", "test_data", "spiece", "method", "device", "threads", "out", "resume",
    "overwrite", "checkpoint_activations", "save_minutes", "lr",
}  # fmt: skip


def find_output(config: TrainConfig, name: str) -> Path:
    """The output directory: --out or runs/NAME. Raises ValueError if it holds something and no flag
    says what to do, or if --overwrite would delete what is not the output of a run."""
    out = Path(config.out or Path("runs") / name)
    require_free(out, config)
    inputs = [config.weights, config.spiece, *config.data, config.eval_data, config.test_data]
    for directory in [out / method for method in config.method]:
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"{directory}: not a directory")
        if config.overwrite and directory.exists():
            if not (directory / "config.json").exists():
                raise ValueError(
                    f"{directory} is not the output of a run; --overwrite will not delete it"
                )
            for path in inputs:
                if path and Path(path).resolve().is_relative_to(directory.resolve()):
                    raise ValueError(
                        f"--overwrite would delete {directory}, and with it {path}, "
                        "which this run reads"
                    )
    return out


def require_free(out: Path, config: TrainConfig) -> None:
    """Raise ValueError unless `out` does not exist, is empty, or --resume or --overwrite says what
    to do with it."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out}: not a directory")
    if any(out.iterdir()) and not (config.resume or config.overwrite):
        raise ValueError(
            f"{out} exists: --resume goes on with it, --overwrite replaces it, --out names another"
        )


def identify(config: TrainConfig, rows: Rows, tokenizer: T5Tokenizer) -> dict:
    """What makes two runs the same: the settings, and digests of rows and tokenizer. It becomes
    config.json."""
    digest = hashlib.sha256()
    for record in chain(rows.train, rows.validation, rows.test):
        digest.update(json.dumps([record.input, record.label, record.rationale]).encode())
    return asdict(config) | {
        "learning_rate": config.learning_rate,
        "metric": rows.metric,
        "rows_sha256": digest.hexdigest(),
        "tokenizer_sha256": hashlib.sha256(tokenizer.model).hexdigest(),
    }


@contextlib.contextmanager
def claimed(out: Path, config: TrainConfig, rows: Rows, tokenizer: T5Tokenizer) -> Iterator[None]:
    """Hold the output directory for the block; the first process holds it for all.

    With --overwrite, old output is deleted; with --resume, it must be of the same run. Raises
    ValueError, naming the setting, if any method there, asked for or not, was trained with another,
    and BlockingIOError if another process trains there.
    """
    distributed.wait_for_all()  # all have looked at what is there
    with contextlib.ExitStack() as held:
        if distributed.is_first():
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out / "run"))
            identity = identify(config, rows, tokenizer)
            if config.resume:
                require_same_run(out, identity)
            for method in config.method:
                prepare_directory(out / method, config, identity | {"method": method})
        distributed.wait_for_all()
        yield


def prepare_directory(directory: Path, config: TrainConfig, identity: dict) -> None:
    if config.overwrite and directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(exist_ok=True)
    if (directory / "result.json").exists():
        forget_state(directory)
    else:
        write_json(directory / "config.json", identity)


def require_same_run(out: Path, identity: dict) -> None:
    """Raise ValueError, naming the setting, if a method in `out` was trained as another run."""
    identity = json.loads(json.dumps(identity))
    for method in METHODS:
        path = out / method / "config.json"
        before = read_json(path) if path.exists() else identity
        for key in sorted(identity.keys() - MAY_CHANGE):
            if before.get(key) != identity[key]:
                raise ValueError(
                    f"--resume: {path.parent} was started with {key} {before.get(key)!r}, not "
                    f"{identity[key]!r}; another --out starts anew"
                )
