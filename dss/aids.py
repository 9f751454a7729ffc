"""Two aids for students without pretraining, both off by default (dss/README.md says what each is
worth).

Public weights bring along that a word can be found again elsewhere in the text. A small student
with random weights does not discover this from a few thousand labels. `look_alike` starts it with
heads that find equal tokens; `Renaming` makes it use them, because it cannot learn words by heart.
"""

import numpy as np
import torch
from torch import nn

from dss.batch import Sequence
from dss.methods import EXPLAIN, PREDICT
from dss.model import T5
from tokenizer import T5Tokenizer


@torch.no_grad()
def look_alike(model: T5) -> None:
    """Start half of the heads of the first encoder layer as a search for the query's own token
    elsewhere, of which the value is then subtracted (after Trockman and Kolter 2023, arXiv
    2305.09828, whose start is for images). Half of them search before the query, half after it.

    The score of a token with an equal one is about sqrt(D), with others about 0. So a bias of
    -sqrt(D) makes a key on the wrong side, and the query itself, count as different.
    """
    attention = model.encoder.layers[0].self_attention
    table = model.encoder.bias_table  # (num_buckets, H); the second half is for keys after
    C = model.config.d_model
    D = model.config.d_kv
    excluding = -(D**0.5)
    searching = model.config.num_heads // 2
    per_side = len(table) // 2
    for head in range(searching):
        own = slice(head * D, (head + 1) * D)
        key = nn.init.orthogonal_(torch.empty(D, C))
        value = nn.init.orthogonal_(torch.empty(D, C))
        attention.q.weight[own] = key * D**-0.5
        attention.k.weight[own] = key
        attention.v.weight[own] = value
        attention.o.weight[:, own] = -C / D * value.T
        if head < searching / 2:
            table[per_side:, head] = excluding
        else:
            table[:per_side, head] = excluding
        table[0, head] = excluding


def table_deviation(model: T5) -> float:
    """The size of the numbers that `look_alike` writes into the encoder's bias table, a quarter of
    whose entries are -sqrt(D): the unit of its learning rate (see `make_optimizer` in train.py)."""
    return model.config.d_kv**0.5 / 2


class Renaming:
    """Gives some tokens of a row other, random ids, the same in its input and targets. That a word
    recurs is kept, what it means is not. A row's share of renamed tokens is drawn from 0 to
    `most`. Special tokens, prefixes and a closed set's labels keep their ids."""

    def __init__(self, tokenizer: T5Tokenizer, labels: list[str], most: float) -> None:
        kept = set(tokenizer.special.values())
        for text in (PREDICT, EXPLAIN, *labels):
            kept.update(tokenizer.encode(text))
        self.kept = np.array(sorted(kept))
        self.names = np.setdiff1d(np.arange(tokenizer.vocab_size), self.kept)
        self.vocab_size = tokenizer.vocab_size
        self.most = most

    def rename(self, row: list[Sequence], generator: np.random.Generator) -> list[Sequence]:
        tokens = np.setdiff1d(row[0].input_ids, self.kept)
        share = generator.uniform(0, self.most)
        renamed = tokens[generator.random(len(tokens)) < share]
        new_ids = np.arange(self.vocab_size)
        new_ids[renamed] = generator.choice(self.names, len(renamed))
        return [
            Sequence(new_ids[np.asarray(s.input_ids)], new_ids[np.asarray(s.target_ids)], s.task)
            for s in row
        ]
