"""T5's tokenizer: SentencePiece, with </s> at the end and sentinels <extra_id_0> ... above its
pieces.

The ids are those of transformers' T5Tokenizer over the same `spiece.model`: pad 0, </s> 1, unknown
2, then pieces, then sentinels in falling order, so that <extra_id_0> is the last id. Special tokens
that are written out in a text are the tokens: the text is split at them, and each stretch between
is tokenized as a text of its own.
"""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

PAD = 0
EOS = 1
UNK = 2
SPIECE = "spiece.model"
CONFIG = "tokenizer_config.json"
FAST = "tokenizer.json"
CLASSES = ("T5Tokenizer", "T5TokenizerFast", "MT5Tokenizer", "MT5TokenizerFast")
CLASSES += (None, "PreTrainedTokenizerFast", "TokenizersBackend")  # these may be of any kind
LISTS = ("added_tokens", "additional_special_tokens", "extra_special_tokens")  # of tokens
LONGEST_TEXT = 20_000  # characters of a text that `train` looks at
LONG_WORD = r"(\S{100})\S+"  # its beginning is enough; a million letters would take minutes


class T5Tokenizer:
    """path: a spiece.model, or a directory that holds one.

    A tokenizer_config.json beside it may set `extra_ids`. Raises FileNotFoundError if there is no
    such file, ValueError, naming the file, if the tokenizer is not one of T5's or has added tokens.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        path = Path(path)
        if path.is_dir():
            check_kind(path)
            path = path / SPIECE
        self.model = read_bytes(path)  # the content of spiece.model
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError:
            raise ValueError(f"{path}: not a SentencePiece model") from None
        ids = (self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id())
        if ids != (PAD, EOS, UNK):
            raise ValueError(f"{path}: pad, </s> and unknown are {ids}; T5's are {(PAD, EOS, UNK)}")
        if not self.pieces.normalize("①").endswith("1"):  # by rules at the end of the file
            raise ValueError(
                f"{path}: trained with another normalization than T5's NFKC, or cut short"
            )
        config = path.with_name(CONFIG)
        self.extra_ids = read_json(config).get("extra_ids", 100)
        if self.extra_ids not in range(1001):
            raise ValueError(f"{config}: extra_ids is {self.extra_ids!r}, not from 0 to 1000")
        self.vocab_size = self.pieces.vocab_size() + self.extra_ids
        self.special = {}  # {text: id} of all special tokens
        for k in range(self.extra_ids):
            self.special[f"<extra_id_{k}>"] = self.vocab_size - 1 - k
        for i in (PAD, EOS, UNK):
            self.special[self.pieces.id_to_piece(i)] = i
        self.pattern = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")
        for token in listed_tokens(path.parent):
            is_piece = self.pieces.piece_to_id(token) != UNK  # mT5's sentinels are pieces
            if token not in self.special and not (is_piece and "<extra_id_" in token):
                raise ValueError(
                    f"{path.parent}: this tokenizer has added tokens such as {token!r}, "
                    "which this code does not read"
                )

    def encode(self, text: str) -> list[int]:
        """text -> ids, ending in </s>."""
        text = text.replace("\x85", " ")  # white space to transformers, unknown to SentencePiece
        ids = []
        for part in self.pattern.split(text):
            if part in self.special:
                ids.append(self.special[part])
            else:
                ids += self.pieces.encode(part)
        return [*ids, EOS]

    def decode(self, ids: Iterable[int]) -> str:
        """ids -> text, without special tokens."""
        first_sentinel = self.vocab_size - self.extra_ids
        return self.pieces.decode([i for i in ids if UNK < i < first_sentinel])

    def save(self, directory: str | os.PathLike) -> None:
        """Write spiece.model and tokenizer_config.json, by which transformers loads it, to an
        existing directory."""
        config = {"tokenizer_class": "T5Tokenizer", "extra_ids": self.extra_ids}
        write(Path(directory) / SPIECE, self.model)
        write(Path(directory) / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def check_kind(directory: Path) -> None:
    """Raise ValueError for a directory with another kind of tokenizer, or with T5's as a
    tokenizer.json alone."""
    if (directory / SPIECE).exists():
        return
    kind = read_json(directory / CONFIG).get("tokenizer_class")
    model = read_json(directory / FAST).get("model", {})
    if kind not in CLASSES or model.get("type", "Unigram") != "Unigram":
        raise ValueError(
            f"{directory / CONFIG}: this tokenizer ({kind}) is of another kind than T5's"
        )
    if (directory / FAST).exists():
        raise ValueError(
            f"{directory / FAST} is not read; copy the {SPIECE} of the model that it was "
            "fine-tuned from"
        )


def listed_tokens(directory: Path) -> list[str]:
    """The special and added tokens that the files beside a spiece.model name.

    Raises ValueError if they are not written as transformers writes them.
    """
    content = read_json(directory / CONFIG)
    content |= read_json(directory / "special_tokens_map.json")
    content |= read_json(directory / FAST)
    try:
        entries = list(read_json(directory / "added_tokens.json"))
        entries += content.get("added_tokens_decoder", {}).values()
        for name in LISTS:
            entries += content.get(name) or []
        return [entry["content"] if isinstance(entry, dict) else entry for entry in entries]
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{directory}: it has added tokens that cannot be read") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file."""
    if not path.exists():
        return {}
    content = read_bytes(path)
    try:
        return dict(json.loads(content))
    except (RecursionError, TypeError, ValueError):
        raise ValueError(f"{path}: not a JSON object") from None


def read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such SentencePiece model")
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path}: a git-lfs pointer, not the file itself; `git lfs pull` fetches it"
        )
    return content


def train(texts: Iterable[str], path: str | os.PathLike, vocab_size: int = 8000) -> T5Tokenizer:
    """Train a unigram SentencePiece model with T5's ids on texts and write it to `path`.

    vocab_size is the most pieces it may have; a small text gives fewer. The same texts give the
    same model. Raises ValueError if the texts are empty or have more characters than vocab_size.
    """
    texts = [re.sub(LONG_WORD, r"\1", text[:LONGEST_TEXT]) for text in texts]
    # SentencePiece proposes as pieces what two different words share, so that in a small text a
    # word always written alike ("How") falls into letters. Each repeated word is shown in a second
    # form.
    words = Counter()
    for text in texts:
        words.update(re.findall(r"\w+", text))
    second_forms = [f"{word}," for word, count in words.items() if count > 1]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts + second_forms),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            pad_piece="<pad>",
            normalization_rule_name="nmt_nfkc",
            character_coverage=1.0,
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError:
        raise ValueError(
            f"no tokenizer of {vocab_size} pieces can be trained on these texts: "
            "they are blank, or have more characters than that"
        ) from None
    write(Path(path), model.getvalue())
    return T5Tokenizer(path)


def write(path: Path, content: bytes) -> None:
    """Write a file, complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        raise OSError(problem.errno, problem.strerror, str(path)) from None
