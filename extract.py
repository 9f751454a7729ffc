"""Ask an OpenAI-compatible teacher for a label and a rationale for every row.

    python extract.py --input rows.jsonl --output out.jsonl --prompt data/prompts/svamp.json \\
        --base-url http://localhost:11434/v1 --model NAME
    python train.py --data out.jsonl

Every row without a rationale is asked about once. A usable answer becomes a row of the output.
Anything else becomes a row of the errors file, with the raw text. The output is the state: the
same command continues where an earlier one ended. One thread reads, counts and writes;
--concurrency threads ask.
"""

import hashlib
import json
import os
import queue
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from data import cli
from data.asking import Asked, Asker
from data.batch_files import Replies, custom_id, write_requests
from data.cli import Interrupted, Stop, require
from data.files import locked, parse_json
from data.jsonl import Record, read_jsonl
from data.output import Done, append, put_in_order, read_state, what_changed
from data.prompt import Answer, load_prompt
from data.teacher import Reply, RequestError, Teacher, one_line
from data.thoughts import split_thoughts

RAW = 20_000  # characters of a reply that the errors file keeps
SETTINGS = ("model", "endpoint", "rationalize", "keep", "reasoning")  # recorded with each row


@dataclass(frozen=True)
class ExtractConfig:
    """Ask a teacher for a label and a rationale for every row, and write them as rows that
    train.py reads.

    Run the same command again to continue after an interruption; rows that are there are not asked
    again. Exit status: 0 every row is in the output; 1 some rows are in the errors file instead,
    whether they failed now or before (--retry-failed asks them again); 2 the arguments or files
    are wrong, nothing was sent; 3 the teacher cannot go on; 130 interrupted. Whatever was finished
    is kept in every case.
    """

    # rows
    input: str = ""  # rows to ask about, JSONL: "input", "label" (gold, if known), "id"
    output: str = ""  # answered rows, JSONL; failed ones are written to OUTPUT.errors.jsonl
    prompt: str = ""  # prompt file, such as data/prompts/svamp.json
    limit: int = 0  # only the first N rows of the input; 0: all
    overwrite: bool = False  # begin anew: delete the output and the errors file first
    retry_failed: bool = False  # ask the rows of the errors file again
    dry_run: bool = False  # print one request, the rows, tokens and cost; send and write nothing
    # teacher
    base_url: str = ""  # URL up to and with /v1; default: $OPENAI_BASE_URL
    model: str = ""  # the teacher's name, as the server knows it
    endpoint: Literal["chat", "completions"] = "chat"  # or text to continue, for base models
    header: tuple[str, ...] = ()  # more headers, 'NAME: VALUE'; $VARIABLE is the environment's
    temperature: float = 0.0  # 0: the likeliest text
    max_tokens: int = 256  # tokens of an answer, a reasoning model's thoughts included
    extra_body: str = ""  # more parameters, a JSON object; null leaves a parameter out
    # choice
    keep: Literal["all", "correct"] = "all"  # all (the paper), or rows with the gold label
    rationalize: bool = False  # show the teacher the gold label and ask for the reasons
    reasoning: Literal["drop", "keep"] = "drop"  # a model's thoughts before the rationale
    # limits
    concurrency: int = 8  # requests in flight at most
    max_retries: int = 5  # further attempts after one that failed for the moment
    timeout: float = 600.0  # seconds for a whole reply
    patience: float = 600.0  # seconds to wait for a teacher that answers nobody
    price_in: float = 0.0  # $ per million prompt tokens
    price_out: float = 0.0  # $ per million tokens written
    # batch files
    batch_requests: str = ""  # send nothing; write the requests to this file (OpenAI's batch API)
    batch_replies: tuple[str, ...] = ()  # send nothing; read the answers from these files

    def check(self) -> None:
        """Raise ValueError, naming the flag, for a value that makes no sense."""
        for name in ("input", "output", "prompt", "model"):
            require(getattr(self, name), name, "given", self)
        for name in ("max_tokens", "concurrency"):
            require(getattr(self, name) >= 1, name, "at least 1", self)
        for name in ("limit", "max_retries", "patience", "price_in", "price_out"):
            require(getattr(self, name) >= 0, name, "0 or more", self)
        require(self.timeout > 0, "timeout", "more than 0", self)
        both = self.overwrite and self.retry_failed
        require(not both, "retry_failed", "left out beside --overwrite", self)
        both = self.batch_requests and self.batch_replies
        require(not both, "batch_replies", "left out beside --batch-requests", self)
        paths = [self.input, self.prompt, self.output, self.batch_requests, *self.batch_replies]
        places = [os.path.realpath(path) for path in paths if path]
        require(len(set(places)) == len(places), "output", "another file than the others", self)
        extra = self.extra
        require(isinstance(extra, dict), "extra_body", "a JSON object", self)
        for name in ("model", "messages", "prompt", "n"):
            require(name not in extra, "extra_body", f'without "{name}"', self)

    @property
    def errors(self) -> str:
        return f"{self.output}.errors.jsonl"

    @property
    def extra(self) -> dict[str, Any]:
        return parse_json(self.extra_body or "{}", "--extra-body")


def main(argv: list[str] | None = None, scale: float = 1.0) -> int:
    """Returns the exit status. scale: of every pause, to shorten them in tests."""
    config = cli.parse(argv, ExtractConfig)
    try:
        task = Task(config)
        rows = read_rows(task)
        if config.dry_run:
            print_estimate(task, rows)
            return 0
        with locked(config.output):
            return extract(task, rows, scale)
    except (OSError, ValueError) as error:
        return cli.fail("extract.py", 2, error)


class Task:
    """The request for each row, and how its reply is read."""

    def __init__(self, config: ExtractConfig) -> None:
        """Raises OSError, or ValueError for settings that do not fit together."""
        self.config = config
        self.prompt = load_prompt(config.prompt)
        base_url = config.base_url or os.environ.get("OPENAI_BASE_URL", "")
        self.teacher = Teacher(base_url, config.endpoint, config.header, config.timeout)
        if not (base_url or config.batch_requests or config.batch_replies or config.dry_run):
            raise ValueError("give --base-url, such as http://localhost:11434/v1 for Ollama")
        if config.rationalize and "{hint}" not in self.prompt.question:
            raise ValueError(f'{config.prompt}: --rationalize needs {{hint}} in "question"')
        params = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        params["stop"] = list(self.prompt.stop) or None
        params["stream"] = False
        params |= config.extra
        self.params = {name: value for name, value in params.items() if value is not None}
        self.said: set[str] = set()  # kinds of warnings

    def body(self, input: str, label: str | None) -> dict[str, Any]:
        """The request for one input."""
        config = self.config
        gold = label if config.rationalize else None
        if config.endpoint == "chat":
            question = {"messages": self.prompt.chat(input, gold)}
        else:
            question = {"prompt": self.prompt.completion(input, gold)}
        return {"model": config.model} | question | self.params

    def request_sha256(self, record: Record) -> str | None:
        """What makes two requests the same. None for a row that has a rationale, which is kept."""
        if record.rationale is not None:
            return None
        names = ("endpoint", "keep", "reasoning")
        others = {name: getattr(self.config, name) for name in names}
        whole = self.body(record.input, record.label) | others
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """The part of a row's `teacher` that is the same for all rows."""
        given = {"base_url": self.teacher.url, "prompt_sha256": self.prompt.sha256}
        for name in SETTINGS:
            given[name] = getattr(self.config, name)
        return given | {"params": self.params}

    def read(self, record: Record, body: dict[str, Any], reply: Reply) -> Answer:
        """The Answer in a reply. Raises RequestError for a reply without a text."""
        if reply.model and reply.model != self.config.model:
            self.say("model", f"asked for {self.config.model!r}, served by {reply.model!r}")
        sent = characters(body)
        if 0 < reply.usage["prompt"] * 8 < sent:
            what = f"the server read {reply.usage['prompt']:,} tokens of {sent:,} characters"
            self.say("cut", f"{what}; if it cuts prompts, give it a larger context")
        text = self.without_echo(reply.text, body)
        thoughts, said = split_thoughts(text, self.prompt.has_marker)
        thoughts = "\n".join(each for each in (reply.reasoning, thoughts) if each)
        if not said.strip() and not thoughts and not reply.cut_short:
            raise RequestError("empty", "the reply has no text", "moment", reply.text)
        answer = self.prompt.parse(said, record.input, reply.cut_short)
        if answer.error == "empty" and reply.cut_short:
            what = "all tokens went into thoughts; a larger --max-tokens may do"
            answer = replace(answer, detail=what)
        elif answer.error == "empty":
            what = "the answer is in the reasoning field, where the server's parser put it"
            answer = replace(answer, detail=what)
        if answer.error:
            self.say(answer.error, f"row {record.id!r}: {answer.error}: {answer.detail}")
        elif thoughts and self.config.reasoning == "keep":
            answer = replace(answer, rationale=f"{thoughts}\n{answer.rationale}")
        return answer

    def without_echo(self, text: str, body: dict[str, Any]) -> str:
        """The reply without the prompt, or its question, which some servers repeat before it."""
        whole = body.get("prompt") or body["messages"][-1]["content"]
        for sent in (whole.strip(), whole.split("\n\n")[-1].strip()):
            if text.lstrip().startswith(sent):
                self.say("echo", "the server repeats what it was sent; that is taken off")
                return text.lstrip().removeprefix(sent)
        return text

    def say(self, kind: str, warning: str) -> None:
        """Print a warning, once for each kind."""
        if kind not in self.said:
            self.said.add(kind)
            print_line(f"warning: {warning}")


def read_rows(task: Task) -> dict[str, Record]:
    """{id: row} of the input. Raises ValueError for a row that cannot be asked about."""
    config = task.config
    rows: dict[str, Record] = {}
    odd = []
    for record in read_jsonl(config.input):
        if len(rows) == config.limit > 0:
            break
        where = f"{config.input}: row {record.id!r}"
        if record.id in rows:
            raise ValueError(f"{where}: another row has this id; give each its own")
        if record.label is None and (config.rationalize or config.keep == "correct"):
            raise ValueError(
                f"{where} has no gold label, which --rationalize and --keep correct need"
            )
        try:
            task.prompt.ask(record.input)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if record.label is not None and task.prompt.read(record.label, record.input) is None:
            odd.append(f"{record.label!r} in row {record.id!r}")
        rows[record.id] = record
    if not rows:
        raise ValueError(f"{config.input}: there are no rows in it")
    if odd:
        kind = task.prompt.kind()
        task.say("gold", f"{len(odd):,} gold labels are no {kind}, for example {odd[0]}")
    return rows


def extract(task: Task, rows: dict[str, Record], scale: float) -> int:
    """Ask, write and print. Returns the exit status."""
    config = task.config
    if config.overwrite:
        for path in (config.output, config.errors):
            Path(path).unlink(missing_ok=True)
    state = read_state(config.output, config.errors, print_line)
    forget_other_failures(task, rows, state)
    todo = deque()
    for name, record in rows.items():
        done = state.get(name)
        if done is None or (config.retry_failed and done.kind not in (None, "incorrect")):
            todo.append(record)
    print_header(task, len(rows), len(todo))
    if config.batch_requests:
        return write_batch(task, todo)
    probe = task.prompt.exemplars[0] if task.prompt.exemplars else vars(todo[0]) if todo else {}
    asker = Asker(
        task.teacher,
        task.body(probe["input"], probe["label"]) if probe else {},
        config.max_retries,
        config.patience,
        task.say,
        scale,
    )
    tally = Tally(config, state)
    with Stop() as stop, progress_bar(len(rows), len(todo)) as bar:
        if config.batch_replies:
            outcomes = read_replies(task, rows, todo)
        else:
            outcomes = ask_all(task, asker, todo, stop)
        try:
            for made in outcomes:
                tally.write(made)
                bar.set_postfix_str(tally.bar_text(), refresh=False)
                bar.update(len(made))
        except OSError as error:  # a full disk, for one
            asker.end(cli.one_line(error))
    if not asker.stopped.is_set():
        put_in_order(config.output, rows)
        answered = {name for name, done in state.items() if done.kind is None}
        put_in_order(config.errors, rows, leave_out=answered)
    tally.print_summary()
    return finish(config, rows, state, asker)


def forget_other_failures(task: Task, rows: dict[str, Record], state: dict[str, Done]) -> None:
    """Forget failures under other settings: they are asked again.

    Raises ValueError, naming the setting, for a row that was answered under others.
    """
    for name, record in rows.items():
        done = state.get(name)
        if done is None or done.request_sha256 == task.request_sha256(record):
            continue
        del state[name]
        if done.kind is None:
            output = task.config.output
            changed = what_changed(output, name, task.provenance(), SETTINGS)
            raise ValueError(f"{output} was made with {changed}; name another --output")


def write_batch(task: Task, todo: Iterable[Record]) -> int:
    """Write the requests into files, and say how to go on."""
    requests = []
    for record in todo:
        if record.rationale is None:
            identity = custom_id(record.id, task.request_sha256(record))
            requests.append((identity, task.body(record.input, record.label)))
    config = task.config
    for path, number in write_requests(Path(config.batch_requests), requests, config.endpoint):
        print_line(f"{path}: {number:,} requests")
    print_line("next: the same command with --batch-replies FILE in place of --batch-requests")
    return 0


def read_replies(
    task: Task, rows: dict[str, Record], todo: Iterable[Record]
) -> Iterator[list[Record]]:
    """Yield the rows of batch files. Those without a reply stay to be asked.

    Raises ValueError for replies to requests that these settings and rows do not make.
    """
    replies = Replies(task.config.batch_replies)
    known = {custom_id(name, task.request_sha256(r)) for name, r in rows.items() if not r.rationale}
    foreign = sorted(replies.by_id.keys() - known)
    if foreign:
        what = f"{len(foreign):,} replies are to requests that these settings and rows do not make"
        raise ValueError(f"{task.config.batch_replies[0]}: {what}, such as {foreign[0]!r}")
    for record in todo:
        if record.rationale is not None:
            yield [replace(record, teacher=None)]
            continue
        body = task.body(record.input, record.label)
        identity = custom_id(record.id, task.request_sha256(record))
        try:
            reply = replies.ask(identity, body, task.teacher)
            if reply is None:
                continue
            answer = task.read(record, body, reply)
            asked = Asked(answer, reply.text, reply.model, usage=Counter(reply.usage))
        except RequestError as error:
            asked = Asked(Answer(error=error.kind, detail=str(error)), error.raw)
        yield [make_row(task, record, asked)]


def ask_all(task: Task, asker: Asker, todo: deque, stop: Stop) -> Iterator[list[Record]]:
    """Ask in --concurrency threads. Yield the rows as they come, all that are there at a time."""
    workers = min(task.config.concurrency, len(todo))
    results: queue.Queue = queue.Queue(maxsize=workers)  # nobody asks further ahead than is written
    for _ in range(workers):
        threading.Thread(target=work, args=(task, asker, todo, results), daemon=True).start()
    while workers:
        if stop.requested and not asker.stopped.is_set():
            print_line("ending: waiting for the requests in flight; Ctrl-C again ends at once")
            asker.stopped.set()
        arrived = []
        try:
            arrived.append(results.get(timeout=0.5))
            while True:
                arrived.append(results.get_nowait())
        except queue.Empty:
            pass
        for result in arrived:
            if isinstance(result, Exception):
                raise result
        workers -= arrived.count(None)
        yield [row for row in arrived if row]


def work(task: Task, asker: Asker, todo: deque, results: queue.Queue) -> None:
    """One thread. None in the queue is its end, an exception a bug."""
    try:
        while not asker.stopped.is_set():
            record = todo.popleft()
            if record.rationale is not None:
                results.put(replace(record, teacher=None))
                continue
            body = task.body(record.input, record.label)
            asked = asker.ask(body, partial(task.read, record, body))
            results.put(make_row(task, record, asked))
    except RequestError as error:
        asker.end(str(error))
    except (IndexError, Interrupted):
        pass
    except Exception as bug:
        results.put(bug)
    results.put(None)


def make_row(task: Task, record: Record, asked: Asked) -> Record:
    """The row with its answer or its error, and where it is from."""
    answer = asked.answer
    correct = None
    if not answer.error and record.label is not None:
        correct = task.prompt.same(answer.label, record.label, record.input)
        if task.config.keep == "correct" and not correct:
            what = f"--keep correct: the label {answer.label!r} is not the gold one"
            answer = replace(answer, error="incorrect", detail=what)
    teacher = task.provenance() | {
        "request_sha256": task.request_sha256(record),
        "model_served": asked.model or None,
        "usage": {name: asked.usage[name] for name in ("prompt", "completion", "cached")},
        "attempts": asked.attempts,
        "latency_s": round(asked.seconds, 3),
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    other = record.other | {"correct": correct}
    other.pop("error", None)
    rationale = answer.rationale
    label = answer.label
    if answer.error:
        raw = asked.raw[:RAW]
        other["error"] = {"kind": answer.error, "message": answer.detail, "raw": raw}
        rationale = None
        label = None
    return replace(record, rationale=rationale, teacher_label=label, teacher=teacher, other=other)


class Tally:
    """Writes rows, and counts what came of this start."""

    def __init__(self, config: ExtractConfig, state: dict[str, Done]) -> None:
        self.config = config
        self.state = state
        self.start = time.monotonic()
        self.kinds: Counter = Counter()  # of errors; None: answered
        self.spent: Counter = Counter()  # tokens
        self.retries = 0
        self.rationales: Counter = Counter()  # their hashes

    def write(self, rows: list[Record]) -> None:
        good = []
        failed = []
        for row in rows:
            kind = row.other.get("error", {}).get("kind")
            (failed if kind else good).append(row.to_json())
            self.state[row.id] = Done(kind, row.other.get("correct"))
            if row.teacher is None:
                continue  # kept as it came
            self.kinds[kind] += 1
            self.spent.update(row.teacher["usage"])
            self.retries += row.teacher["attempts"] - 1
            if kind is None:
                self.rationales[hash(row.rationale)] += 1
        append(self.config.output, good)
        append(self.config.errors, failed)

    def bar_text(self) -> str:
        good = self.kinds[None]
        counts = f"{good:,} ok, {self.kinds.total() - good:,} left out, {self.retries:,} retries"
        return counts + dollars(self.config, self.spent)

    def print_summary(self) -> None:
        asked = self.kinds.total()
        if not asked:
            return
        minutes, seconds = divmod(round(time.monotonic() - self.start), 60)
        good = self.kinds.pop(None, 0)
        left_out = f"{asked - good:,} left out"
        if asked > good:
            left_out += f" ({listed(self.kinds)})"
        counts = f"{good:,} ok, {left_out}; {self.retries:,} retries"
        print_line(f"asked {asked:,} rows in {minutes}m{seconds:02}s: {counts}")
        judged = [done.correct for done in self.state.values() if done.kind is None]
        judged = [correct for correct in judged if correct is not None]
        if judged:
            right = f"{sum(judged):,} of {len(judged):,} answered rows with a gold label"
            print_line(f"teacher right on {right} ({sum(judged) / len(judged):.1%})")
        tokens = f"{self.spent['prompt']:,} in ({self.spent['cached']:,} cached)"
        tokens = f"tokens: {tokens}, {self.spent['completion']:,} out"
        print_line(tokens + dollars(self.config, self.spent))
        alike = max(self.rationales.values(), default=0)
        if alike > 2 and alike > good / 2:
            what = "rows have the same rationale, word for word"
            print_line(f"warning: {alike:,} of {good:,} {what}")


def finish(
    config: ExtractConfig, rows: dict[str, Record], state: dict[str, Done], asker: Asker
) -> int:
    """Print what the files hold now. Returns the exit status."""
    kinds = Counter(state[name].kind for name in rows if name in state)
    done = kinds.pop(None, 0)
    failed = kinds.total() - kinds["incorrect"]  # left out by --keep correct, which is no failure
    print_line(f"{config.output}: {done:,} of {len(rows):,} rows")
    if kinds.total():
        again = "; --retry-failed asks again" if failed else ""
        print_line(f"{config.errors}: {listed(kinds)}{again}")
    goes_on = "what was finished is kept, the same command goes on"
    if asker.problem:
        return cli.fail("extract.py", 3, f"aborted: {one_line(asker.problem)} ({goes_on})")
    if asker.stopped.is_set():
        return cli.fail("extract.py", 130, f"interrupted; {goes_on}")
    missing = len(rows) - done - kinds.total()
    if missing:
        what = "rows have no reply yet; --batch-requests writes what is to be asked"
        print_line(f"{missing:,} {what}")
    errors = f" {config.errors}  # whose rows train the label task" if kinds.total() else ""
    print_line(f"next: python train.py --data {config.output}{errors}")
    return 1 if failed or missing else 0


def print_line(line: str) -> None:
    """A line on stderr, above a progress bar, without control characters of a server."""
    tqdm.write("".join(c if c.isprintable() else " " for c in line), file=sys.stderr)


def progress_bar(total: int, to_ask: int) -> tqdm:
    layout = "{n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"
    interval = 0.5 if sys.stderr.isatty() else 30  # seconds; in a log file a line is a line
    shown = {"bar_format": layout, "mininterval": interval, "disable": not to_ask}
    return tqdm(total=total, initial=total - to_ask, **shown)


def characters(body: dict[str, Any]) -> int:
    texts = [message["content"] for message in body.get("messages", [])]
    return len(body.get("prompt", "")) + sum(len(text) for text in texts)


def dollars(config: ExtractConfig, tokens: dict[str, int]) -> str:
    """`; $1.23`, or nothing where no prices are given."""
    if not (config.price_in or config.price_out):
        return ""
    cost = tokens["prompt"] * config.price_in + tokens["completion"] * config.price_out
    return f"; ${cost / 1e6:,.2f}"


def listed(kinds: Counter) -> str:
    """`truncated 5, unparsed 2`"""
    return ", ".join(f"{kind} {count:,}" for kind, count in sorted(kinds.items()) if count)


def print_header(task: Task, rows: int, to_ask: int) -> None:
    config = task.config
    teacher = f"{task.teacher.place}, {config.endpoint}, {config.model}"
    print_line(f"teacher: {', '.join(config.batch_replies) or teacher}")
    prompt = f"{config.prompt} (sha256 {task.prompt.sha256[:12]})"
    print_line(f"prompt:  {prompt}, {len(task.prompt.exemplars)} exemplars")
    before = f", {rows - to_ask:,} of them done or failed before" if rows > to_ask else ""
    print_line(f"rows:    {rows:,} in {config.input}{before}")


def print_estimate(task: Task, rows: dict[str, Record]) -> None:
    """Print the first request and what asking may cost, on stdout."""
    asked = [row for row in rows.values() if row.rationale is None]
    bodies = [task.body(row.input, row.label) for row in asked]
    if bodies:
        print(json.dumps(bodies[0], indent=2, ensure_ascii=False))
    replies = [len(task.prompt.reply(exemplar)) for exemplar in task.prompt.exemplars]
    length = sum(replies) / len(replies) if replies else 3 * task.config.max_tokens
    sent = sum(characters(body) for body in bodies) // 3
    written = round(len(bodies) * length / 3)
    cost = dollars(task.config, {"prompt": sent, "completion": written})
    print(f"requests: {len(bodies):,}; tokens, at 3 characters each: about {sent:,} in", end="")
    print(f", {written:,} out if answers are as long as the exemplars'{cost}")


if __name__ == "__main__":
    cli.run("extract.py", main)
