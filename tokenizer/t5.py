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

from .files import CONFIG, SPIECE, AddedToken, TokenizerFiles, read_files

PAD = 0
EOS = 1
UNK = 2
TOKENS = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNK}  # names in tokenizer_config.json
LONGEST_TEXT = 20_000  # characters of a text that `train` looks at
LONGEST_WORD = 100  # characters of a word; one of a million letters would take minutes


class T5Tokenizer:
    """path: a spiece.model, or a directory that holds one or a tokenizer.json.

    What files.py lists beside it is read, too. Raises FileNotFoundError if there is no tokenizer,
    ValueError, naming the file, if it is not one of T5's.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        files = read_files(Path(path))
        self.model = files.model  # the content of spiece.model
        self.pieces = load_pieces(files)
        self.extra_ids = files.extra_ids
        texts = self.pieces.id_to_piece(list(range(self.pieces.vocab_size())))
        first_sentinel = len(texts)
        for k in reversed(range(files.extra_ids)):
            texts.append(f"<extra_id_{k}>")
        self.texts = dict(enumerate(texts))  # {id: text} of all tokens
        self.hidden = {
            PAD,
            EOS,
            UNK,
            *range(first_sentinel, len(texts)),
        }  # left out of decoded text
        self.special = {texts[i]: i for i in self.hidden}  # tokens found in a text as it is written
        self.normalized = {}  # {text: id} of tokens that are found in the normalized text
        self.normalizer = sentencepiece.SentencePieceNormalizer(
            model_proto=files.model,  # of which the rules for characters are taken alone
            add_dummy_prefix=False,
            escape_whitespaces=False,
            remove_extra_whitespaces=False,
        )
        self.added = [token for token in files.added if token.text not in self.special]
        for token in files.added:
            self.add(token, files.path)
        self.vocab_size = max(self.texts) + 1
        self.special_pattern = any_of(self.special)
        self.normalized_pattern = any_of(self.normalized)

    def add(self, token: AddedToken, path: Path) -> None:
        """Add a token, unless it is one of T5's. Raises ValueError if its id is another token's."""
        usual_id = self.special.get(token.text, token.id)
        if token.id != usual_id or self.texts.get(token.id, token.text) != token.text:
            raise ValueError(f"{path}: the added token {token.text!r} has the id of another token")
        if token.text in self.special:
            return
        text = token.text
        if token.normalized:
            text = self.normalizer.normalize(text)
            self.normalized[text] = token.id
        else:
            self.special[text] = token.id
        self.texts[token.id] = text
        if token.special:
            self.hidden.add(token.id)

    def encode(self, text: str) -> list[int]:
        """text -> ids, ending in </s>."""
        text = text.replace("\x85", " ")  # white space to transformers, unknown to SentencePiece
        ids = []
        for part in self.special_pattern.split(text):
            if part in self.special:
                ids.append(self.special[part])
            elif self.normalized:
                ids += self.encode_normalized(self.normalizer.normalize(part))
            else:
                ids += self.pieces.encode(part)
        return [*ids, EOS]

    def encode_normalized(self, text: str) -> list[int]:
        """The ids of a normalized text, in which added tokens are found."""
        ids = []
        for part in self.normalized_pattern.split(text):
            if part in self.normalized:
                ids.append(self.normalized[part])
            else:
                ids += self.pieces.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """ids -> text, without special tokens."""
        kept = [self.texts[i] for i in ids if i in self.texts and i not in self.hidden]
        return self.pieces.decode(kept)

    def save(self, directory: str | os.PathLike) -> None:
        """Write spiece.model and tokenizer_config.json, by which transformers loads it, to an
        existing directory."""
        config = {"tokenizer_class": "T5Tokenizer", "extra_ids": self.extra_ids}
        for name, i in TOKENS.items():
            config[name] = self.pieces.id_to_piece(i)
        added = {}
        for token in self.added:
            flags = {"normalized": token.normalized, "special": token.special}
            added[str(token.id)] = {"content": token.text} | flags
        if added:
            config["added_tokens_decoder"] = added
        write(Path(directory) / SPIECE, self.model)
        write(Path(directory) / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_pieces(files: TokenizerFiles) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece's own tokenizer. Raises ValueError if its ids or normalization are not T5's."""
    path = files.path
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=files.model)
    except RuntimeError:
        raise ValueError(f"{path}: not a SentencePiece model") from None
    ids = (pieces.pad_id(), pieces.eos_id(), pieces.unk_id())
    if ids != (PAD, EOS, UNK):
        raise ValueError(f"{path}: pad, </s> and unknown are {ids}; T5's are {(PAD, EOS, UNK)}")
    if not pieces.normalize("①").endswith("1"):  # by rules at the end of the file
        raise ValueError(f"{path}: trained with another normalization than T5's NFKC, or cut short")
    for name, i in TOKENS.items():
        token = files.config.get(name, pieces.id_to_piece(i))
        if isinstance(token, dict):
            token = token.get("content")
        if token != pieces.id_to_piece(i):
            where = path.with_name(CONFIG)
            raise ValueError(f"{where}: {name} is {token!r}, not {pieces.id_to_piece(i)!r}")
    return pieces


def any_of(texts: Iterable[str]) -> re.Pattern:
    """A pattern that splits a text at each of these, of which the longest counts."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("(" + "|".join(re.escape(text) for text in longest_first) + ")")


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
