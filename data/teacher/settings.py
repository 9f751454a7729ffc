"""What extract.py can be told: `ExtractConfig`, from which its command line is made."""

import os
from dataclasses import dataclass
from typing import Literal

from data.cli import require
from data.files import parse_json


@dataclass(frozen=True)
class ExtractConfig:
    """Ask a teacher for a label and a rationale for every row, and write them as rows that train.py reads.

    Run the same command again to go on after an interruption; rows that are there are not asked again.
    Exit status: 0 every row is in the output; 1 some rows are in the errors file instead, whether they failed now or
    before (--retry-failed asks them again); 2 the arguments or files are wrong, nothing was sent; 3 aborted, the
    teacher cannot go on; 130 interrupted. Whatever was finished is kept in every case.
    """

    # rows
    input: str = ""  # rows to ask about, JSONL: "input", "label" (gold, if known), "id" (if none, file name and line)
    output: str = ""  # where answered rows are written, JSONL; also the state that a second start goes on from
    prompt: str = ""  # prompt file, such as data/prompts/svamp.json
    errors: str = ""  # where rows without a usable answer are written; default: OUTPUT.errors.jsonl
    limit: int = 0  # only the first N rows of the input; 0: all
    replace: bool = False  # ask also about rows that have a rationale, which are otherwise kept as they are
    overwrite: bool = False  # begin anew: delete the output and the errors file first
    retry_failed: bool = False  # ask the rows of the errors file again
    dry_run: bool = False  # print one request, the rows, tokens and cost; send and write nothing
    # teacher
    base_url: str = ""  # URL up to and with /v1; default: $OPENAI_BASE_URL
    model: str = ""  # the teacher's name, as the server knows it
    endpoint: Literal["chat", "completions"] = "chat"  # chat, or plain text to go on from (for base models)
    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key; unset: no key is sent
    header: tuple[str, ...] = ()  # more headers, each 'NAME: VALUE'; a $VARIABLE in VALUE is the environment's
    extra_body: str = ""  # more parameters for every request, a JSON object
    # sampling
    temperature: float = 0.0  # 0: the likeliest text
    top_p: float | None = None  # nucleus sampling; default: the server's own
    max_tokens: int = 256  # tokens of an answer, a reasoning model's thoughts included
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # newer models want the second
    no_stop: bool = False  # do not send the prompt file's stop texts, which some models refuse
    seed: int | None = None  # sent with every request
    # choice
    keep: Literal["all", "correct"] = "all"  # all (the paper), or only the rows whose label is the gold one
    rationalize: bool = False  # show the teacher the gold label and ask for the reasons
    reasoning: Literal["drop", "keep"] = "drop"  # a reasoning model's thoughts: not in the rationale, or before it
    # limits
    concurrency: int = 8  # requests in flight at most
    max_retries: int = 5  # further attempts after one that failed for the moment
    timeout: float = 600.0  # seconds for a whole reply
    patience: float = 600.0  # seconds to wait for a teacher that is gone, or that only says 429
    rpm: int = 0  # requests a minute at most; 0: no limit
    max_consecutive_failures: int = 20  # abort after so many rows in a row without a usable answer; 0: never
    price_in: float = 0.0  # $ per million prompt tokens
    price_out: float = 0.0  # $ per million tokens written
    # batch files
    batch_requests: str = ""  # send nothing; write the requests to this file, in the form of OpenAI's batch API
    batch_rows: int = 50000  # requests in a file at most; more go to F-2.jsonl, F-3.jsonl, ...
    batch_replies: tuple[str, ...] = ()  # send nothing; read the answers from these files

    def check(self):
        """Raise ValueError, naming the flag, for a value that makes no sense."""
        for name in ("input", "output", "prompt", "model"):
            require(getattr(self, name), name, "given", self)
        for name in ("max_tokens", "concurrency", "batch_rows"):
            require(getattr(self, name) >= 1, name, "at least 1", self)
        for name in ("limit", "max_retries", "rpm", "max_consecutive_failures", "price_in", "price_out"):
            require(getattr(self, name) >= 0, name, "0 or more", self)
        require(0 <= self.temperature <= 2, "temperature", "from 0 to 2", self)
        require(self.top_p is None or 0 < self.top_p <= 1, "top_p", "more than 0 and at most 1", self)
        require(0 < self.timeout < 1e6, "timeout", "more than 0", self)
        require(0 <= self.patience < 1e6, "patience", "0 or more", self)
        require(not (self.overwrite and self.retry_failed), "retry_failed", "left out beside --overwrite", self)
        twice = self.batch_requests and self.batch_replies
        require(not twice, "batch_replies", "left out beside --batch-requests", self)
        paths = [self.input, self.prompt, self.output, self.errors_path, self.batch_requests, *self.batch_replies]
        paths = [os.path.realpath(path) for path in paths if path]
        require(len(set(paths)) == len(paths), "output", "another file than --input, --errors, --prompt, ...", self)
        require(os.path.isdir(os.path.dirname(self.output) or "."), "output", "in a directory that exists", self)
        for name in ("model", "messages", "prompt", "n", "stream"):
            require(name not in self.extra, "extra_body", f'without "{name}"', self)

    def params(self, stop):
        """The parameters of every request, besides the model and the question. stop: the prompt file's texts."""
        params = {"temperature": self.temperature, self.max_tokens_field: self.max_tokens}
        optional = {"top_p": self.top_p, "seed": self.seed, "stop": None if self.no_stop else list(stop) or None}
        return params | {name: value for name, value in optional.items() if value is not None} | self.extra

    @property
    def errors_path(self):
        return self.errors or f"{self.output}.errors.jsonl"

    @property
    def extra(self):
        """--extra-body as a dict. Raises ValueError for what is not a JSON object."""
        extra = parse_json(self.extra_body or "{}", "--extra-body")
        require(isinstance(extra, dict), "extra_body", "a JSON object", self)
        return extra
