"""T5's tokenizer: SentencePiece, with </s> at the end and the sentinels <extra_id_0> ... above its pieces.

The ids are those of transformers' T5Tokenizer over the same `spiece.model`: pad 0, </s> 1, unknown 2, then pieces, then
sentinels in falling order, so that <extra_id_0> is the last id. Special tokens written out in a text are the tokens:
the text is split at them, and each stretch between is tokenized as a text of its own.
"""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

PAD, EOS, UNK = 0, 1, 2
TOKENS = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNK}  # as a tokenizer_config.json names them
SPIECE, CONFIG = "spiece.model", "tokenizer_config.json"
LONGEST_TEXT, LONGEST_WORD = 20_000, 100  # characters that `train` looks at: a word of a million letters takes minutes


class T5Tokenizer:
    """path: a spiece.model, or a directory that holds one. A tokenizer_config.json beside it may set `extra_ids`.

    Raises FileNotFoundError if there is no such file, ValueError if it is no SentencePiece model with T5's ids.
    """

    def __init__(self, path: str | os.PathLike):
        path = Path(path)
        path = path / SPIECE if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such SentencePiece model")
        self.model = path.read_bytes()
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError:
            raise ValueError(f"{path}: not a SentencePiece model") from None
        ids = (self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id())
        if ids != (PAD, EOS, UNK):
            raise ValueError(f"{path}: pad, </s> and unknown have ids {ids}; T5's are {(PAD, EOS, UNK)}")
        if not self.pieces.normalize("①").endswith("1"):  # NFKC, whose rules stand at the end of the file
            raise ValueError(f"{path}: it does not normalize texts as T5's does; it may have been cut short")
        self.extra_ids = configured_extra_ids(path.with_name(CONFIG), self.pieces.id_to_piece)
        self.vocab_size = self.pieces.vocab_size() + self.extra_ids
        self.special = {f"<extra_id_{k}>": self.vocab_size - 1 - k for k in range(self.extra_ids)}
        self.special |= {self.pieces.id_to_piece(i): i for i in (PAD, EOS, UNK)}
        self.split = re.compile("(" + "|".join(map(re.escape, self.special)) + ")").split

    def encode(self, text: str) -> list[int]:
        """text -> ids, ending in </s>."""
        ids = []
        for part in self.split(text.replace("\x85", " ")):  # white space to transformers, unknown to SentencePiece
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
        """Write spiece.model and the configuration by which transformers loads it, to an existing directory."""
        config = {"tokenizer_class": "T5Tokenizer", "extra_ids": self.extra_ids}
        config |= {key: self.pieces.id_to_piece(i) for key, i in TOKENS.items()}
        write(Path(directory) / SPIECE, self.model)
        write(Path(directory) / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def configured_extra_ids(path, id_to_piece):
    """`extra_ids` of a tokenizer_config.json, where there is one, whose special tokens must be those of the model."""
    try:
        config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        value = config.get("extra_ids", 100)
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{path}: not a tokenizer configuration") from None
    if type(value) is not int or not 0 <= value <= 1000:
        raise ValueError(f"{path}: extra_ids is {value!r}, not from 0 to 1000")
    for key, i in TOKENS.items():
        token = config.get(key, id_to_piece(i))
        if id_to_piece(i) not in (token, isinstance(token, dict) and token.get("content")):
            raise ValueError(f"{path}: {key} is {token!r}, but {SPIECE} has {id_to_piece(i)!r}")
    return value


def train(texts: Iterable[str], path: str | os.PathLike, vocab_size: int = 8000) -> T5Tokenizer:
    """Train a unigram SentencePiece model with T5's ids on an iterable of texts and write it to `path`.

    vocab_size is the most pieces it may have; a small text gives fewer. The same texts give the same model. Returns its
    T5Tokenizer. Raises ValueError if the texts are empty or have more characters than vocab_size.
    """
    texts = [re.sub(rf"(\S{{{LONGEST_WORD}}})\S+", r"\1", text[:LONGEST_TEXT]) for text in texts]
    # SentencePiece proposes as pieces what two different words share, so that in a small text a word always written
    # alike ("How") falls into letters. Every repeated word is therefore shown in a second form.
    words = Counter(word for text in texts for word in re.findall(r"\w+", text))
    second_forms = [f"{word}," for word, count in words.items() if count > 1]
    t5 = dict(model_type="unigram", normalization_rule_name="nmt_nfkc", character_coverage=1.0)
    t5 |= dict(pad_id=PAD, eos_id=EOS, unk_id=UNK, bos_id=-1, pad_piece="<pad>")
    limits = dict(vocab_size=vocab_size, hard_vocab_limit=False, max_sentence_length=1 << 20, num_threads=1)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts + second_forms), model_writer=model, minloglevel=2, **t5, **limits
        )
    except RuntimeError as problem:
        if not any(map(str.strip, texts)):
            why = "they are all blank"
        else:  # SentencePiece says "... 5 vs 30", what it was given and what it needs
            need = re.search(r"(\d+) vs (\d+)", str(problem))
            why = f"their characters alone need {need[2]}" if need else "too few for pad, </s> and unknown"
        raise ValueError(f"no tokenizer of {vocab_size} pieces can be trained on these texts: {why}") from None
    write(Path(path), model.getvalue())
    return T5Tokenizer(path)


def write(path, content):
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        raise OSError(problem.errno, problem.strerror, str(path)) from None  # write() names no file
