"""A trained student: what it answers, how it explains, and how likely it finds each label of a closed set.

train.py evaluates with it while it trains, and `python -m dss.predict` is its command line. README.md has an example.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.answers import same_label
from data.files import read_json, write_json
from data.jsonl import Record
from dss.batch import EXPLAIN, PREDICT, SEPARATOR, label_ids, shorten
from dss.config import METHODS, METRICS, TrainConfig
from dss.generate import generate, score
from dss.model import T5
from dss.weights import load_t5, resolve_checkpoint, save_t5
from tokenizer import T5Tokenizer

ABOUT = "dss.json"  # beside config.json in a student's directory; transformers does not read it


@dataclass
class Student:
    """A T5 with its tokenizer, and what dss.json says of its training."""

    model: T5  # on any device
    tokenizer: T5Tokenizer
    method: str = "dss"  # one of dss.config.METHODS; it says where in an output the label is
    prefixes: dict[str, str] = field(default_factory=lambda: {"predict": PREDICT, "explain": EXPLAIN})
    metric: str = "text"  # how a label counts as right: text, choice or equation
    labels: list[str] = field(default_factory=list)  # the closed set of labels; empty if there is none
    max_input_length: int = TrainConfig.max_input_length  # tokens, prefix and </s> included
    max_target_length: int = TrainConfig.max_target_length  # tokens of a rationale
    max_new_tokens: int = TrainConfig.max_new_tokens  # tokens of a label
    dtype: str = "float32"  # or bfloat16: autocast
    batch_size: int = 64  # inputs at a time

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu", **settings) -> "Student":
        """The student in OUT/METHOD/student, or any T5 (a directory or a hub id) trained with these prefixes.

        settings: fields that override dss.json. Raises OSError or ValueError, naming the file.
        """
        if (Path(directory) / "student").is_dir():
            raise ValueError(f"{directory}: this is the output of a run; its student is {directory}/student")
        directory = resolve_checkpoint(directory)
        tokenizer, model = T5Tokenizer(directory), load_t5(directory).to(device)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"{directory}: the tokenizer has more ids than the student embeds")
        return cls(model, tokenizer, **read_about(directory / ABOUT) | settings)

    def save(self, directory: str | Path) -> None:
        """Write weights, configuration and tokenizer in Hugging Face's layout, and dss.json."""
        save_t5(self.model, directory)
        self.tokenizer.save(directory)
        write_json(Path(directory) / ABOUT, {name: getattr(self, name) for name in KEYS})

    def answer(self, inputs: Sequence[str]) -> list[str]:
        """The label for each input, decoded greedily."""
        return [label for label, _ in self.answer_with_rationale(inputs)]

    def answer_with_rationale(self, inputs: Sequence[str]) -> list[tuple[str, str | None]]:
        """(label, rationale) for each input; the rationale is None, except for single_task."""
        if self.method == "single_task":  # rationale <extra_id_0> label; without a separator there is no label
            return self.write_both(inputs)
        stop = self.tokenizer.special.get(SEPARATOR) if self.method == "label_first" else None
        return [(self.tokenizer.decode(ids), None) for ids in self.write("predict", inputs, self.max_new_tokens, stop)]

    def explain(self, inputs: Sequence[str]) -> list[str]:
        """The student's own rationale for each input: its second task, or the part of its output that is one."""
        if self.method in ("single_task", "label_first"):
            return [rationale for _, rationale in self.write_both(inputs)]
        return [self.tokenizer.decode(ids) for ids in self.write("explain", inputs, self.max_target_length)]

    def write_both(self, inputs: Sequence[str]) -> list[tuple[str, str]]:
        """(label, rationale) for each input, if a student writes both: the first separator is between them."""
        separator, both = self.tokenizer.special.get(SEPARATOR), []
        for ids in self.write("predict", inputs, self.max_target_length):
            cut = ids.index(separator) if separator in ids else len(ids)
            parts = self.tokenizer.decode(ids[:cut]), self.tokenizer.decode(ids[cut + 1 :])
            both.append(parts[::-1] if self.method == "single_task" else parts)
        return both

    def score(self, inputs: Sequence[str], labels: Sequence[Sequence[str]]) -> list[dict[str, float]]:
        """{label: probability} for each input and its set of labels, likeliest first.

        p(label | input) is the product of its tokens' probabilities, the token that ends it included; the products are
        divided by their sum. Raises ValueError for a single_task student, whose label depends on the rationale before
        it, and for two labels that are the same tokens.
        """
        if self.method == "single_task":
            raise ValueError("a single_task student writes its rationale before its label: it cannot score labels")
        candidates = [[label_ids(self.tokenizer, label, self.method) for label in row] for row in labels]
        for row, ids in zip(labels, candidates):
            if len({tuple(c) for c in ids}) < len(ids):
                raise ValueError(f"two of these labels are the same tokens to this student: {', '.join(row)}")
        self.model.eval()
        with self.autocast():
            likelihoods = score(self.model, self.encode("predict", inputs), candidates, self.batch_size)
        ranked = [sorted(zip(row, logs), key=lambda pair: -pair[1]) for row, logs in zip(labels, likelihoods)]
        shares = [torch.tensor([log for _, log in row], dtype=torch.float64).softmax(0).tolist() for row in ranked]
        return [dict(zip((label for label, _ in row), some)) for row, some in zip(ranked, shares)]

    def evaluate(self, rows: Sequence[Record]) -> tuple[list[bool], list[tuple[str, str | None]]]:
        """(right or not, (label, rationale)) of the student's answer to each row with a label."""
        answers = self.answer_with_rationale([row.input for row in rows])
        right = [same_label(label, row.label, self.metric, row.input) for (label, _), row in zip(answers, rows)]
        return right, answers

    def write(self, prefix: str, inputs: Sequence[str], longest: int, stop: int | None = None) -> list[list[int]]:
        """What the model writes after a prefix ("predict" or "explain"): at most `longest` token ids for each input."""
        self.model.eval()
        with self.autocast():
            return generate(self.model, self.encode(prefix, inputs), longest, self.batch_size, stop)

    def encode(self, prefix: str, inputs: Sequence[str]) -> list[list[int]]:
        texts = [self.prefixes[prefix] + text for text in inputs]
        return [shorten(self.tokenizer.encode(text), self.max_input_length) for text in texts]

    def autocast(self) -> torch.autocast:
        device = self.model.embedding.weight.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.dtype == "bfloat16")


KEYS = ("method", "prefixes", "metric", "labels", "max_input_length", "max_target_length", "max_new_tokens")


def read_about(path: Path) -> dict:
    """The fields of a Student that dss.json sets; none where there is no such file. Raises ValueError, naming it."""
    if not path.exists():
        return {}
    about = read_json(path)
    good = isinstance(about, dict) and about.keys() == set(KEYS)
    if good:
        method, prefixes, metric, labels, *lengths = (about[key] for key in KEYS)
        good = method in METHODS and metric in METRICS and isinstance(prefixes, dict) and isinstance(labels, list)
        good = good and prefixes.keys() == {"predict", "explain"}
        good = good and all(isinstance(text, str) for text in [*prefixes.values(), *labels])
        good = good and all(type(n) is int and 1 <= n <= 2**20 for n in lengths)
    if not good:
        raise ValueError(f"{path}: not a valid {ABOUT}; delete it to use the defaults")
    return about
