"""What a run says: its first lines, metrics.jsonl on the way, and the report at the end."""

import contextlib
import json
import math
import sys
import time

import torch

from data.files import replacing
from dss.config import METHODS
from dss.rows import count_shared
from dss.run.ending import diverged, require_finite


def introduce(rows):
    """Print what there is to train, select and test on, and what of it is in two places."""
    with_rationale = sum(r.rationale is not None for r in rows.train)
    say = f"{len(rows.train):,} training row{'s' * (len(rows.train) != 1)}, {with_rationale:,} with a rationale"
    say += f" ({rows.unlabelled:,} more without a label)" if rows.unlabelled else ""
    print(f"{rows.name}: {say}; {len(rows.validation):,} validation, {len(rows.test):,} test; metric: {rows.metric}")
    places = zip(("validation", "test"), count_shared(rows), (rows.validation, rows.test))
    shared = [f"{n:,} of {len(part):,} {name} inputs" for name, n, part in places if n]
    if shared:
        print(f"{rows.name}: {' and '.join(shared)} are training inputs too", file=sys.stderr)


def say_what_was_cut(method, cut, config):
    """cut: {"inputs": number, "targets": number} of the sequences that an arm trains on."""
    longest = dict(inputs=config.max_input_length, targets=config.max_target_length)
    parts = [f"{cut[kind]:,} {kind} cut at {longest[kind]:,} tokens" for kind in longest if cut[kind]]
    if parts:
        print(f"{method}: {', '.join(parts)}; see --max-input-length, --max-target-length", file=sys.stderr)


class Log:
    """metrics.jsonl: a line for every `log_every` steps, with means over them, and one for each evaluation.

    What has been summed since the last line is `now.window`, in the arm's Progress, so that state.pt holds it and the
    line after an interruption has the means of an undisturbed run.
    """

    def __init__(self, path, now):
        """Go on behind now.step: lines of later steps, written before an interruption, are cut off."""
        self.now = now
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        with replacing(path) as file:
            file.writelines(line.encode() for line in lines if is_before(line, now.step))
        self.file = open(path, "a", encoding="utf-8")
        self.clock = time.monotonic()
        if not now.window:
            self.restart()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):  # each line was flushed; what could not be has been reported
            self.file.close()

    def restart(self):
        self.now.window = dict(losses=torch.zeros(3, dtype=torch.float64), steps=0, tokens=0, seconds=0.0)

    def add(self, losses, tokens):
        """losses: (3,) tensor of one step, left on its device until they are asked for."""
        window = self.now.window
        window["losses"] = window["losses"].to(losses.device, non_blocking=True) + losses
        window["steps"] += 1
        window["tokens"] += tokens
        self.tick()

    def tick(self):
        """The time since the last tick was spent on training."""
        before, self.clock = self.clock, time.monotonic()
        self.now.window["seconds"] += self.clock - before

    @contextlib.contextmanager
    def paused(self):
        """The time in this block is not spent on training."""
        self.tick()
        yield
        self.clock = time.monotonic()

    def means(self, step):
        """The mean losses since the last line, three floats. Waits for the device. Raises FloatingPointError."""
        means = (self.now.window["losses"] / max(self.now.window["steps"], 1)).tolist()
        if not math.isfinite(means[0]):
            raise diverged(f"the loss is {means[0]}", step)
        return means

    def require_finite(self, model, step):
        """Raise FloatingPointError unless losses and weights are finite numbers. Waits for the device."""
        self.means(step)
        require_finite(model, step)

    def write_means(self, step, rate, norm):
        """Write the means of the steps since the last time. Returns what the progress bar shows of them.

        Raises FloatingPointError if the loss is not finite.
        """
        loss, label, rationale = self.means(step)
        self.tick()
        speed = round(self.now.window["tokens"] / max(self.now.window["seconds"], 1e-9))
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


NEXT = {  # what each arm adds to the table
    "standard": "the baseline: labels alone",
    "dss": "step-by-step",
    "dss-shuffled": "the control: step-by-step with rationales of other rows",
    "single_task": "the paper's other baseline: rationale and label in one target",
}


def report(run, results):
    """Print what came of the arms: a table, the difference that rationales made, three predictions, where files are."""
    out, rows, config = run.out, run.rows, run.config
    print(f"\n{'method':<18}{'rows':>7}{'steps':>8}{'best at':>9}{'validation':>12}{'test':>8}{'tokens':>9}{'time':>9}")
    for r in results:
        test = "-" if r["test_accuracy"] is None else f"{r['test_accuracy']:.1%}"
        print(
            f"{r['method']:<18}{r['rows']:>7,}{r['steps']:>8,}{r['best_step']:>9,}{r['validation_accuracy']:>12.1%}"
            f"{test:>8}{in_short(r['tokens']):>9}{r['seconds'] // 60:>6.0f}m{r['seconds'] % 60:02.0f}s"
        )
    which = "test" if rows.test else "validation"
    by_method = {r["method"]: r[f"{which}_accuracy"] for r in results}
    for method in [m for m in by_method if m != "standard" and "standard" in by_method]:
        points = 100 * (by_method[method] - by_method["standard"])
        print(
            f"{method} - standard: {points:+.1f} points of label accuracy on {len(getattr(rows, which)):,} {which} rows"
        )
    shown = next((r for r in results if r["method"] == "dss"), results[-1])
    gold = "teacher's" if config.labels == "teacher" and which == "validation" and not config.eval_data else "gold"
    print(f"\nThe first {len(shown['samples'])} {which} rows, as the {shown['method']} student answers them:")
    for sample in shown["samples"]:
        print(f"\n  question   {indent(sample['input'])}")
        print(f"  predicted  {indent(sample['prediction']) or '(nothing)'}   ({gold}: {sample['label']})")
        if sample["rationale"]:
            print(f"  because    {indent(sample['rationale'])}")
    print(
        f"\n{out}/METHOD/ holds result.json, predictions.jsonl, metrics.jsonl, and student/ for transformers to load."
    )
    arms = [m for m in METHODS if (out / m / "result.json").exists()]
    advice = []
    for method in [m for m in NEXT if m not in arms][:2]:
        arms.append(method)
        advice.append(f"--resume --method {' '.join(arms)}   adds {NEXT[method]}")
    if advice and any(r.rationale for r in rows.train):
        print("Next: the same command with", *advice, sep="\n      ")
    if not config.data:
        seed = f" --seed {config.seed}" if config.seed else ""
        print(f"      python -m data.toy --out D{seed} writes these rows as JSONL, the form to bring your own in:")
        print("      python train.py --data F.jsonl --test-data G.jsonl --weights google/t5-v1_1-base")


def in_short(n):
    """Of at most five characters: 950, 3.2K, 1.9M."""
    return f"{n / 1e6:.1f}M" if n >= 999_950 else f"{n / 1e3:.1f}K" if n >= 1000 else str(n)


def indent(text):
    return text.replace("\n", "\n" + " " * 13)
