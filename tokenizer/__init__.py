"""T5's tokenizer."""

from .t5 import T5Tokenizer, train

__all__ = ["T5Tokenizer", "train"]
