"""What extract.py prints: the header, the progress bar, the summary, and the counts behind them."""

import sys
import time
from collections import Counter

from tqdm import tqdm


def print_line(line: str):
    """A line on stderr, above a progress bar; nothing that a server sent may control the terminal."""
    tqdm.write("".join(c if c.isprintable() else " " for c in line), file=sys.stderr)


class Tally:
    """Counts of one start."""

    def __init__(self, price_in: float, price_out: float):
        self.price_in, self.price_out = price_in, price_out  # $ per million tokens
        self.retries, self.start, self.warned = 0, time.monotonic(), set()
        self.kinds, self.tokens = Counter(), Counter()  # of errors, None for answered rows; prompt, completion, cached

    def add(self, kind: str | None, usage: dict, retries: int):
        """One row: its kind of error or None, and its tokens."""
        self.kinds[kind] += 1
        self.tokens.update(usage)
        self.retries += retries

    def warn(self, what: str, line: str):
        """Print a warning, once for each `what`."""
        if what not in self.warned:
            self.warned.add(what)
            print_line(f"warning: {line}")

    def counts(self):
        """(rows without a usable answer, seconds, dollars)"""
        failed = self.kinds.total() - self.kinds[None] - self.kinds["incorrect"]
        dollars = (self.tokens["prompt"] * self.price_in + self.tokens["completion"] * self.price_out) / 1e6
        return failed, max(time.monotonic() - self.start, 1e-3), dollars

    def bar(self, pace) -> str:
        """For the progress bar, short."""
        failed, seconds, dollars = self.counts()
        parts = [f"{self.kinds[None]:,} ok", f"{failed:,} failed", f"{self.retries:,} retries"]
        if pace.refused and pace.interval > 0.01:
            parts.append(f"{60 / pace.interval:,.0f}/min")
        parts.append(f"{self.tokens['completion'] / seconds:,.0f} tok/s")
        return ", ".join(parts + [f"${dollars:,.2f}"] * bool(dollars))

    def summary(self, pace, right):
        """Lines for the end: rows, accuracy (`right` counts True and False), pace, tokens and cost."""
        failed, seconds, dollars = self.counts()
        line = (
            f"asked {self.kinds.total():,} rows in {seconds // 60:.0f}m{seconds % 60:02.0f}s: {self.kinds[None]:,} ok"
        )
        line += f", {self.kinds['incorrect']:,} not right and left out" if self.kinds["incorrect"] else ""
        yield (
            f"{line}, {failed:,} failed"
            + (f" ({listed(self.kinds)})" if failed else "")
            + f"; {self.retries:,} retries"
        )
        if gold := right[True] + right[False]:
            share = f"({right[True] / gold:.1%})"
            yield f"teacher right on {right[True]:,} of {gold:,} answered rows with a gold label {share}"
        if pace.refused:
            rate = 60 * (self.kinds.total() + self.retries) / seconds
            yield f"pace: {rate:,.0f} requests a minute got through; {pace.refused:,} came too early (429)"
        if self.tokens.total():
            cached = f" ({self.tokens['cached']:,} of them cached)" if self.tokens["cached"] else ""
            cost = f"; ${dollars:,.2f}" if self.price_in or self.price_out else ""
            yield f"tokens: {self.tokens['prompt']:,} in{cached}, {self.tokens['completion']:,} out{cost}"


def listed(kinds):
    """`truncated 5, unparsed 2` of a Counter of kinds of error."""
    return ", ".join(f"{kind} {n:,}" for kind, n in sorted((k, n) for k, n in kinds.items() if k and k != "incorrect"))


def print_header(run):
    config, teacher = run.config, run.teacher
    key = "" if "Authorization" in teacher.headers or config.header else f"; no key (${config.api_key_env} is not set)"
    proxy = f", through the proxy {teacher.proxy[0]}:{teacher.proxy[1]}" if teacher.proxy else ""
    where = (
        ", ".join(config.batch_replies) or f"{teacher.url or 'a batch'}, {config.endpoint}, {config.model}{key}{proxy}"
    )
    print_line(f"teacher: {where}")
    print_line(f"prompt:  {config.prompt} (sha256 {run.prompt.sha256[:12]}), {len(run.prompt.exemplars)} exemplars")
    kept = f", {run.kept:,} of them with a rationale, which is kept" if run.kept else ""
    resumed = f", {run.resumed:,} of them done or failed before" if run.resumed else ""
    print_line(f"rows:    {len(run.ids):,} in {config.input}{kept}{resumed}")
    if others := len(run.state.done - run.ids.keys()):
        print_line(f"         {others:,} more in {config.output} that are not in this input stay there")


def print_summary(run) -> int:
    """Say what came of it. Returns how many rows of the input are not in the output, now or since an earlier start."""
    config, state = run.config, run.state
    kinds = Counter(state.failed[name] for name in run.ids if name in state.failed)
    done, left_out, unasked = sum(name in state.done for name in run.ids), kinds["incorrect"], len(run.ids)
    unasked -= done + kinds.total()
    if run.resumed == len(run.ids):
        print_line("nothing left to ask")
    for line in run.tally.summary(run.pace, state.right) if run.tally.kinds else ():
        print_line(line)
    print_line(f"{config.output}: {done:,} of {len(run.ids):,} rows")
    if kinds.total():
        again = "; --retry-failed asks failed rows again" if kinds.total() > left_out else ""
        out = [listed(kinds)] * bool(again) + [f"left out as not right {left_out:,}"] * bool(left_out)
        print_line(f"{config.errors_path}: {', '.join(out)}{again}")
    if run.aborted or run.interrupted:
        return kinds.total()
    if unasked and run.replies:
        print_line(f"{unasked:,} rows have no reply yet; --batch-requests writes what is to be asked")
    elif unasked:
        run.aborted = f"{unasked:,} rows were not asked: did {config.input} change meanwhile?"
    elif state.done:
        errors = (
            f" {config.errors_path}  (its rows train the label task, by their gold labels)" if kinds.total() else ""
        )
        print_line(f"next: python train.py --data {config.output}{errors}")
    return kinds.total() - left_out + unasked


def print_estimate(run, rows, characters):
    """Print what asking may cost, on stdout: it is what a dry run is for."""
    config, requests, kept = run.config, rows * run.config.n, len(run.ids) - rows
    replies = [len(run.prompt.reply(e)) / 3 for e in run.prompt.exemplars] or [config.max_tokens]
    usual = round(requests * min(sum(replies) / len(replies), config.max_tokens))
    sent, most = characters * config.n // 3, requests * config.max_tokens
    print(
        f"rows: {rows:,}; requests: {requests:,}" + (f"; {kept:,} rows have a rationale and are kept" if kept else "")
    )
    print(f"tokens, at 3 characters each (English prose has 4 to 5): {sent:,} in;")
    print(f"        {usual:,} out if answers are as long as the exemplars', at most {most:,}")
    if config.price_in or config.price_out:
        usual, most = ((sent * config.price_in + out * config.price_out) / 1e6 for out in (usual, most))
        print(f"cost: about ${usual:,.2f}, at most ${most:,.2f}")
    else:
        print("cost: give --price-in and --price-out, $ per million tokens")
