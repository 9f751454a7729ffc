"""What extract.py counts and prints."""

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable

from tqdm import tqdm

from data.jsonl import Record
from data.output import Done
from data.requests import Requests, characters


def print_line(line: str) -> None:
    """A line on stderr, above a progress bar, without control characters of a server."""
    tqdm.write("".join(c if c.isprintable() else " " for c in line), file=sys.stderr)


class Tally:
    """Counts what came of this start."""

    def __init__(self, price_in: float, price_out: float, max_cost: float) -> None:
        """price_in, price_out: $ per million tokens. max_cost: $, 0 for no limit."""
        self.price_in = price_in
        self.price_out = price_out
        self.max_cost = max_cost
        self.start = time.monotonic()
        self.kinds: Counter = Counter()  # of errors; None: answered
        self.spent: Counter = Counter()  # tokens
        self.retries = 0
        self.rationales: Counter = Counter()  # their hashes
        self.warned: set[str] = set()
        self.lock = threading.Lock()

    def progress_bar(self, total: int, to_ask: int) -> tqdm:
        self.bar = tqdm(
            total=total,
            initial=total - to_ask,
            bar_format="{n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}",
            mininterval=0.5 if sys.stderr.isatty() else 30,  # in a log file a line is a line
            disable=not to_ask,
        )
        return self.bar

    def warn(self, kind: str, message: str) -> None:
        """Print a warning, once for each kind."""
        if kind not in self.warned:
            self.warned.add(kind)
            print_line(f"warning: {message}")

    def add(self, row: Record, kind: str | None) -> None:
        if row.teacher:  # else it is kept as it came
            self.kinds[kind] += 1
            self.retries += row.teacher["attempts"] - 1
            if kind is None:
                self.rationales[hash(row.rationale)] += 1
        good = self.kinds[None]
        counts = f"{good:,} ok, {self.kinds.total() - good:,} left out, {self.retries:,} retries"
        self.bar.set_postfix_str(counts + self.dollars(self.spent), refresh=False)
        self.bar.update(1)

    def pay(self, tokens: dict[str, int]) -> str:
        """Count the tokens of a reply. Returns why no request may follow, or ""."""
        with self.lock:
            self.spent.update(tokens)
            if 0 < self.max_cost <= self.cost(self.spent):
                return f"the known cost{self.dollars(self.spent)} has reached --max-cost"
        return ""

    def cost(self, tokens: dict[str, int]) -> float:
        """In $."""
        cost = tokens["prompt"] * self.price_in + tokens["completion"] * self.price_out
        return cost / 1e6

    def dollars(self, tokens: dict[str, int]) -> str:
        """`; $1.23`, or nothing where no prices are given."""
        return f"; ${self.cost(tokens):,.2f}" if self.price_in or self.price_out else ""

    def print_summary(self, state: dict[str, Done]) -> None:
        asked = self.kinds.total()
        if not asked:
            return
        minutes, seconds = divmod(round(time.monotonic() - self.start), 60)
        good = self.kinds.pop(None, 0)
        counts = f"{good:,} ok, {asked - good:,} left out"
        if asked > good:
            counts += f" ({listed(self.kinds)})"
        time_taken = f"{minutes}m{seconds:02}s"
        print_line(f"asked {asked:,} rows in {time_taken}: {counts}; {self.retries:,} retries")
        judged = [done.correct for done in state.values() if done.correct is not None]
        if judged:
            right = f"{sum(judged):,} of {len(judged):,} answered rows with a gold label"
            print_line(f"teacher right on {right} ({sum(judged) / len(judged):.1%})")
        tokens = f"{self.spent['prompt']:,} in ({self.spent['cached']:,} cached)"
        tokens += f", {self.spent['completion']:,} out"
        print_line(f"tokens: {tokens}{self.dollars(self.spent)}")
        alike = max(self.rationales.values(), default=0)
        if alike > 2 and alike > good / 2:
            what = "rows have the same rationale, word for word"
            print_line(f"warning: {alike:,} of {good:,} {what}")

    def print_estimate(self, requests: Requests, rows: Iterable[Record]) -> None:
        """Print the first request and what asking may cost, on stdout."""
        bodies = [requests.body(row.input, row.label) for row in rows if row.rationale is None]
        if bodies:
            print(json.dumps(bodies[0], indent=2, ensure_ascii=False))
        replies = [len(requests.prompt.reply(each)) for each in requests.prompt.exemplars]
        length = sum(replies) / max(len(replies), 1)
        tokens = {
            "prompt": sum(characters(body) for body in bodies) // 3,
            "completion": round(len(bodies) * length / 3),
        }
        about = f"about {tokens['prompt']:,} in, {tokens['completion']:,} out"
        print(f"requests: {len(bodies):,}; tokens, at 3 characters each: {about}", end="")
        print(f" if answers are as long as the exemplars'{self.dollars(tokens)}")


def listed(kinds: Counter) -> str:
    """`truncated 5, unparsed 2`"""
    return ", ".join(f"{kind} {count:,}" for kind, count in sorted(kinds.items()) if count)
