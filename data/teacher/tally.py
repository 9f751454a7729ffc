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
        self.retries, self.start = 0, time.monotonic()
        self.kinds, self.tokens = Counter(), Counter()  # of errors, None for answered rows; prompt, completion, cached
        self.warned = set()

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

    @property
    def failed(self):
        return self.kinds.total() - self.kinds[None] - self.kinds["incorrect"]

    @property
    def dollars(self):
        return (self.tokens["prompt"] * self.price_in + self.tokens["completion"] * self.price_out) / 1e6

    @property
    def seconds(self):
        return max(time.monotonic() - self.start, 1e-3)

    def bar(self, pace) -> str:
        """For the progress bar, short."""
        parts = [f"{self.kinds[None]:,} ok", f"{self.failed:,} failed", f"{self.retries:,} retries"]
        if pace.refused and pace.interval > 0.01:
            parts.append(f"{60 / pace.interval:,.0f}/min")
        parts += [f"{self.tokens['completion'] / self.seconds:,.0f} tok/s"]
        return ", ".join(parts + [f"${self.dollars:,.2f}"] * bool(self.dollars))

    def summary(self, pace, right):
        """Lines for the end: rows, accuracy (`right` counts True and False), pace, tokens and cost."""
        minutes, seconds = divmod(round(self.seconds), 60)
        line = f"asked {self.kinds.total():,} rows in {minutes}m{seconds:02}s: {self.kinds[None]:,} ok"
        line += f", {self.kinds['incorrect']:,} not right and left out" if self.kinds["incorrect"] else ""
        line += f", {self.failed:,} failed" + (f" ({listed(self.kinds)})" if self.failed else "")
        yield line + f"; {self.retries:,} retries"
        if gold := right[True] + right[False]:
            share = right[True] / gold
            yield f"teacher right on {right[True]:,} of {gold:,} answered rows with a gold label ({share:.1%})"
        if pace.refused:
            rate = 60 * (self.kinds.total() + self.retries) / self.seconds
            yield f"pace: {rate:,.0f} requests a minute got through; {pace.refused:,} came too early (429)"
        if self.tokens.total():
            cached = f" ({self.tokens['cached']:,} of them cached)" if self.tokens["cached"] else ""
            cost = f"; ${self.dollars:,.2f}" if self.price_in or self.price_out else ""
            yield f"tokens: {self.tokens['prompt']:,} in{cached}, {self.tokens['completion']:,} out{cost}"


def listed(kinds):
    """`truncated 5, unparsed 2` of a Counter of kinds of error."""
    return ", ".join(f"{kind} {n:,}" for kind, n in sorted((k, n) for k, n in kinds.items() if k and k != "incorrect"))


def print_header(run):
    config, address = run.config, run.address
    where = ", ".join(config.batch_replies) or address.url or "a batch"
    key = "" if "Authorization" in address.headers or config.header else f"; no key (${config.api_key_env} is not set)"
    proxy = f", through the proxy {address.proxy[0]}:{address.proxy[1]}" if address.proxy else ""
    print_line(f"teacher: {where}, {config.endpoint}, {config.model}{key}{proxy}")
    print_line(f"prompt:  {config.prompt} (sha256 {run.prompt.sha256[:12]}), {len(run.prompt.exemplars)} exemplars")
    kept = f", {run.kept:,} of them with a rationale, which is kept" if run.kept else ""
    resumed = f", {run.resumed:,} of them done or failed before" if run.resumed else ""
    print_line(f"rows:    {len(run.ids):,} in {config.input}{kept}{resumed}")
    if others := len(run.state.done - run.ids.keys()):
        print_line(f"         {others:,} more in {config.output} that are not in this input stay there")


def print_summary(run) -> int:
    """Say what came of it. Returns how many rows of the input are not in the output, now or since an earlier start."""
    config, kinds = run.config, Counter(run.state.failed[name] for name in run.ids if name in run.state.failed)
    left_out, done = kinds.pop("incorrect", 0), sum(name in run.state.done for name in run.ids)
    if run.resumed == len(run.ids):
        print_line("nothing left to ask")
    for line in run.tally.summary(run.pace, run.state.right) if run.tally.kinds.total() else ():
        print_line(line)
    print_line(f"{config.output}: {done:,} of {len(run.ids):,} rows")
    if kinds or left_out:
        listing = ", ".join(filter(None, [listed(kinds), f"left out as not right {left_out:,}" if left_out else ""]))
        print_line(f"{config.errors_path}: {listing}" + ("; --retry-failed asks failed rows again" if kinds else ""))
    missing = len(run.ids) - done - left_out - kinds.total()
    if missing and not (run.aborted or run.interrupted):
        if run.replies:
            print_line(f"{missing:,} rows have no reply yet; --batch-requests writes what is to be asked")
        else:
            run.aborted = f"{missing:,} rows were not asked: did {config.input} change meanwhile?"
    if run.state.done and not (run.aborted or run.interrupted):
        errors = f" {config.errors_path}" if kinds or left_out else ""
        print_line(f"next: python train.py --data {config.output}" + errors)
        if errors:
            print_line("      (rows of the errors file that have a gold label train the label task)")
    return kinds.total() + missing


def print_estimate(run, rows, characters):
    """Print what asking may cost, on stdout: it is what a dry run is for."""
    config, requests = run.config, rows * run.config.n
    replies = [len(run.prompt.reply(e)) / 3 for e in run.prompt.exemplars] or [config.max_tokens]
    usual = round(requests * min(sum(replies) / len(replies), config.max_tokens))
    sent, most = characters * config.n // 3, requests * config.max_tokens
    kept = len(run.ids) - rows
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
