"""What extract.py says: the header, the progress bar, the summary, and the counts behind them."""

import sys
import time
from collections import Counter

from tqdm import tqdm


class Tally:
    """Counts of one start, and how often the teacher was right in the whole output."""

    def __init__(self, price_in, price_out):
        self.price_in, self.price_out = price_in, price_out  # $ per million tokens
        self.kept, self.retries, self.start = 0, 0, time.monotonic()
        self.kinds, self.tokens = Counter(), Counter()  # of errors; prompt, completion, cached
        self.warned = set()
        self.right = Counter()  # of answered rows with a gold label: True, False

    def add(self, kind, usage, retries, correct):
        """One row: its kind of error or None, its tokens, and whether its label is the gold one (None: unknown)."""
        if kind is None:
            self.kept += 1
        else:
            self.kinds[kind] += 1
        self.tokens.update(usage)
        self.retries += retries
        self.right[correct] += 1

    def warn(self, what, line):
        """Say it, once for each `what`. Any thread may."""
        if what not in self.warned:
            self.warned.add(what)
            tqdm.write(f"warning: {line}", file=sys.stderr)

    @property
    def failed(self):
        return self.kinds.total() - self.kinds["incorrect"]

    @property
    def dollars(self):
        return (self.tokens["prompt"] * self.price_in + self.tokens["completion"] * self.price_out) / 1e6

    def bar(self):
        """For the progress bar, short."""
        unparsed = self.kinds["unparsed"] + self.kinds["label_invalid"]
        parts = [f"{self.kept:,} ok", f"{unparsed:,} unparsed", f"{self.failed - unparsed:,} failed"]
        parts += [f"{self.retries:,} retries", f"{self.tokens['completion'] / self.seconds:,.0f} tok/s"]
        return ", ".join(parts + [f"${self.dollars:,.2f}"] * bool(self.dollars))

    @property
    def seconds(self):
        return max(time.monotonic() - self.start, 1e-3)

    def summary(self):
        """Lines for the end: rows, accuracy, tokens and cost."""
        minutes, seconds = divmod(round(self.seconds), 60)
        asked = self.kept + self.kinds.total()
        line = f"asked {asked:,} rows in {minutes}m{seconds:02}s: {self.kept:,} ok"
        line += f", {self.kinds['incorrect']:,} not right and left out" if self.kinds["incorrect"] else ""
        line += f", {self.failed:,} failed" + (f" ({listed(self.kinds)})" if self.failed else "")
        yield line + f"; {self.retries:,} retries"
        gold = self.right[True] + self.right[False]
        if gold:
            share = self.right[True] / gold
            yield f"teacher right on {self.right[True]:,} of {gold:,} answered rows with a gold label ({share:.1%})"
        if self.tokens.total():
            cached = f" ({self.tokens['cached']:,} of them cached)" if self.tokens["cached"] else ""
            cost = f"; ${self.dollars:,.2f}" if self.price_in or self.price_out else ""
            yield f"tokens: {self.tokens['prompt']:,} in{cached}, {self.tokens['completion']:,} out{cost}"


def listed(kinds):
    """`truncated 5, unparsed 2` of a Counter of kinds of error."""
    return ", ".join(f"{kind} {n:,}" for kind, n in sorted(kinds.items()) if n)


def say(line):
    print(line, file=sys.stderr)


def say_header(run):
    config = run.config
    key = "" if "Authorization" in run.address.headers else f"; no key (${config.api_key_env} is not set)"
    say(f"teacher: {run.address.url}, {config.endpoint}, {config.model}{key}")
    say(f"prompt:  {config.prompt} (sha256 {run.prompt.sha256[:12]}), {len(run.prompt.exemplars)} exemplars")
    resumed = f", {run.resumed:,} of them done or failed before" if run.resumed else ""
    say(f"rows:    {len(run.ids):,} in {config.input}{resumed}")
    if others := len(run.done - run.ids.keys()):
        say(f"         {others:,} more in {config.output} that are not in this input stay there")


def say_summary(run):
    """Say what came of it. Returns how many rows of the input failed, in this start or before."""
    config, kinds = run.config, Counter(run.failed[name] for name in run.ids if name in run.failed)
    left_out = kinds.pop("incorrect", 0)
    if run.resumed == len(run.ids):
        say("nothing left to ask")
    for line in run.tally.summary() if run.resumed < len(run.ids) else ():
        say(line)
    say(f"{config.output}: {sum(name in run.done for name in run.ids):,} of {len(run.ids):,} rows")
    if kinds or left_out:
        listing = ", ".join(filter(None, [listed(kinds), f"left out as not right {left_out:,}" if left_out else ""]))
        say(f"{config.errors_path}: {listing}" + ("; --retry-failed asks failed rows again" if kinds else ""))
    if run.done:
        say(f"next: python train.py --data {config.output}")
    return kinds.total()


def say_estimate(run, rows, characters):
    """Print what asking may cost, on stdout: it is what a dry run is for."""
    config, requests = run.config, rows * run.config.n
    replies = [len(run.prompt.reply(e)) / 3 for e in run.prompt.exemplars] or [config.max_tokens]
    usual = round(requests * min(sum(replies) / len(replies), config.max_tokens))
    sent, most = characters * config.n // 3, requests * config.max_tokens
    print(f"rows: {rows:,}; requests: {requests:,}")
    print(f"tokens, at 3 characters each (English prose has 4 to 5): {sent:,} in;")
    print(f"        {usual:,} out if answers are as long as the exemplars', at most {most:,}")
    if config.price_in or config.price_out:
        usual, most = ((sent * config.price_in + out * config.price_out) / 1e6 for out in (usual, most))
        print(f"cost: about ${usual:,.2f}, at most ${most:,.2f}")
    else:
        print("cost: give --price-in and --price-out, $ per million tokens")
