"""The files of a T5's tokenizer: spiece.model or tokenizer.json, and what stands beside them.

spiece.model            pieces and normalization; SentencePiece reads it
tokenizer.json          the same as JSON, with added tokens; transformers 5 saves it alone
tokenizer_config.json   the number of sentinels (`extra_ids`), added tokens
added_tokens.json       added tokens, as older versions saved them
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .convert import to_spiece

SPIECE = "spiece.model"
FAST = "tokenizer.json"
CONFIG = "tokenizer_config.json"
ADDED = "added_tokens.json"
CLASSES = ("T5Tokenizer", "T5TokenizerFast", "MT5Tokenizer", "MT5TokenizerFast")
CLASSES += ("PreTrainedTokenizerFast", "TokenizersBackend")  # these say nothing
POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class AddedToken:
    """A token that was added to the vocabulary when a model was finetuned."""

    text: str
    id: int
    normalized: bool = True  # found in the normalized text, not in the text as it is written
    special: bool = False  # left out of decoded text


@dataclass(frozen=True)
class TokenizerFiles:
    path: Path  # spiece.model or tokenizer.json
    model: bytes  # the content of spiece.model
    config: dict[str, Any]  # tokenizer_config.json
    extra_ids: int  # number of sentinels above the pieces
    added: list[AddedToken]


def read_files(path: Path) -> TokenizerFiles:
    """Read a tokenizer: `path` is a spiece.model, or a directory with one or with a tokenizer.json.

    Raises FileNotFoundError if there is none, ValueError, naming the file, if it is not a T5's.
    """
    directory = path if path.is_dir() else path.parent
    config = read_json(directory / CONFIG)
    fast = read_json(directory / FAST)
    no_spiece = path.is_dir() and not (path / SPIECE).exists()
    extra_ids = config.get("extra_ids", 100)
    if no_spiece and (directory / FAST).exists():
        path = directory / FAST
        kind = config.get("tokenizer_class")
        if kind not in (None, *CLASSES):
            raise ValueError(f"{path}: of class {kind}, another kind than T5's SentencePiece")
        try:
            model, extra_ids = to_spiece(fast)
        except Exception as problem:
            raise ValueError(
                f"{path}: there is no {SPIECE}, and this is not a T5's ({problem!r}); "
                f"copy the {SPIECE} of the model that this one was trained from"
            ) from None
    else:
        if path.is_dir():
            path = directory / SPIECE
        model = read_bytes(path)
    if type(extra_ids) is not int or not 0 <= extra_ids <= 1000:
        raise ValueError(f"{directory / CONFIG}: extra_ids is {extra_ids!r}, not from 0 to 1000")
    added = read_added_tokens(directory, config, fast)
    return TokenizerFiles(path, model, config, extra_ids, added)


def read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such SentencePiece model")
    content = path.read_bytes()
    if content.startswith(POINTER):
        raise ValueError(
            f"{path}: a git-lfs pointer, not the file itself; `git lfs pull` fetches it"
        )
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(read_bytes(path))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def read_added_tokens(
    directory: Path, config: dict[str, Any], fast: dict[str, Any]
) -> list[AddedToken]:
    """All tokens that the files name, the special ones of every T5 among them.

    Raises ValueError for tokens whose rules are not known here.
    """
    entries = []
    for text, i in read_json(directory / ADDED).items():
        entries.append({"content": text, "id": i})
    try:
        for i, entry in config.get("added_tokens_decoder", {}).items():
            entries.append(entry | {"id": int(i)})
        entries += fast.get("added_tokens", [])
        tokens = {}
        for entry in entries:
            if entry.get("single_word"):
                raise ValueError(f"{entry['content']!r} is found only as a whole word")
            token = AddedToken(
                text=entry["content"],
                id=int(entry["id"]),
                normalized=entry.get("normalized", True),
                special=entry.get("special", False),
            )
            tokens[token.text] = token  # a later file says more of it
    except Exception as problem:
        raise ValueError(f"{directory}: added tokens that cannot be read ({problem})") from None
    return list(tokens.values())
