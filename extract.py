"""Ask an OpenAI-compatible teacher for a label and a rationale for every row.

    python extract.py --input rows.jsonl --output out.jsonl --prompt data/prompts/svamp.json \\
        --base-url http://localhost:11434/v1 --model NAME
    python train.py --data out.jsonl

Every row without a rationale is asked about once. A usable answer becomes a row of the output.
Anything else becomes a row of the errors file, with the raw text. The output is the state: the
same command continues where an earlier one ended. One thread reads, counts and writes;
--concurrency threads ask.
"""

import json
import os
import queue
import threading
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from data import cli
from data.asking import Asker
from data.batch_files import answers, read_replies, write_batch
from data.cli import require
from data.files import locked, parse_json
from data.jsonl import Record, read_jsonl
from data.output import Done, append, put_in_order, read_state
from data.prompt import Prompt, load_prompt
from data.requests import Requests
from data.tally import Tally, print_line
from data.teacher import RequestError, Teacher

SETTINGS = ("model", "endpoint", "rationalize", "keep", "reasoning")  # recorded with each row


@dataclass(frozen=True)
class ExtractConfig:
    """Ask a teacher for a label and a rationale for every row. train.py reads the rows written.

    Run the same command again to continue after an interruption; rows that are there are not asked
    again. Exit status: 0 every row is in the output; 1 some rows are in the errors file instead,
    whether they failed now or before (--retry-failed asks them again); 2 the arguments or files
    are wrong, nothing was sent; 3 the teacher cannot go on; 130 interrupted. What was finished is
    in the files in every case.
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
    endpoint: Literal["chat", "completions"] = "chat"  # completions: for base models
    header: tuple[str, ...] = ()  # more headers, 'NAME: VALUE'; $VARIABLE is the environment's
    temperature: float = 0.0  # 0: the likeliest text
    max_tokens: int = 256  # tokens of an answer, a reasoning model's thoughts included
    extra_body: str = "{}"  # more parameters, a JSON object; null leaves a parameter out
    # choice
    keep: Literal["all", "correct"] = "all"  # output all rows (the paper), or those right by gold
    rationalize: bool = False  # show the teacher the gold label and ask for the reasons
    reasoning: Literal["drop", "keep"] = "drop"  # keep: thoughts before the rationale
    # limits
    concurrency: int = 8  # requests in flight at most
    max_retries: int = 5  # further attempts after one that failed for the moment
    timeout: float = 600.0  # seconds without a byte of a reply
    patience: float = 600.0  # seconds to wait for a teacher that answers nobody
    price_in: float = 0.0  # $ per million prompt tokens
    price_out: float = 0.0  # $ per million tokens written
    max_cost: float = 0.0  # $ of this start, after which no request is sent; 0: no limit
    # batch files
    batch_requests: str = ""  # send nothing; write the requests to this file (OpenAI's batch API)
    batch_replies: tuple[str, ...] = ()  # send nothing; read the answers from these files

    def check(self) -> None:
        """Raise ValueError, naming the flag, for a value that makes no sense."""
        for name in ("input", "output", "prompt", "model"):
            require(getattr(self, name), name, "given", self)
        require(self.concurrency >= 1, "concurrency", "at least 1", self)
        priced = (self.price_in > 0 and self.price_out > 0) or not self.max_cost
        require(priced, "max_cost", "given with --price-in and --price-out", self)
        batch = self.batch_requests and self.batch_replies
        require(not batch, "batch_replies", "left out beside --batch-requests", self)
        paths = [self.input, self.prompt, self.output, self.batch_requests, *self.batch_replies]
        places = [os.path.realpath(path) for path in paths if path]
        require(len(set(places)) == len(places), "output", "another file than the others", self)
        extra = parse_json(self.extra_body, "--extra-body")
        good = isinstance(extra, dict) and not extra.keys() & {"model", "messages", "prompt", "n"}
        require(good, "extra_body", "a JSON object without model, messages, prompt and n", self)

    @property
    def errors(self) -> str:
        return f"{self.output}.errors.jsonl"


def main(argv: list[str] | None = None, scale: float = 1.0) -> int:
    """Returns the exit status. scale: of every pause, to shorten them in tests."""
    config = cli.parse(argv, ExtractConfig, "extract.py")
    try:
        base_url = config.base_url or os.environ.get("OPENAI_BASE_URL", "")
        teacher = Teacher(base_url, config.endpoint, config.header, config.timeout)
        if not (base_url or config.batch_requests or config.batch_replies or config.dry_run):
            raise ValueError("give --base-url, such as http://localhost:11434/v1 for Ollama")
        prompt = load_prompt(config.prompt)
        params = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        settings = {name: getattr(config, name) for name in SETTINGS}
        requests = Requests(prompt, settings, params | json.loads(config.extra_body))
        rows = read_rows(config, prompt)
        tally = Tally(config.price_in, config.price_out, config.max_cost)
        if config.dry_run:
            tally.print_estimate(requests, rows.values())
            return 0
        with locked(config.output):
            return extract(config, teacher, requests, rows, tally, scale)
    except (OSError, ValueError) as error:
        return cli.fail("extract.py", 2, error)


def read_rows(config: ExtractConfig, prompt: Prompt) -> dict[str, Record]:
    """{id: row} of the input. Raises ValueError for a row that cannot be asked about."""
    rows: dict[str, Record] = {}
    needs_gold = config.rationalize or config.keep == "correct"
    for record in read_jsonl(config.input):
        if len(rows) == config.limit > 0:
            break
        where = f"{config.input}: row {record.id!r}"
        if record.id in rows:
            raise ValueError(f"{where}: another row has this id; give each its own")
        if record.label is None and needs_gold:
            raise ValueError(f"{where} has no gold label, which --rationalize and --keep need")
        try:
            prompt.ask(record.input)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        rows[record.id] = record
    if not rows:
        raise ValueError(f"{config.input}: there are no rows in it")
    return rows


def extract(
    config: ExtractConfig,
    teacher: Teacher,
    requests: Requests,
    rows: dict[str, Record],
    tally: Tally,
    scale: float,
) -> int:
    """Ask, write and print. Returns the exit status."""
    if config.overwrite:
        for path in (config.output, config.errors):
            Path(path).unlink(missing_ok=True)
    state = read_state(config.output, config.errors)
    todo = rows_to_ask(config, requests, rows, state)
    if config.batch_requests:
        number = write_batch(config.batch_requests, requests, todo)
        print_line(f"{config.batch_requests}: {number:,} requests; next: --batch-replies FILE")
        return 0
    probe = requests.body([*requests.prompt.exemplars, *rows.values()][0])
    asker = Asker(teacher, probe, config.max_retries, config.patience, tally.warn, tally.pay, scale)
    stop = cli.Stop("ending: waiting for the requests in flight; Ctrl-C again ends at once")
    if config.batch_replies:
        replies = read_replies(config.batch_replies, requests, rows.values())
        answered = answers(replies, requests, asker, todo)
    else:
        answered = ask_all(asker, requests, todo, config.concurrency, stop)
    print_line(f"teacher: {teacher.place}, {config.endpoint}, {config.model}")
    print_line(f"rows: {len(rows):,} in {config.input}, {len(todo):,} of them to be asked")
    with stop, tally.progress_bar(len(todo)):
        try:
            copy_rows(config, rows, state)
            for row in answered:
                write(config, state, row)
                tally.add(row)
        except OSError as error:  # a full disk, for one
            asker.end(str(error))
    if not asker.stopped.is_set():
        put_in_order(config.output, rows)
        in_output = {name for name, done in state.items() if done.kind is None}
        put_in_order(config.errors, rows, leave_out=in_output)
    tally.print_summary()
    return finish(config, rows, state, asker)


def rows_to_ask(
    config: ExtractConfig, requests: Requests, rows: dict[str, Record], state: dict[str, Done]
) -> deque[Record]:
    """The rows without a rationale that are not done, and those that failed under other settings,
    which are forgotten.

    Raises ValueError for a row that was answered under other settings or has another input now.
    """
    todo = deque()
    for name, record in rows.items():
        if record.rationale is not None:
            continue
        done = state.get(name)
        if done and done.request_sha256 != requests.sha256(record):
            if done.kind is None:
                what = f"row {name!r} was asked with other settings, prompt file or input"
                raise ValueError(f"{config.output}: {what}; name another file")
            del state[name]
        failed = done and done.kind not in (None, "incorrect")
        if name not in state or (config.retry_failed and failed):
            todo.append(record)
    return todo


def copy_rows(config: ExtractConfig, rows: dict[str, Record], state: dict[str, Done]) -> None:
    """Write the rows that came with a rationale."""
    for name, record in rows.items():
        done = name in state and state[name].kind is None
        if record.rationale is not None and not done:
            write(config, state, replace(record, teacher=None))


def ask_all(
    asker: Asker, requests: Requests, todo: deque[Record], concurrency: int, stop: cli.Stop
) -> Iterator[Record]:
    """Ask in several threads. Yield the rows as they come."""
    workers = min(concurrency, len(todo))
    results: queue.Queue = queue.Queue(maxsize=workers)  # nobody asks further ahead than is written
    for _ in range(workers):
        threading.Thread(target=work, args=(asker, requests, todo, results), daemon=True).start()
    while workers:
        if stop.requested:
            asker.stopped.set()
        try:
            result = results.get(timeout=0.5)
        except queue.Empty:
            continue
        if result is None:
            workers -= 1
        else:
            yield result


def work(asker: Asker, requests: Requests, todo: deque, results: queue.Queue) -> None:
    """One thread. None in the queue is its end."""
    try:
        while not asker.stopped.is_set():
            record = todo.popleft()
            read = partial(requests.read, record, asker.warn)
            asked = asker.ask(requests.body(record), read)
            results.put(requests.row(record, asked, asker.teacher.url))
    except RequestError as error:
        asker.end(str(error))
    except (IndexError, cli.Interrupted):
        pass
    finally:
        results.put(None)


def write(config: ExtractConfig, state: dict[str, Done], row: Record) -> None:
    """Append a row to the output or the errors file, and to the state."""
    kind = None
    if row.teacher and "error" in row.other:
        kind = row.other["error"]["kind"]
    append(config.errors if kind else config.output, row)
    state[row.id] = Done(kind, None)


def finish(
    config: ExtractConfig, rows: dict[str, Record], state: dict[str, Done], asker: Asker
) -> int:
    """Print what the files hold now. Returns the exit status."""
    kinds = Counter(state[name].kind for name in rows if name in state)
    done = kinds.pop(None, 0)
    failed = kinds.total() - kinds["incorrect"]  # left out by --keep correct, which is no failure
    print_line(f"{config.output}: {done:,} of {len(rows):,} rows")
    if kinds:
        print_line(f"{config.errors}: {dict(kinds)}; --retry-failed asks failed rows again")
    goes_on = "what was finished is in the files, the same command goes on"
    if asker.problem:
        return cli.fail("extract.py", 3, f"aborted: {asker.problem} ({goes_on})")
    if asker.stopped.is_set():
        return cli.fail("extract.py", 130, f"interrupted; {goes_on}")
    missing = len(rows) - done - kinds.total()
    if missing:
        print_line(f"{missing:,} rows have no reply yet; --batch-requests writes their requests")
    print_line(f"next: python train.py --data {config.output}")
    return 1 if failed or missing else 0


if __name__ == "__main__":
    cli.run("extract.py", main)
