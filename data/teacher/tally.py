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


def counts(run):
    """(seconds since the start, dollars spent) of this start."""
    dollars = run.spent["prompt"] * run.config.price_in + run.spent["completion"] * run.config.price_out
    return max(time.monotonic() - run.start, 1e-3), dollars / 1e6


def bar_text(run) -> str:
    (seconds, dollars), ok = counts(run), run.kinds[None]
    parts = [f"{ok:,} ok", f"{run.kinds.total() - ok:,} left out", f"{run.spent['retries']:,} retries"]
    if run.pace.refused and run.pace.interval > 0.01:
        parts.append(f"{60 / run.pace.interval:,.0f}/min")
    parts.append(f"{run.spent['completion'] / seconds:,.0f} tok/s")
    return ", ".join(parts + [f"${dollars:,.2f}"] * bool(dollars))


def listed(kinds):
    """`truncated 5, unparsed 2` of a Counter of kinds of error."""
    return ", ".join(f"{kind} {n:,}" for kind, n in sorted((kind, n) for kind, n in kinds.items() if kind and n))


def print_header(run):
    config, teacher = run.config, run.teacher
    key = "" if "Authorization" in teacher.headers or config.header else f"; no key (${config.api_key_env} is not set)"
    proxy = f", through the proxy {teacher.proxy[0]}:{teacher.proxy[1]}" if teacher.proxy else ""
    asked = f"{teacher.url or '(no --base-url)'}, {config.endpoint}, {config.model}{key}{proxy}"
    print_line(f"teacher: {', '.join(config.batch_replies) or asked}")
    print_line(f"prompt:  {config.prompt} (sha256 {run.prompt.sha256[:12]}), {len(run.prompt.exemplars)} exemplars")
    kept = f", {run.kept:,} of them with a rationale, which is kept" if run.kept else ""
    resumed = f", {run.resumed:,} of them done or failed before" if run.resumed else ""
    print_line(f"rows:    {len(run.ids):,} in {config.input}{kept}{resumed}")
    if others := len(run.state.done - run.ids.keys()):
        print_line(f"         {others:,} more in {config.output} that are not in this input stay there")


def print_summary(run) -> tuple[int, str]:
    """Say what came of it. Returns the exit status, and the reason if the run ended early."""
    config, state, spent, (seconds, dollars) = run.config, run.state, run.spent, counts(run)
    kinds = Counter(state.failed[name] for name in run.ids if name in state.failed)
    done, asked = sum(name in state.done for name in run.ids), run.kinds.total()
    unasked = len(run.ids) - done - kinds.total()
    if run.resumed == len(run.ids):
        print_line("nothing left to ask")
    if asked:
        which = f" ({listed(run.kinds)})" if asked > run.kinds[None] else ""
        now = f"{run.kinds[None]:,} ok, {asked - run.kinds[None]:,} left out{which}; {spent['retries']:,} retries"
        print_line(f"asked {asked:,} rows in {seconds // 60:.0f}m{seconds % 60:02.0f}s: {now}")
        if gold := state.right[True] + state.right[False]:
            right = state.right[True]
            print_line(f"teacher right on {right:,} of {gold:,} answered rows with a gold label ({right / gold:.1%})")
        if run.pace.refused:
            rate = 60 * (asked + spent["retries"]) / seconds
            print_line(f"pace: {rate:,.0f} requests a minute got through; {run.pace.refused:,} came too early (429)")
        cached = f" ({spent['cached']:,} of them cached)" if spent["cached"] else ""
        cost = f"; ${dollars:,.2f}" if config.price_in or config.price_out else ""
        print_line(f"tokens: {spent['prompt']:,} in{cached}, {spent['completion']:,} out{cost}")
    print_line(f"{config.output}: {done:,} of {len(run.ids):,} rows")
    failed = kinds.total() - kinds["incorrect"]  # a row that --keep correct leaves out has not failed
    if kinds:
        again = "; --retry-failed asks again" if failed else ""
        print_line(f"{config.errors_path}: {listed(kinds)}{again}")
    if run.aborted:
        return 3, f"aborted: {run.aborted}. What was finished is kept; the same command goes on"
    if run.interrupted:
        return 130, "interrupted; what was finished is kept, the same command goes on"
    if unasked and not run.replies:
        return 3, f"{unasked:,} rows were not asked: did {config.input} change meanwhile?"
    if unasked:
        print_line(f"{unasked:,} rows have no reply yet; --batch-requests writes what is to be asked")
    errors = f" {config.errors_path}  (its rows train the label task, by their gold labels)" if kinds else ""
    print_line(f"next: python train.py --data {config.output}{errors}")
    return 1 if failed or unasked else 0, ""


def print_estimate(run):
    """Print the first request and what asking may cost, on stdout: it is what a dry run is for."""
    config, rows = run.config, len(run.ids) - run.kept
    print(json.dumps(run.first, indent=2, ensure_ascii=False) if run.first else "nothing to ask")
    requests = rows * config.n
    replies = [len(run.prompt.reply(e)) / 3 for e in run.prompt.exemplars] or [config.max_tokens]
    usual = round(requests * min(sum(replies) / len(replies), config.max_tokens))
    sent, most = run.characters * config.n // 3, requests * config.max_tokens
    print(f"rows: {rows:,}; requests: {requests:,}")
    print(f"tokens, at 3 characters each (English prose has 4 to 5): {sent:,} in;")
    print(f"        {usual:,} out if answers are as long as the exemplars', at most {most:,}")
    if config.price_in or config.price_out:
        usual, most = ((sent * config.price_in + out * config.price_out) / 1e6 for out in (usual, most))
        print(f"cost: about ${usual:,.2f}, at most ${most:,.2f}")
