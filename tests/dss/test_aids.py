"""The aids for students without pretraining: what a renamed row keeps, what the start finds."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.jsonl import Record
from dss.aids import Renaming, look_alike
from dss.config import SIZES
from dss.methods import sequences
from dss.model import T5

ROW = Record("1", "how many apples has Tom left", "three", "Tom gave one of four apples")


def renamed(tok, most, seed, labels=("three",)):
    """The sequences of ROW, and the same after renaming."""
    row = sequences(ROW, "dss", tok)
    renaming = Renaming(tok, list(labels), most)
    return row, renaming.rename(row, np.random.default_rng(seed))


@given(seed=st.integers(0, 2**32), most=st.floats(0, 0.999))
def test_a_token_has_one_new_id_in_the_whole_row(tok, seed, most):
    new_ids = {}
    for old, new in zip(*renamed(tok, most, seed)):
        assert old.task == new.task
        assert len(old.input_ids) == len(new.input_ids)
        assert len(old.target_ids) == len(new.target_ids)
        pairs = [*zip(old.input_ids, new.input_ids), *zip(old.target_ids, new.target_ids)]
        for before, after in pairs:
            assert new_ids.setdefault(before, after) == after
            assert after == before or 2 < after < tok.vocab_size - tok.extra_ids


@given(seed=st.integers(0, 2**32))
def test_prefix_label_and_words_of_the_rationale_alone_are_kept(tok, seed):
    row, new = renamed(tok, 0.999, seed)
    kept = {1, *tok.encode("predict: "), *tok.encode("explain: "), *tok.encode("three")}
    kept |= set(row[1].target_ids) - set(row[1].input_ids)
    for old, now in zip(row, new):
        for before, after in zip(old.input_ids, now.input_ids):
            assert after == before or before not in kept
    for before, after in zip(row[1].target_ids, new[1].target_ids):
        assert after == before or before not in kept
    assert list(new[0].target_ids) == row[0].target_ids


def test_shares_are_from_0_to_most(tok):
    row = sequences(ROW, "standard", tok)
    renaming = Renaming(tok, ["three"], 0.6)
    generator = np.random.default_rng(0)
    free = np.setdiff1d(row[0].input_ids, renaming.kept)
    changed = [
        np.mean(~np.isin(free, renaming.rename(row, generator)[0].input_ids)) for _ in range(500)
    ]
    assert abs(np.mean(changed) - 0.3) < 0.03
    assert Renaming(tok, [], 0.0).rename(row, generator)[0].input_ids.tolist() == row[0].input_ids


def first_layer_weights(model, ids):
    """(H, N, N): the attention weights of the first encoder layer."""
    layer = model.encoder.layers[0]
    x = layer.self_attention_norm(model.embedding(torch.tensor(ids)))[1]
    q = layer.self_attention.heads(layer.self_attention.q(x))
    k = layer.self_attention.heads(layer.self_attention.k(x))
    scores = torch.einsum("ihd,jhd->hij", q, k)
    buckets = torch.zeros(len(ids), len(ids), dtype=torch.long)
    half = len(model.encoder.bias_table) // 2
    for i in range(len(ids)):
        for j in range(len(ids)):
            buckets[i, j] = min(abs(i - j), half - 1) + half * (j > i)  # no two far apart here
    return (scores + model.encoder.bias_table[buckets].permute(2, 0, 1)).softmax(-1)


@torch.no_grad()
def test_the_start_finds_equal_tokens_before_and_after():
    torch.manual_seed(0)
    model = T5(replace(SIZES["tiny-wide"], vocab_size=200))
    look_alike(model.eval())
    ids = [20, 30, 40, 50, 30, 60, 70]  # 30 recurs
    before, after, *free = first_layer_weights(model, ids)
    assert before[4, 1] > 0.8
    assert after[1, 4] > 0.8
    assert before[1, 4] < before[4, 1] - 0.2
    assert after[4, 1] < after[1, 4] - 0.2
    assert before[4, 4] < 0.1 * before[4, 1]  # the query itself
    for weights in free:
        assert weights[4, 1] < 0.5
