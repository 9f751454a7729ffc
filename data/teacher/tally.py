"""What extract.py prints: the header, the progress bar, the summary and the estimate of a dry run."""

import json
import sys
import time
from collections import Counter

from tqdm import tqdm


def print_line(line: str):
    """A line on stderr, above a progress bar; nothing that a server sent may control the terminal."""
    tqdm.write("".join(c if c.isprintable() else " " for c in line), file=sys.stderr)


def warn(run, what: str, line: str):
    """Print a warning, once for each `what`."""
    if what not in run.warned:
        run.warned.add(what)
        print_line(f"warning: {line}")


def dollars(config, tokens_in, tokens_out):
    """`; $1.23`, or nothing where no prices are given."""
    cost = (tokens_in * config.price_in + tokens_out * config.price_out) / 1e6
    return f"; ${cost:,.2f}" if config.price_in or config.price_out else ""


def bar_text(run) -> str:
    ok, out, retries = run.kinds[None], run.kinds.total() - run.kinds[None], run.spent["retries"]
    slow = run.pace.slowed and run.pace.interval > 0.01
    rate = f", {60 / run.pace.interval:,.0f}/min" if slow else ""
    speed = run.spent["completion"] / max(time.monotonic() - run.start, 1e-3)
    cost = dollars(run.config, run.spent["prompt"], run.spent["completion"])
    return f"{ok:,} ok, {out:,} left out, {retries:,} retries{rate}, {speed:,.0f} tok/s{cost}"


def listed(kinds):
    """`truncated 5, unparsed 2` of a Counter of kinds of error."""
    return ", ".join(f"{kind} {n:,}" for kind, n in sorted(kinds.items()) if n)


def print_header(run):
    config, teacher = run.config, run.teacher
    key = "" if "Authorization" in teacher.headers or config.header else f"; no key (${config.api_key_env} is not set)"
    proxy = f", through the proxy {teacher.proxy[0]}:{teacher.proxy[1]}" if teacher.proxy else ""
    asked = f"{teacher.url or '(no --base-url)'}, {config.endpoint}, {config.model}{key}{proxy}"
    kept = f", {run.kept:,} of them with a rationale, which is kept" if run.kept else ""
    resumed = f", {run.resumed:,} of them done or failed before" if run.resumed else ""
    print_line(f"teacher: {', '.join(config.batch_replies) or asked}")
    print_line(f"prompt:  {config.prompt} (sha256 {run.prompt.sha256[:12]}), {len(run.prompt.exemplars)} exemplars")
    print_line(f"rows:    {len(run.ids):,} in {config.input}{kept}{resumed}")


def print_summary(run) -> tuple[int, str]:
    """Say what came of it. Returns the exit status, and the reason if the run ended early."""
    config, spent, seconds = run.config, run.spent, time.monotonic() - run.start
    kinds = Counter(run.state[name].kind for name in run.ids if name in run.state)
    unasked = len(run.ids) - kinds.total()
    done, asked, ok = kinds.pop(None, 0), run.kinds.total(), run.kinds.pop(None, 0)
    if asked:
        which = f" ({listed(run.kinds)})" if asked > ok else ""
        now = f"{ok:,} ok, {asked - ok:,} left out{which}; {spent['retries']:,} retries"
        print_line(f"asked {asked:,} rows in {seconds // 60:.0f}m{seconds % 60:02.0f}s: {now}")
        if judged := [o.correct for o in run.state.values() if not o.kind and o.correct in (True, False)]:
            right = f"{sum(judged):,} of {len(judged):,} answered rows with a gold label"
            print_line(f"teacher right on {right} ({sum(judged) / len(judged):.1%})")
        cost = dollars(config, spent["prompt"], spent["completion"])
        print_line(f"tokens: {spent['prompt']:,} in ({spent['cached']:,} cached), {spent['completion']:,} out{cost}")
    print_line(f"{config.output}: {done:,} of {len(run.ids):,} rows")
    failed = kinds.total() - kinds["incorrect"]  # a row that --keep correct leaves out has not failed
    if kinds:
        print_line(f"{config.errors_path}: {listed(kinds)}" + ("; --retry-failed asks again" if failed else ""))
    if run.aborted:
        return 3, f"aborted: {run.aborted} (what was finished is kept; the same command goes on)"
    if run.pace.stopped.is_set():
        return 130, "interrupted; what was finished is kept, the same command goes on"
    if unasked and not run.replies:
        return 3, f"{unasked:,} rows were not asked: did {config.input} change meanwhile?"
    if unasked:
        print_line(f"{unasked:,} rows have no reply yet; --batch-requests writes what is to be asked")
    errors = f" {config.errors_path}  # whose rows train the label task, by their gold labels" if kinds.total() else ""
    print_line(f"next: python train.py --data {config.output}{errors}")
    return 1 if failed or unasked else 0, ""


def print_estimate(run):
    """Print the first request and what asking may cost, on stdout: it is what a dry run is for."""
    config, requests = run.config, len(run.ids) - run.kept
    print(json.dumps(run.first, indent=2, ensure_ascii=False) if run.first else "nothing to ask")
    replies = [len(run.prompt.reply(e)) / 3 for e in run.prompt.exemplars] or [config.max_tokens]
    sent = run.characters // 3
    written = round(requests * min(sum(replies) / len(replies), config.max_tokens))
    print(f"rows: {len(run.ids) - run.kept:,}; requests: {requests:,}")
    print(f"tokens: about {sent:,} in, and {written:,} out if answers are as long as the exemplars'", end="")
    print(f"{dollars(config, sent, written)} (at 3 characters a token; English prose has 4 to 5)")
