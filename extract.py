"""Rationales from any OpenAI-compatible teacher: render -> ask -> parse -> check -> write.

    python extract.py --input rows.jsonl --output out.jsonl --prompt data/prompts/svamp.json \\
        --base-url http://localhost:11434/v1 --model NAME
    python train.py --data out.jsonl

Every input row without a rationale is asked about once. A usable answer is a row of --output, anything else a row of
the errors file, with the raw text. The output is the state: the same command goes on where an earlier one ended.

One thread reads, counts and writes; --concurrency workers ask. The parts are in data/teacher/. With --batch-requests
and --batch-replies files take the place of the asking.
"""

import hashlib
import json
import os
import queue
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path

from tqdm import tqdm

import data
from data import cli
from data.answers import split_thinking
from data.cli import Interrupted, Stop
from data.files import locked, open_regular
from data.jsonl import read_jsonl, write_jsonl
from data.teacher.endpoint import PATHS, RAW, Replies, RequestError, Teacher, shown
from data.teacher.output import Outcome, append, put_in_order, read_state, what_changed
from data.teacher.pace import Pace
from data.teacher.prompt import Answer, Prompt, load_prompt
from data.teacher.settings import ExtractConfig
from data.teacher.tally import bar_text, print_estimate, print_header, print_line, print_summary, warn


def main(argv: list[str] | None = None, scale: float = 1.0) -> int:
    """Returns the exit status, whose meanings ExtractConfig lists. `scale` shortens every pause, for tests."""
    config = cli.parse(argv, ExtractConfig)
    try:
        if config.dry_run:
            print_estimate(prepare(config, scale))
            return 0
        with locked(config.output):
            run = prepare(config, scale)
            if config.batch_requests:
                return write_batch(run)
            try:
                with Stop() as stop:
                    ask_all(run, stop)
            except OSError as error:  # a full disk, for one
                run.pace.stopped.set()
                run.aborted = str(error)
            status, message = print_summary(run)
    except (OSError, ValueError) as error:
        return cli.fail("extract.py", 2, error if isinstance(error, OSError) else shown(str(error)))
    return cli.fail("extract.py", status, shown(message)) if message else status


@dataclass
class Run:
    config: ExtractConfig
    prompt: Prompt
    teacher: Teacher
    pace: Pace
    state: dict = field(default_factory=dict)  # id: Outcome of what is done and what failed
    ids: dict = field(default_factory=dict)  # of the input, in order
    replies: Replies | None = None  # of --batch-replies
    resumed: int = 0  # rows of the input that are done or failed before
    kept: int = 0  # rows of the input that are to be written as they are
    first: dict | None = None  # of all requests
    characters: int = 0  # in all of them
    answered: dict | None = None  # the last request that the teacher answered
    kinds: Counter = field(default_factory=Counter)  # of errors, in this start; None: of answered rows
    spent: Counter = field(default_factory=Counter)  # in this start: tokens (prompt, completion, cached), retries
    start: float = field(default_factory=time.monotonic)
    warned: set = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)  # held by the one worker that takes the next row
    aborted: str = ""  # why, if the run ends by itself


def prepare(config, scale):
    """The Run, with what is done and what is to do. Raises OSError or ValueError, in one line, for what is wrong."""
    open_regular(config.input).close()  # because it is read twice
    prompt = load_prompt(config.prompt)
    if config.rationalize and not (prompt.hint and "{hint}" in prompt.question):
        raise ValueError(f'{config.prompt}: --rationalize needs a "hint" and its place, {{hint}}, in "question"')
    base_url = config.base_url or os.environ.get("OPENAI_BASE_URL", "")
    key = os.environ.get(config.api_key_env, "").strip()
    teacher = Teacher(base_url, config.endpoint, key, config.header, config.timeout)
    if not (teacher.url or config.batch_requests or config.batch_replies or config.dry_run):
        raise ValueError("give --base-url or set $OPENAI_BASE_URL; Ollama's is http://localhost:11434/v1")
    if teacher.hide(config.extra_body) != config.extra_body:
        raise ValueError("--extra-body must not hold the key, because it is written into every row")
    run = Run(config, prompt, teacher, Pace(config.rpm, config.patience, scale))
    if config.batch_replies:
        run.replies = Replies(config.batch_replies, teacher)
    if not (config.overwrite or config.dry_run):
        run.state = read_state(config.output, config.errors_path)
    scan(run)
    if not run.ids:
        raise ValueError(f"{config.input}: there are no rows in it")
    run.resumed = sum(not to_ask(run, name) for name in run.ids)
    if config.overwrite and not config.dry_run:
        for path in (config.output, config.errors_path):
            Path(path).unlink(missing_ok=True)
    print_header(run)
    return run


def read_input(run):
    config = run.config
    return islice(read_jsonl(config.input), config.limit or None)


def scan(run):
    """Read the whole input and count what is in it. Raises ValueError for a row that cannot be asked about or was asked
    with other settings, and for a reply that belongs to no request; warns of gold labels that no answer can have."""
    config, state, odd, expected = run.config, run.state, 0, set()
    for record in read_input(run):
        if record.id in run.ids:
            raise ValueError(f"{config.input}: the id {record.id!r} is there twice; give each row its own")
        run.ids[record.id] = None
        body = render(run, record)
        if body and record.label is None and (config.rationalize or config.keep == "correct"):
            flag = "--rationalize" if config.rationalize else "--keep correct"
            raise ValueError(f"{config.input}: row {record.id!r} has no gold label, which {flag} needs")
        if record.label is not None and run.prompt.read(record.label, record.input) is None:
            odd, example = odd + 1, f"{record.label!r} in row {record.id!r}"
        run.first = run.first or body
        run.characters += characters(body or {})
        run.kept += body is None and record.id not in state
        digest = request_hash(run, body)
        if run.replies and body:
            expected.add(custom_id(run, record, body))
        old = state.get(record.id)
        if old and old.request_hash != digest:
            del state[record.id]  # if it failed, then under other settings: these may do
            if not old.kind:
                changed = what_changed(config.output, record.id, body and provenance(run))
                raise ValueError(f"{config.output} was made with {changed}; name another --output")
    if foreign := sorted(run.replies.texts.keys() - expected) if run.replies else ():
        what = f"{len(foreign):,} replies are to requests that these settings and rows do not make"
        raise ValueError(f"{config.batch_replies[0]}: {what}, such as {foreign[0]!r}")
    if odd:
        what = f"{odd:,} gold labels match none of the prompt's {run.prompt.label_type} labels"
        known = f" ({', '.join(run.prompt.labels)})" if run.prompt.labels else ""
        print_line(f"warning: {what}{known}, for example {example}")


def to_ask(run, name):
    """Whether a row is still to be asked: not in the output, and not failed before unless --retry-failed says so."""
    return name not in run.state or run.config.retry_failed and run.state[name].kind not in (None, "incorrect")


def jobs_of(run):
    """(record, its request, or None if the record is kept as it is) of every row that is to be asked."""
    return ((record, render(run, record)) for record in read_input(run) if to_ask(run, record.id))


def write_batch(run):
    """Write the requests that are to be made into files, F.jsonl, F-2.jsonl, ..., and say how to go on."""
    config, path = run.config, Path(run.config.batch_requests)
    url = "/v1" + PATHS[config.endpoint]
    requests = ((custom_id(run, *job), job[1]) for job in jobs_of(run) if job[1])
    lines = ({"custom_id": identity, "method": "POST", "url": url, "body": body} for identity, body in requests)
    for number, part in enumerate(iter(lambda: list(islice(lines, config.batch_rows)), []), 1):
        name = path.with_stem(f"{path.stem}-{number}") if number > 1 else path
        write_jsonl(name, part)
        print_line(f"{name}: {len(part):,} requests")
    print_line("next: the same command with --batch-replies REPLIES.jsonl in place of --batch-requests")
    return 0


def render(run, record):
    """The body of the request for a row; None for one that has a rationale, which is kept unless --replace is given.
    Raises ValueError for an input that does not fit the prompt file."""
    config = run.config
    if record.rationale is not None and not config.replace:
        return None
    question, name = (run.prompt.chat, "messages") if config.endpoint == "chat" else (run.prompt.completion, "prompt")
    try:
        asked = question(record.input, record.label if config.rationalize else None)
    except ValueError as error:
        raise ValueError(f"{config.input}: row {record.id!r}: {error}") from None
    return {"model": config.model, name: asked, **config.params(run.prompt.stop)}


def characters(body):
    return len(body.get("prompt", "")) + sum(len(m["content"]) for m in body.get("messages", ()))


def request_hash(run, body):
    """What makes two requests the same, as hexadecimal SHA-256; None for no request."""
    config = run.config
    whole = {"endpoint": config.endpoint, "reasoning": config.reasoning, "keep": config.keep}
    return body and hashlib.sha256(json.dumps(body | whole, sort_keys=True).encode()).hexdigest()


def custom_id(run, record, body):
    """The id of a request in batch files. With its hash in it, replies to other requests are known as such."""
    return f"{record.id}-{request_hash(run, body)[:12]}"


def work(run, jobs, results):
    """A worker asks about row after row. It gives what check() makes of each, an exception that is a bug of ours, and
    None at its end."""
    teacher = run.replies or copy(run.teacher)  # each worker has a connection of its own
    try:
        while not run.pace.stopped.is_set():
            with run.lock:
                record, body = next(jobs)
            answer = ask(run, teacher, record, body) if body else None
            if answer or not body:  # else a batch has no reply: the next start will ask
                results.put(check(run, record, body, answer))
    except RequestError as error:
        question = "; is the teacher running there?" if error.kind == "disconnect" else ""
        run.aborted = run.aborted or f"{error}{question}"
    except (StopIteration, Interrupted):
        pass
    except Exception as error:
        results.put(error)
    results.put(None)


def ask(run, teacher, record, body):
    """Ask about a row until there is a reply, and read it; None if a batch has none. Raises Interrupted if
    the run ends first, RequestError if it must end."""
    pace, attempts, seconds, usage = run.pace, 0, 0.0, Counter()
    identity = custom_id(run, record, body)
    while True:
        sent = pace.wait()
        try:
            reply = teacher.ask(body, identity)
            run.answered, seconds = body, time.monotonic() - sent
            pace.let_through(answered=True)
            usage.update(reply.usage)
            return replace(take(run, record, body, reply), attempts=attempts + 1, seconds=seconds, usage=usage)
        except RequestError as error:
            if run.replies and error.then not in ("row", "denied"):  # the batch has failed here, not the row
                return None
            if error.then == "pace":
                warn(run, "429", f"{error}; requests slow down to the server's pace, which --rpm gives beforehand")
                pace.slow_down(sent, error)
                continue
            pace.let_through(answered=False)
            attempts += 1
            took = dict(attempts=attempts, seconds=seconds, usage=usage)
            failed = Answer(error=error.kind, detail=str(error), raw=error.raw, **took)
            if run.replies or error.then == "row" or error.then == "denied" and run.answered and answers(run, teacher):
                return failed
            if error.then in ("stop", "denied"):
                raise
            if attempts <= run.config.max_retries:
                pace.back_off(attempts, error.wait)
            elif not run.answered:
                raise
            elif pace.await_teacher(sent, error, lambda: answers(run, teacher)):
                attempts = 0  # it was not this row's fault
            else:
                return failed


def answers(run, teacher):
    """Whether the teacher still answers the request that it answered last."""
    run.pace.wait()
    try:
        return bool(teacher.ask(run.answered))
    except RequestError as error:
        return error.then == "pace"


def take(run, record, body, reply):
    """The Answer in a reply. Raises RequestError for a text that another attempt may better."""
    config = run.config
    if reply.model and reply.model != config.model:
        warn(run, "model", f"asked for {config.model!r}, served by {reply.model!r}")
    if 0 < reply.usage["prompt"] * 8 < characters(body):
        seen = f"{reply.usage['prompt']:,} tokens of {characters(body):,} characters"
        warn(run, "cut", f"the server read {seen}; if it cuts prompts, give it a larger context")
    thoughts, said = split_thinking(reply.text)
    thoughts = "\n".join(filter(None, (reply.reasoning, thoughts)))
    answer = run.prompt.parse(said, record.input, reply.cut_short)
    if answer.error == "empty" and thoughts:
        answer = replace(answer, detail="all tokens went into thoughts; a larger --max-tokens may do")
    if thoughts and answer.label and config.reasoning == "keep":
        answer = Answer("\n".join(filter(None, (thoughts, answer.rationale))), answer.label)
    vain = answer.error == "empty" and not thoughts and not reply.cut_short
    if vain or answer.error and config.temperature > 0 and "seed" not in body:  # another attempt gives another text
        raise RequestError(answer.error, answer.detail, "retry", reply.text)
    return replace(answer, raw=(reply.text or reply.reasoning)[:RAW], model=reply.model)


def provenance(run):
    """The part of a row's `teacher` that is the same for all rows of a run."""
    config = run.config
    params = config.params(run.prompt.stop) | {"reasoning": config.reasoning}
    given = {name: getattr(config, name) for name in ("model", "endpoint", "rationalize", "keep")}
    return {"base_url": run.teacher.url, "prompt_sha256": run.prompt.sha256, "params": params} | given


def check(run, record, body, answer):
    """(Record to write, kind of error or None): the row with its answer, whether it is right, and where it is from."""
    config = run.config
    if body is None:
        return replace(record, teacher=None), None
    judged = not answer.error and record.label is not None
    correct = run.prompt.same(answer.label, record.label, record.input) if judged else None
    teacher = provenance(run) | {
        "request_sha256": request_hash(run, body),
        "model_served": answer.model or None,
        "usage": {name: answer.usage[name] for name in ("prompt", "completion", "cached")},
        "attempts": answer.attempts,
        "latency_s": round(answer.seconds, 3),  # of the reply, without pauses
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": data.__version__,
    }
    if not answer.error and config.keep == "correct" and not correct:
        what = f"--keep correct: the label {answer.label!r} is not the gold one"
        answer = replace(answer, error="incorrect", detail=what)
    other = {name: value for name, value in record.other.items() if name != "error"} | {"correct": correct}
    rationale, label = answer.rationale, answer.label
    if answer.error:
        other["error"] = {"kind": answer.error, "message": answer.detail, "raw": answer.raw}
        rationale = label = None
    row = replace(record, rationale=rationale, teacher_label=label, teacher=teacher, other=other)
    return row, answer.error


def ask_all(run, stop):
    """Ask about every row that is to be asked, and write each outcome as it comes. The files end up in input order."""
    config, jobs, total = run.config, jobs_of(run), len(run.ids) - run.resumed
    workers = min(1 if run.replies else config.concurrency, total)
    results = queue.Queue(maxsize=workers)  # no worker asks further ahead than is written
    for _ in range(workers):
        threading.Thread(target=work, args=(run, jobs, results), daemon=True).start()
    ending, in_a_row = run.pace.stopped, 0
    layout = "{n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"  # fits into 80 columns
    interval = 0.5 if sys.stderr.isatty() else 30  # seconds between lines in a log file
    bar = tqdm(total=len(run.ids), initial=run.resumed, bar_format=layout, mininterval=interval, disable=not total)
    with bar:
        while workers:
            if (stop.requested or run.aborted) and not ending.is_set():
                stop.requested = True
                ending.set()
                print_line("ending: waiting for the requests in flight; Ctrl-C ends at once")
            arrived = []  # all that is there is written to the disk at once
            with suppress(queue.Empty):
                arrived.append(results.get(timeout=0.5))  # without a timeout Windows would hold back Ctrl-C
                arrived += [results.get_nowait() for _ in range(results.qsize())]
            for bug in arrived:
                if isinstance(bug, Exception):
                    raise bug
            workers -= arrived.count(None)
            ready = [result for result in arrived if result]
            append(config.output, [row.to_json() for row, kind in ready if not kind])
            append(config.errors_path, [row.to_json() for row, kind in ready if kind])
            for row, kind in ready:
                in_a_row = in_a_row + 1 if kind and kind != "incorrect" else 0
                if in_a_row == (config.max_consecutive_failures or None):
                    last = row.other["error"]["message"]
                    run.aborted = run.aborted or f"{in_a_row} rows in a row without a usable answer; the last: {last}"
                run.state[row.id] = Outcome(kind, row.other.get("correct"))
                if row.teacher:
                    run.kinds[kind] += 1
                    run.spent.update(row.teacher["usage"], retries=row.teacher["attempts"] - 1)
            bar.set_postfix_str(bar_text(run), refresh=False)
            bar.update(len(ready))
    if not ending.is_set():
        put_in_order(config.output, run.ids)
        put_in_order(config.errors_path, run.ids, {name for name, outcome in run.state.items() if not outcome.kind})


if __name__ == "__main__":
    cli.run("extract.py", main)
