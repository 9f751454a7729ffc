"""A trained student: what it answers, how it explains, and how likely it finds each of some labels.

train.py evaluates with it while it trains, and `python -m dss.predict` is its command line.
README.md has an example.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.answers import CHOICES, same_label, written
from data.files import read_json, write_json
from data.jsonl import Record
from dss.config import TrainConfig
from dss.generate import generate, score
from dss.methods import EXPLAIN, METHODS, PREDICT, SEPARATOR, Method, label_ids, shorten
from dss.model import T5
from dss.weights import load_t5, resolve_checkpoint, save_t5
from tokenizer import T5Tokenizer

ABOUT = "dss.json"  # beside config.json in a student's directory; transformers does not read it


@dataclass(frozen=True)
class Prediction:
    label: str
    rationale: str | None = None  # where the student writes one before its label


@dataclass
class Student:
    """A T5 with its tokenizer, and what dss.json says of its training."""

    model: T5  # on any device
    tokenizer: T5Tokenizer
    method: str = "dss"  # a name in dss.methods.METHODS; it says where in an output the label is
    metric: str = "text"  # how a label counts as right: text, choice or equation
    labels: list[str] = field(default_factory=list)  # the closed set of labels, if there is one
    answers: str = "write"  # or likeliest: of the choices that an input lists, else of `labels`
    max_input_length: int = TrainConfig.max_input_length  # tokens, prefix and </s> included
    max_target_length: int = TrainConfig.max_target_length  # tokens of a rationale
    max_new_tokens: int = TrainConfig.max_new_tokens  # tokens of a label
    dtype: str = "float32"  # or bfloat16: autocast
    batch_size: int = 64  # inputs at a time

    @classmethod
    def load(
        cls, directory: str | Path, device: str | torch.device = "cpu", **settings: object
    ) -> "Student":
        """The student in OUT/METHOD/student, or any T5 (a directory or a hub id) trained with these
        prefixes.

        settings: fields that override dss.json. Raises OSError or ValueError, naming the file.
        """
        directory = resolve_checkpoint(directory)
        tokenizer = T5Tokenizer(directory)
        model = load_t5(directory).to(device)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"{directory}: the tokenizer has more ids than the student embeds")
        about = read_about(directory / ABOUT)
        return cls(model, tokenizer, **(about | settings))

    def save(self, directory: str | Path) -> None:
        """Write weights, configuration and tokenizer in Hugging Face's layout, and dss.json."""
        save_t5(self.model, directory)
        self.tokenizer.save(directory)
        write_json(Path(directory) / ABOUT, {name: getattr(self, name) for name in KEYS})

    def answer(self, inputs: list[str]) -> list[str]:
        """The label for each input: written greedily, or the likeliest (see `answers`)."""
        return [prediction.label for prediction in self.predict(inputs)]

    def predict(self, inputs: list[str]) -> list[Prediction]:
        """As `answer`, with the rationales that are written before labels."""
        if self.of_method.label_position == "last":
            return self.write_both(inputs)
        if self.answers == "likeliest":
            return self.choose(inputs)
        end = None
        if self.of_method.label_position == "first":
            end = self.tokenizer.special.get(SEPARATOR)
        outputs = self.write(PREDICT, inputs, self.max_new_tokens, end)
        return [Prediction(self.tokenizer.decode(ids)) for ids in outputs]

    def is_right(self, label: str, row: Record) -> bool:
        """Whether a label that the student gave is the row's own."""
        return same_label(label, row.label, self.metric, row.input)

    def choose(self, inputs: list[str]) -> list[Prediction]:
        """The likeliest label for each input, of the choices it lists or else of the closed set.

        Raises ValueError for an input that lists no choices where there is no closed set.
        """
        candidates = []
        for text in inputs:
            choices = [choice for _, choice in CHOICES.findall(text)] or self.labels
            if not choices:
                raise ValueError(
                    f"no choices in the input {text[:60]!r}, and no closed set of labels"
                )
            by_ids = {tuple(label_ids(self.tokenizer, x, self.method)): x for x in choices}
            candidates.append(list(by_ids.values()))  # a choice may be listed twice
        return [Prediction(next(iter(ranked))) for ranked in self.score(inputs, candidates)]

    def explain(self, inputs: list[str]) -> list[str]:
        """The student's own rationale for each input: its second task, or the part of its output
        that is one.

        Raises ValueError for a student that was trained without rationales.
        """
        if not self.of_method.learns_rationales:
            raise ValueError(
                f"a {self.method} student was trained without rationales: it has none to give"
            )
        if self.of_method.label_position == "alone":
            outputs = self.write(EXPLAIN, inputs, self.max_target_length)
            return [self.tokenizer.decode(ids) for ids in outputs]
        return [prediction.rationale for prediction in self.write_both(inputs)]

    def write_both(self, inputs: list[str]) -> list[Prediction]:
        """Label and rationale, if a student writes both in one output: the first separator is
        between them."""
        separator = self.tokenizer.special.get(SEPARATOR)
        predictions = []
        for ids in self.write(PREDICT, inputs, self.max_target_length):
            end = ids.index(separator) if separator in ids else len(ids)
            first = self.tokenizer.decode(ids[:end])
            second = self.tokenizer.decode(ids[end + 1 :])
            if self.of_method.label_position == "first":
                predictions.append(Prediction(label=first, rationale=second))
            else:
                predictions.append(Prediction(label=second, rationale=first))
        return predictions

    def score(self, inputs: list[str], labels: list[list[str]]) -> list[dict[str, float]]:
        """{label: probability} for each input and its set of labels, likeliest first.

        p(label | input) is the product of its tokens' probabilities, the token that ends it
        included; the products are divided by their sum. Raises ValueError for a student that writes
        its rationale first, since its label depends on that, and for two labels that are the same
        tokens.
        """
        if self.of_method.label_position == "last":
            raise ValueError(
                f"a {self.method} student writes its rationale before its label: "
                "it cannot score labels"
            )
        candidates = []
        for row in labels:
            ids = [label_ids(self.tokenizer, label, self.method) for label in row]
            if len({tuple(candidate) for candidate in ids}) < len(ids):
                raise ValueError(
                    f"two of these labels are the same tokens to this student: {', '.join(row)}"
                )
            candidates.append(ids)
        self.model.eval()
        with self.autocast():
            encoded = self.encode(PREDICT, inputs)
            likelihoods = score(self.model, encoded, candidates, self.batch_size)
        ranked = []
        for row, logs in zip(labels, likelihoods):
            shares = torch.tensor(logs, dtype=torch.float64).softmax(0).tolist()
            likeliest_first = sorted(zip(logs, row, shares), reverse=True)
            ranked.append({label: share for _, label, share in likeliest_first})
        return ranked

    def confidence(self, answers: list[tuple[str, str]]) -> list[float]:
        """The probability of each answer among the closed set; 0 for one that is none of it.

        answers: (input, label that the student gave) pairs.
        """
        labels = [written(label) for label in self.labels]
        scores = self.score([text for text, _ in answers], [labels] * len(answers))
        return [row.get(written(label), 0.0) for row, (_, label) in zip(scores, answers)]

    def write(
        self, prefix: str, inputs: list[str], longest: int, stop: int | None = None
    ) -> list[list[int]]:
        """What the model writes after a prefix: at most `longest` token ids for each input, none
        for a blank one."""
        encoded = self.encode(prefix, inputs)
        asked = [i for i, text in enumerate(inputs) if text.strip()]
        self.model.eval()
        with self.autocast():
            given = [encoded[i] for i in asked]
            found = generate(self.model, given, longest, self.batch_size, stop)
        outputs = [[] for _ in inputs]
        for i, ids in zip(asked, found):
            outputs[i] = ids
        return outputs

    def encode(self, prefix: str, inputs: list[str]) -> list[list[int]]:
        """The ids of each input after a prefix. Raises TypeError for a text in place of a list."""
        if isinstance(inputs, str):
            raise TypeError("inputs must be a list of texts, not a text")
        encoded = [self.tokenizer.encode(prefix + text) for text in inputs]
        return [shorten(ids, self.max_input_length) for ids in encoded]

    def autocast(self) -> torch.autocast:
        device = self.model.embedding.weight.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.dtype == "bfloat16")

    @property
    def of_method(self) -> Method:
        return METHODS[self.method]


LENGTHS = ("max_input_length", "max_target_length", "max_new_tokens")
KEYS = ("method", "metric", "labels", "answers", *LENGTHS)  # of dss.json


def read_about(path: Path) -> dict:
    """The fields of a Student that dss.json sets; none where there is no such file. Raises
    ValueError, naming it."""
    if not path.exists():
        return {}
    about = read_json(path)
    if not isinstance(about, dict) or about.get("method") not in METHODS:
        raise ValueError(f"{path}: no method that this code has; known: {', '.join(METHODS)}")
    return {name: about[name] for name in KEYS if name in about}
