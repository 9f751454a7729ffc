"""What extract.py counts and prints."""

import json
import sys
import threading
from collections import Counter
from collections.abc import Iterable

from tqdm import tqdm

from data.cli import one_line
from data.jsonl import Record
from data.requests import Requests, texts_sent


def print_line(line: str) -> None:
    """A line on stderr, above a progress bar."""
    tqdm.write(one_line(line), file=sys.stderr)


class Tally:
    """Counts what came of this start."""

    def __init__(self, price_in: float, price_out: float, max_cost: float) -> None:
        """price_in, price_out: $ per million tokens. max_cost: $, 0 for no limit."""
        self.price_in = price_in
        self.price_out = price_out
        self.max_cost = max_cost
        self.good = 0  # rows
        self.left_out = 0
        self.spent: Counter = Counter()  # tokens
        self.rationales: Counter = Counter()
        self.warned: set[str] = set()
        self.lock = threading.Lock()

    def progress_bar(self, rows: int) -> tqdm:
        self.bar = tqdm(total=rows)
        return self.bar

    def warn(self, kind: str, message: str) -> None:
        """Print a warning, once for each kind."""
        if kind not in self.warned:
            self.warned.add(kind)
            print_line(f"warning: {message}")

    def add(self, row: Record) -> None:
        if row.rationale is None:
            self.left_out += 1
        else:
            self.good += 1
            self.rationales[hash(row.rationale)] += 1
        counts = f"{self.good:,} ok, {self.left_out:,} left out{self.dollars(self.spent)}"
        self.bar.set_postfix_str(counts, refresh=False)
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
        return (tokens["prompt"] * self.price_in + tokens["completion"] * self.price_out) / 1e6

    def dollars(self, tokens: dict[str, int]) -> str:
        """`; $1.23`, or nothing where no prices are given."""
        return f"; ${self.cost(tokens):,.2f}" if self.price_in or self.price_out else ""

    def print_summary(self) -> None:
        tokens = f"{self.spent['prompt']:,} in, {self.spent['completion']:,} out"
        print_line(f"tokens: {tokens}{self.dollars(self.spent)}")
        alike = max(self.rationales.values(), default=0)
        if alike > 2 and alike > self.good / 2:
            what = "rows have the same rationale, word for word"
            print_line(f"warning: {alike:,} of {self.good:,} {what}")

    def print_estimate(self, requests: Requests, rows: Iterable[Record]) -> None:
        """Print the first request and what asking may cost, on stdout."""
        bodies = [requests.body(row) for row in rows if row.rationale is None]
        if bodies:
            print(json.dumps(bodies[0], indent=2, ensure_ascii=False))
        characters = sum(len(text) for body in bodies for text in texts_sent(body))
        replies = [len(requests.prompt.reply(each)) for each in requests.prompt.exemplars]
        written = len(bodies) * sum(replies) / max(len(replies), 1)
        tokens = {"prompt": characters // 3, "completion": round(written / 3)}
        print(
            f"requests: {len(bodies):,}; tokens, at 3 characters each and answers as long as the "
            f"exemplars': about {tokens['prompt']:,} in, {tokens['completion']:,} out"
            f"{self.dollars(tokens)}"
        )
