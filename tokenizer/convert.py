"""Reads a T5's vocabulary from tokenizer.json, which is all that transformers 5 saves.

The file is converted to the bytes of the spiece.model that it was made from: a protobuf message
(sentencepiece_model.proto), of which only the fields that SentencePiece needs are written.
"""

import base64
import re
import struct
from typing import Any

NORMAL = 1  # types of pieces
UNKNOWN = 2
CONTROL = 3
SPECIAL = (CONTROL, CONTROL, UNKNOWN)  # pad, </s>, unknown
NORMALIZERS = {"Precompiled", "Strip", "Replace"}  # the last two only remove white space


def to_spiece(content: dict[str, Any]) -> tuple[bytes, int]:
    """(the bytes of spiece.model, number of sentinels above its pieces) of a T5's tokenizer.json.

    Raises ValueError, KeyError, TypeError or AttributeError if it is not one of T5's.
    """
    model = content["model"]
    if model["type"] != "Unigram" or model["unk_id"] != SPECIAL.index(UNKNOWN):
        raise ValueError("it is not a unigram model with T5's ids")
    vocabulary = list(model["vocab"])
    extra_ids = 0
    while vocabulary and re.fullmatch(r"<extra_id_\d+>", vocabulary[-1][0]):
        vocabulary.pop()
        extra_ids += 1
    message = b""
    for i, (text, score) in enumerate(vocabulary):
        kind = SPECIAL[i] if i < len(SPECIAL) else NORMAL
        piece = bytes_field(1, text.encode()) + float_field(2, score) + int_field(3, kind)
        message += bytes_field(1, piece)
    message += bytes_field(2, int_field(40, SPECIAL.index(UNKNOWN)))
    message += bytes_field(3, bytes_field(2, normalization(content)))
    return message, extra_ids


def normalization(content: dict[str, Any]) -> bytes:
    """The compiled rules by which characters are replaced before a text is tokenized."""
    normalizer = content["normalizer"]
    steps = normalizer.get("normalizers", [normalizer])
    rules = [step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled"]
    kinds = {step["type"] for step in steps}
    if len(rules) != 1 or not kinds <= NORMALIZERS:
        raise ValueError(f"its normalization is {', '.join(sorted(kinds))}")
    splitter = content["pre_tokenizer"]
    for step in splitter.get("pretokenizers", [splitter]):
        if step.get("prepend_scheme", "always") != "always":
            raise ValueError("it does not tokenize each part of a text as a text of its own")
    return base64.b64decode(rules[0])


def varint(number: int) -> bytes:
    """A number that is not negative, seven bits a byte, the lowest first."""
    encoded = b""
    while number > 127:
        encoded += bytes([number & 127 | 128])
        number >>= 7
    return encoded + bytes([number])


def int_field(key: int, value: int) -> bytes:
    return varint(key << 3) + varint(value)


def bytes_field(key: int, value: bytes) -> bytes:
    return varint(key << 3 | 2) + varint(len(value)) + value


def float_field(key: int, value: float) -> bytes:
    return varint(key << 3 | 5) + struct.pack("<f", value)
