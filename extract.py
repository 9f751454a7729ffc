"""Rationales from any OpenAI-compatible teacher: render -> ask -> parse -> check -> write.

    python extract.py --input rows.jsonl --output out.jsonl --prompt data/prompts/svamp.json \\
        --base-url http://localhost:11434/v1 --model NAME
    python train.py --data out.jsonl

Every input row is asked about once. A usable answer is a row of --output, anything else a row of the errors file, with
the raw text. The output is the state: the same command goes on where an earlier one ended, however it ended.

One thread reads, counts and writes; --concurrency workers ask. Where each part is, in data/teacher/: prompt.py renders
questions and parses answers, endpoint.py asks and says what a failure means, output.py is the file that survives a
crash.
"""

import hashlib
import json
import os
import queue
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from itertools import islice

from tqdm import tqdm

import data
from data import arguments
from data.answers import split_thinking
from data.files import locked
from data.interrupt import Stop
from data.jsonl import Record, read_jsonl
from data.teacher.endpoint import Address, Pace, Problem, Stopped, Teacher, make_address
from data.teacher.output import Appender, State, put_in_order, read_state, what_changed
from data.teacher.prompt import Prompt, load_prompt
from data.teacher.settings import ExtractConfig
from data.teacher.tally import Tally, say, say_estimate, say_header, say_summary


def main(argv=None, scale=1.0):
    """Exit status: 0 every row answered, 1 some failed, 2 wrong arguments or files, 3 aborted, 130 interrupted.

    `scale` shortens every pause, for tests.
    """
    config = arguments.parse(argv, ExtractConfig)
    try:
        if config.dry_run:
            return dry_run(config)
        with locked(config.output):
            run = prepare(config, scale)
            try:
                with Stop() as stop:
                    ask_all(run, stop)
            except OSError as problem:  # a full disk, for one
                run.pace.stopped.set()
                run.aborted = str(problem)
            failed = say_summary(run)
        if run.aborted:
            return fail(3, f"aborted: {run.aborted}. What was finished is kept; the same command goes on")
        if run.interrupted:
            return fail(130, "interrupted; what was finished is kept, the same command goes on")
        return 1 if failed else 0
    except (OSError, ValueError) as problem:
        return fail(2, problem)


# ---- Before asking: everything that can be wrong with arguments and files is found here ------------------------------


@dataclass
class Run:
    config: ExtractConfig
    prompt: Prompt
    address: Address
    params: dict  # of every request, besides the model and the question
    pace: Pace
    tally: Tally
    ids: dict = field(default_factory=dict)  # of the input, in order
    done: set = field(default_factory=set)  # ids in the output
    failed: dict = field(default_factory=dict)  # id -> kind of error, of those in the errors file
    resumed: int = 0  # rows of the input that need not be asked
    answered: bool = False  # the teacher has sent a reply
    interrupted: bool = False
    aborted: str = ""  # why


def prepare(config, scale):
    """The Run, with what is done and what is to do. Raises OSError or ValueError, in one line, for what is wrong."""
    run = make_run(config, scale)
    if not run.address.url:
        raise ValueError("give --base-url or set $OPENAI_BASE_URL; Ollama's is http://localhost:11434/v1")
    state = State() if config.overwrite else read_state(config.output, config.errors_path)
    for path, torn in state.torn:
        say(f"{path}: a last line torn by a crash was cut off ({torn:,} bytes); its row is asked again")
    run.done, run.failed, run.tally.right = state.done, state.failed, state.right
    for record in read_input(config):
        if record.id in run.ids:
            raise ValueError(f"{config.input}: the id {record.id!r} is there twice; give each row its own")
        if record.label is None and (config.rationalize or config.keep == "correct"):
            flag = "--rationalize" if config.rationalize else "--keep correct"
            raise ValueError(f"{config.input}: row {record.id!r} has no gold label, which {flag} needs")
        run.ids[record.id] = None
        if request_hash(run, render(run, record)) == state.hashes.get(record.id):
            continue
        if record.id in run.done:
            changed = what_changed(config.output, record.id, provenance(run))
            raise ValueError(f"{config.output} was made with {changed}; name another --output")
        run.failed.pop(record.id, None)  # if it failed, then under other settings: these may do
    if not run.ids:
        raise ValueError(f"{config.input}: there are no rows in it")
    run.resumed = sum(not to_ask(run, name) for name in run.ids)
    if config.overwrite:
        for path in filter(os.path.exists, (config.output, config.errors_path)):
            os.unlink(path)
    say_header(run)
    return run


def make_run(config, scale=1.0):
    """The part of a Run that needs no rows."""
    prompt = load_prompt(config.prompt)
    if config.rationalize and not (prompt.hint and "{hint}" in prompt.question):
        raise ValueError(f'{config.prompt}: --rationalize needs a "hint" and its place, {{hint}}, in "question"')
    base_url = config.base_url or os.environ.get("OPENAI_BASE_URL", "")
    key = os.environ.get(config.api_key_env, "").strip()
    address = make_address(base_url, config.endpoint, key, config.timeout)
    pace, tally = Pace(config.rpm, scale), Tally(config.price_in, config.price_out)
    return Run(config, prompt, address, config.params(prompt.stop), pace, tally)


def read_input(config):
    names = {"id": config.id_field, "input": config.input_field, "label": config.label_field}
    return islice(read_jsonl(config.input, names), config.limit or None)


def to_ask(run, name):
    """Whether a row is still to be asked: not in the output, and not failed before unless --retry-failed says so."""
    kind = run.failed.get(name)
    left_out = kind == "incorrect" and run.config.keep == "correct"  # it did not fail
    return name not in run.done and (kind is None or run.config.retry_failed and not left_out)


# ---- Render ----------------------------------------------------------------------------------------------------------


def render(run, record):
    """The body of the request for a row. Raises ValueError for an input that does not fit the prompt file."""
    gold = record.label if run.config.rationalize else None
    try:
        if run.config.endpoint == "chat":
            question = {"messages": run.prompt.chat(record.input, gold)}
        else:
            question = {"prompt": run.prompt.completion(record.input, gold)}
    except ValueError as problem:
        raise ValueError(f"{run.config.input}: row {record.id!r}: {problem}") from None
    return {"model": run.config.model, **question, **run.params}


def characters(body):
    return len(body.get("prompt", "")) + sum(len(m["content"]) for m in body.get("messages", ()))


def request_hash(run, body):
    """What makes two requests the same, as hexadecimal SHA-256."""
    whole = body | {"endpoint": run.config.endpoint, "n": run.config.n, "reasoning": run.config.reasoning}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


# ---- Ask and parse: in a worker --------------------------------------------------------------------------------------


@dataclass
class Sample:
    """One answer to a question, or what came instead."""

    rationale: str | None = None
    label: str | None = None
    kind: str | None = None  # of error
    detail: str = ""
    raw: str = ""
    model: str = ""
    attempts: int = 0
    seconds: float = 0.0
    usage: Counter = field(default_factory=Counter)  # of all attempts


@dataclass
class Outcome:
    record: Record
    body: dict
    samples: list = field(default_factory=list)
    unasked: bool = False  # the run ended before there was an answer
    crash: BaseException | None = None


def work(run, jobs, results):
    """A worker: takes (record, body), gives an Outcome for each, until it takes None."""
    teacher = Teacher(run.address)
    while job := jobs.get():
        outcome = Outcome(*job)
        try:
            for i in range(run.config.n):
                outcome.samples.append(ask(run, teacher, *job, i))
        except Stopped:
            outcome.unasked = True
        except Problem as problem:
            question = "; is the teacher running there?" if problem.then == "retry" else ""
            run.aborted, outcome.unasked = run.aborted or f"{problem}{question}", True
            run.pace.stopped.set()
        except Exception as problem:  # a bug of ours: the main thread raises it
            outcome.crash = problem
        results.put(outcome)
    teacher.close()


def ask(run, teacher, record, body, number):
    """Sample `number` of a row: ask until there is a reply, parse it. Raises Stopped, or Problem if all is in vain."""
    config, sample = run.config, Sample()
    if "seed" in body:
        body = body | {"seed": body["seed"] + number}
    again = config.temperature > 0 and "seed" not in body  # another answer would be another text
    for attempt in range(config.max_retries + 1):
        run.pace.wait()
        sample.attempts += 1
        try:
            reply = teacher.ask(body)
        except Problem as problem:
            sample.kind, sample.detail, sample.raw = problem.kind, str(problem), problem.raw
            last = problem.then == "row" or attempt == config.max_retries
            if problem.then == "stop" or last and problem.then == "retry" and not run.answered:
                raise
            if last:
                return sample
            run.pace.back_off(attempt, problem.wait)
            continue
        run.answered = True
        if reply.model and reply.model != config.model:
            run.tally.warn("model", f"asked for {config.model!r}, served by {reply.model!r}")
        if 0 < reply.usage["prompt"] * 8 < characters(body):
            seen = f"{reply.usage['prompt']:,} tokens of {characters(body):,} characters"
            run.tally.warn("cut", f"the server read {seen}; if it cuts prompts, give it a larger context")
        sample.usage.update(reply.usage)
        sample.model, sample.seconds, sample.raw = reply.model, reply.seconds, reply.text
        parse(run, record, reply, sample)
        if not (sample.kind and again):
            break
    return sample


def parse(run, record, reply, sample):
    """Put what a reply says into a Sample: rationale and label, or the kind of error."""
    thought, said = split_thinking(reply.text)
    thought = "\n".join(text for text in (reply.reasoning.strip(), thought) if text)
    answer = run.prompt.parse(said, record.input, cut_short=reply.finish == "length")
    if answer.problem == "empty" and thought:
        answer = replace(answer, detail="all tokens went into thoughts; a larger --max-tokens may do")
        sample.raw = sample.raw or reply.reasoning
    if thought and answer.label and run.config.reasoning == "keep":
        thoughts_and_reasons = "\n".join(text for text in (thought, answer.rationale) if text)
        answer = replace(answer, rationale=thoughts_and_reasons, problem=None)
    sample.kind, sample.detail = answer.problem, answer.detail
    sample.rationale, sample.label = (None, None) if answer.problem else (answer.rationale, answer.label)


# ---- Check -----------------------------------------------------------------------------------------------------------


def vote(run, record, samples):
    """The first sample with the label that most samples have; without any label, the first sample."""
    usable = [s for s in samples if not s.kind]
    votes = [sum(run.prompt.same(s.label, other.label, record.input) for other in usable) for s in usable]
    return usable[votes.index(max(votes))] if usable else samples[0]


def provenance(run):
    """The part of a row's `teacher` that is the same for all rows of a run, and its keys in order."""
    config = run.config
    return {
        "request_sha256": None,
        "prompt_sha256": run.prompt.sha256,
        "model": config.model,
        "model_served": None,
        "base_url": run.address.url,
        "endpoint": config.endpoint,
        "params": run.params | {"n": config.n, "reasoning": config.reasoning},
        "rationalize": config.rationalize,
    }


def check(run, outcome):
    """(Record to write, kind of error or None): the row with its answer, whether it is right, and where it is from."""
    record, best = outcome.record, vote(run, outcome.record, outcome.samples)
    correct = None
    if record.label is not None and best.label is not None:
        correct = run.prompt.same(best.label, record.label, record.input)
    usage = sum((s.usage for s in outcome.samples), Counter())
    teacher = provenance(run) | {
        "request_sha256": request_hash(run, outcome.body),
        "model_served": best.model or None,
        "usage": {name: usage[name] for name in ("prompt", "completion", "cached")},
        "attempts": sum(s.attempts for s in outcome.samples),
        "latency_s": round(sum(s.seconds for s in outcome.samples), 3),  # of the replies, without pauses
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": data.__version__,
    }
    if run.config.n > 1:
        teacher["samples"] = [
            {"label": s.label, "rationale": s.rationale} if not s.kind else {"error": s.kind, "raw": s.raw}
            for s in outcome.samples
        ]
    kind, detail = best.kind, best.detail
    if not kind and run.config.keep == "correct" and not correct:
        kind, detail = "incorrect", f"the label is {best.label!r}, not the gold one, and --keep correct is given"
    other = {name: value for name, value in record.other.items() if name not in ("correct", "error")}
    other |= {"correct": correct}
    if kind:
        other["error"] = {"kind": kind, "message": detail, "raw": best.raw}
    return replace(record, rationale=best.rationale, teacher_label=best.label, teacher=teacher, other=other), kind


# ---- Write: the main thread ------------------------------------------------------------------------------------------


def ask_all(run, stop):
    """Ask about every row that is to be asked, and write each outcome as it comes. The files end up in input order."""
    config, jobs, results = run.config, queue.SimpleQueue(), queue.SimpleQueue()
    todo = ((record, render(run, record)) for record in read_input(config) if to_ask(run, record.id))
    total = len(run.ids) - run.resumed
    workers = min(config.concurrency, total)
    for _ in range(workers):
        threading.Thread(target=work, args=(run, jobs, results), daemon=True).start()
    output, errors, ending = Appender(config.output), Appender(config.errors_path), run.pace.stopped
    patience = 0.5 if sys.stderr.isatty() else 30  # seconds between lines in a log file
    told, flying, in_a_row = False, 0, 0
    with tqdm(total=len(run.ids), initial=run.resumed, unit="row", mininterval=patience, disable=not total) as bar:
        while True:
            while flying < 2 * workers and not ending.is_set() and (job := next(todo, None)):
                jobs.put(job)
                flying += 1
            if not flying:
                break
            if (stop.requested or run.aborted) and not told:
                told, run.interrupted, stop.requested = True, stop.requested, True
                ending.set()
                bar.write("ending: waiting for the requests in flight; Ctrl-C ends at once", file=sys.stderr)
            try:
                outcome = results.get(timeout=0.5)  # without a timeout Windows would hold back Ctrl-C
            except queue.Empty:
                continue
            flying -= 1
            if outcome.crash:
                raise outcome.crash
            if outcome.unasked:  # the next start will
                continue
            row, kind = check(run, outcome)
            (errors if kind else output).write(run.address.hide(row.to_json()))
            run.failed.pop(row.id, None)
            if kind:
                run.failed[row.id] = kind
            else:
                run.done.add(row.id)
            run.tally.add(kind, row.teacher["usage"], row.teacher["attempts"] - config.n, row.other["correct"])
            bar.update()
            bar.set_postfix_str(run.tally.bar(), refresh=False)
            in_a_row = in_a_row + 1 if kind and kind != "incorrect" else 0
            if config.max_consecutive_failures and in_a_row == config.max_consecutive_failures:
                last = row.other["error"]["message"]
                run.aborted = run.aborted or f"{in_a_row} rows in a row without a usable answer; the last: {last}"
    for _ in range(workers):
        jobs.put(None)
    output.close()
    errors.close()
    if not ending.is_set():
        put_in_order(config.output, run.ids)
        put_in_order(config.errors_path, run.ids, leave_out=run.done)


def dry_run(config):
    """Print one rendered request, the rows, and what they may cost; send and write nothing."""
    run, first, rows, size = make_run(config), None, 0, 0
    for record in read_input(config):
        body = render(run, record)
        first, rows, size = first or body, rows + 1, size + characters(body)
    if not rows:
        raise ValueError(f"{config.input}: there are no rows in it")
    print(f"to {run.address.url or '(no --base-url)'}, {config.endpoint}:")
    print(json.dumps(first, indent=2, ensure_ascii=False))
    say_estimate(run, rows, size)
    return 0


fail = partial(arguments.fail, "extract.py")


if __name__ == "__main__":
    arguments.run("extract.py", main)
