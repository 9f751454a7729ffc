"""What surrounds training: the output directory, the log, interruption, and the report at the end."""

import hashlib
import json
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch

from data.jsonl import replacing

# What a resumed run may change: where it runs and lies, and where rows come from, as long as they are the same rows.
FREE = {"data", "eval_data", "test_data", "spiece", "method", "device", "threads", "out", "resume", "overwrite"}


def choose_device(name):
    """torch.device for "auto", "cpu" or "cuda". Raises ValueError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def find_output(config, name):
    """The output directory: --out or runs/NAME. Raises ValueError if it holds something and no flag says what to do."""
    out = Path(config.out or Path("runs") / name)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: not a directory")
    if out.exists() and any(out.iterdir()) and not (config.resume or config.overwrite):
        raise ValueError(f"{out} exists: --resume goes on with it, --overwrite replaces it, --out names another")
    for method in config.method:
        if config.overwrite and (out / method).exists() and not (out / method / "config.json").exists():
            raise ValueError(f"{out / method} is not the output of a run; --overwrite will not delete it")
    return out


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

    Raises ValueError, naming the setting, if an arm there was started with another.
    """
    for method in config.method if config.resume else []:
        require_same(out / method, identity)
    for method in config.method:
        if config.overwrite and (out / method).exists():
            shutil.rmtree(out / method)
    out.mkdir(parents=True, exist_ok=True)


def require_same(arm, identity):
    """Raise ValueError, naming the setting, if the directory `arm` holds a run of another identity."""
    if (arm / "config.json").exists():
        before = json.loads((arm / "config.json").read_text("utf-8"))
        for key, now in json.loads(json.dumps(identity)).items():
            if key not in FREE and before.get(key) != now:
                other = (
                    "other rows or tokenizer " if key.endswith("sha256") else f"--{key} {before.get(key)}, not {now} "
                )
                raise ValueError(f"--resume: {arm} was started with {other.strip()}")


class Log:
    """metrics.jsonl: a line for every `log_every` steps, with means over them, and one for each evaluation."""

    def __init__(self, path, step):
        """Go on behind `step`: lines of later steps, written before an interruption, are cut off."""
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        with replacing(path) as file:
            file.writelines(line.encode() for line in lines if is_before(line, step))
        self.file = open(path, "a", encoding="utf-8")
        self.restart()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def restart(self):
        self.losses, self.tokens, self.clock = [], 0, time.monotonic()

    def add(self, losses, tokens):
        """losses: (3,) tensor of one step, left on its device until they are asked for."""
        self.losses.append(losses)
        self.tokens += tokens

    def write_means(self, step, rate, norm):
        """Write the means of the steps since the last time. Returns what the progress bar shows of them.

        Raises FloatingPointError if the loss is not finite.
        """
        loss, label, rationale = torch.stack(self.losses).mean(0).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} by step {step}; a smaller --lr may help")
        speed = round(self.tokens / (time.monotonic() - self.clock))
        losses = dict(loss=loss, label_loss=label, rationale_loss=rationale)
        self.write(step, **losses, learning_rate=rate, gradient_norm=norm.item(), tokens_per_second=speed)
        self.restart()
        return f"loss {loss:.3f}, {speed:,} tokens/s"

    def write(self, step, **figures):
        self.file.write(json.dumps({"step": step} | figures) + "\n")
        self.file.flush()


def is_before(line, step):
    try:
        return json.loads(line)["step"] <= step
    except ValueError:  # the torn last line of a killed run
        return False


def write_json(path, content):
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def report(out, rows, results):
    """Print what came of the arms: a table, the difference that rationales made, three predictions, where files are."""
    print(f"\n{'method':<14}{'rows':>8}{'steps':>8}{'best at':>9}{'validation':>12}{'test':>8}{'tokens':>9}{'time':>9}")
    for r in results:
        test = "-" if r["test_accuracy"] is None else f"{r['test_accuracy']:.1%}"
        print(
            f"{r['method']:<14}{r['rows']:>8,}{r['steps']:>8,}{r['best_step']:>9,}{r['validation_accuracy']:>12.1%}"
            f"{test:>8}{r['tokens'] / 1e6:>8.1f}M{r['seconds'] // 60:>6.0f}m{r['seconds'] % 60:02.0f}s"
        )
    which = "test" if rows.test else "validation"
    by_method = {r["method"]: r[f"{which}_accuracy"] for r in results}
    for method in [m for m in by_method if m != "standard" and "standard" in by_method]:
        points = 100 * (by_method[method] - by_method["standard"])
        print(
            f"{method} - standard: {points:+.1f} points of label accuracy on {len(getattr(rows, which)):,} {which} rows"
        )
    shown = next((r for r in results if r["method"] == "dss"), results[-1])
    print(f"\nThe first {len(shown['samples'])} {which} rows, as the {shown['method']} student answers them:")
    for sample in shown["samples"]:
        print(f"\n  question   {indent(sample['input'])}")
        print(f"  predicted  {indent(sample['prediction'])}   (gold: {sample['label']})")
        if sample["rationale"]:
            print(f"  because    {indent(sample['rationale'])}")
    print(
        f"\n{out}/METHOD/ holds result.json, predictions.jsonl, metrics.jsonl, and student/ for transformers to load."
    )
    print(
        "Next: the same command with --resume --method dss-shuffled trains the control, rationales of other rows, and"
    )
    print("      with --resume --method single_task the paper's other baseline.")
    if rows.name == "toy":
        print("      python -m data.toy --out D writes these rows as JSONL, the form in which to bring your own:")
        print("      python train.py --data F.jsonl --test_data G.jsonl --weights google/t5-v1_1-base")


def indent(text):
    return text.replace("\n", "\n" + " " * 13)
