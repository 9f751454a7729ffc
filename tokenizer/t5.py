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

import sentencepiece

PAD = 0
EOS = 1
UNK = 2
TOKENS = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNK}  # names in tokenizer_config.json
SPIECE = "spiece.model"
CONFIG = "tokenizer_config.json"
LONGEST_TEXT = 20_000  # characters of a text that `train` looks at
LONGEST_WORD = 100  # characters of a word; one of a million letters would take minutes


class T5Tokenizer:
    """path: a spiece.model, or a directory that holds one.

    A tokenizer_config.json beside it may set `extra_ids`. Raises FileNotFoundError if there is no
    such file, ValueError if it is not a SentencePiece model with T5's ids.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        path = Path(path)
        if path.is_dir():
            path = path / SPIECE
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such SentencePiece model")
        self.model = path.read_bytes()  # the content of spiece.model
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError:
            raise ValueError(f"{path}: not a SentencePiece model") from None
        ids = (self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id())
        if ids != (PAD, EOS, UNK):
            raise ValueError(f"{path}: pad, </s> and unknown are {ids}; T5's are {(PAD, EOS, UNK)}")
        if not self.pieces.normalize("①").endswith("1"):  # by rules at the end of the file
            raise ValueError(
                f"{path}: its normalization is not T5's (NFKC), or the file was cut short"
            )
        self.extra_ids = read_extra_ids(path.with_name(CONFIG), self.pieces)
        self.vocab_size = self.pieces.vocab_size() + self.extra_ids
        self.special = {}  # {text: id} of all special tokens
        for k in range(self.extra_ids):
            self.special[f"<extra_id_{k}>"] = self.vocab_size - 1 - k
        for i in TOKENS.values():
            self.special[self.pieces.id_to_piece(i)] = i
        self.pattern = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")

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
        for name, i in TOKENS.items():
            config[name] = self.pieces.id_to_piece(i)
        write(Path(directory) / SPIECE, self.model)
        write(Path(directory) / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def read_extra_ids(path: Path, pieces: sentencepiece.SentencePieceProcessor) -> int:
    """`extra_ids` of a tokenizer_config.json, 100 if there is none.

    Raises ValueError, naming the file, if its special tokens are not those of the model.
    """
    if not path.is_file():
        return 100
    try:
        config = json.loads(path.read_text("utf-8"))
        extra_ids = config.get("extra_ids", 100)
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{path}: not a tokenizer configuration") from None
    if type(extra_ids) is not int or not 0 <= extra_ids <= 1000:
        raise ValueError(f"{path}: extra_ids is {extra_ids!r}, not from 0 to 1000")
    for name, i in TOKENS.items():
        token = config.get(name, pieces.id_to_piece(i))
        if isinstance(token, dict):
            token = token.get("content")
        if token != pieces.id_to_piece(i):
            raise ValueError(
                f"{path}: {name} is {token!r}, but {SPIECE} has {pieces.id_to_piece(i)!r}"
            )
    return extra_ids


def train(texts: Iterable[str], path: str | os.PathLike, vocab_size: int = 8000) -> T5Tokenizer:
    """Train a unigram SentencePiece model with T5's ids on texts and write it to `path`.

    vocab_size is the most pieces it may have; a small text gives fewer. The same texts give the
    same model. Raises ValueError if the texts are empty or have more characters than vocab_size.
    """
    texts = [shorten(text) for text in texts]
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
            model_type="unigram",
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
    except RuntimeError as problem:
        # SentencePiece says "... 5 vs 30": what it was given and what it needs
        needed = re.search(r"\d+ vs (\d+)", str(problem))
        reason = "too few for pad, </s> and unknown"
        if not any(text.strip() for text in texts):
            reason = "they are all blank"
        elif needed:
            reason = f"their characters alone need {needed[1]}"
        raise ValueError(
            f"no tokenizer of {vocab_size} pieces can be trained on these texts: {reason}"
        ) from None
    write(Path(path), model.getvalue())
    return T5Tokenizer(path)


def shorten(text: str) -> str:
    """The beginning of a text, with the beginning of each word."""
    return re.sub(rf"(\S{{{LONGEST_WORD}}})\S+", r"\1", text[:LONGEST_TEXT])


def write(path: Path, content: bytes) -> None:
    """Write a file, complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        raise OSError(problem.errno, problem.strerror, str(path)) from None
