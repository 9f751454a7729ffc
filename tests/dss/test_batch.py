"""Rows become the sequences of their method, and sequences one packed stream that loses and mixes nothing."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenizer
from data.jsonl import Record
from dss.batch import LABEL, RATIONALE, Sequence, count_targets, pack
from dss.methods import SEPARATOR, sequences

ids = st.lists(st.integers(1, 99), min_size=1, max_size=12)
batches = st.lists(st.builds(Sequence, ids, ids, st.sampled_from([LABEL, RATIONALE])), min_size=1, max_size=6)


@given(batches)
def test_packing_keeps_every_token_in_its_place(batch_of):
    batch = pack(batch_of)
    n = len(batch_of)
    assert batch.inputs.cu_seqlens.dtype == batch.targets.cu_seqlens.dtype == torch.int32
    for where, side in ((batch.inputs, 0), (batch.targets, 1)):
        assert where.max_seqlen == max(len(s[side]) for s in batch_of)
        assert where.cu_seqlens[0] == 0 and len(where.cu_seqlens) == n + 1
    for b, sequence in enumerate(batch_of):
        i, j = batch.inputs.cu_seqlens[b : b + 2]
        assert batch.input_ids[i:j].tolist() == sequence.input_ids
        i, j = batch.targets.cu_seqlens[b : b + 2]
        assert batch.labels[i:j].tolist() == sequence.target_ids
        assert batch.decoder_input_ids[i:j].tolist() == [0, *sequence.target_ids[:-1]]
        assert set(batch.task[i:j].tolist()) == {sequence.task}
    assert len(batch.labels) == batch.targets.cu_seqlens[-1]
    assert count_targets(batch_of) == tuple((batch.task == task).sum() for task in (LABEL, RATIONALE))


def test_what_is_cut_is_counted(tok):
    row, cut = Record("r", "How many apples?", "one two", "There are one and two and three."), Counter()
    for method, targets in (("standard", 1), ("dss", 2), ("single_task", 1)):
        cut.clear()
        sequences(row, method, tok, 5, 2, cut)
        assert cut == {"inputs": 2 if method == "dss" else 1, "targets": targets}
        cut.clear()
        sequences(row, method, tok, 99, 99, cut)
        assert not +cut
    sequences(Record("r", "x", "one two three"), "single_task", tok, 99, 3, cut)
    assert +cut == {"targets": 1}


@pytest.fixture(scope="module")
def tok(spiece):
    return tokenizer.T5Tokenizer(spiece)


ROW = Record("1", "how many apples left", "three", "Tom gave one")


def texts(tok, row, method, **limits):
    found = sequences(row, method, tok, **limits)
    return [(tok.decode(s.input_ids), tok.decode(s.target_ids), s.task) for s in found]


def test_each_method_has_its_sequences(tok):
    predict = (tok.decode(tok.encode("predict: how many apples left")), "three", LABEL)
    explain = (tok.decode(tok.encode("explain: how many apples left")), "Tom gave one", RATIONALE)
    assert texts(tok, ROW, "standard") == [predict]
    assert texts(tok, ROW, "dss") == texts(tok, ROW, "dss-shuffled") == [predict, explain]
    (single,) = sequences(ROW, "single_task", tok)
    assert single.target_ids == [*tok.encode("Tom gave one")[:-1], tok.special[SEPARATOR], *tok.encode("three")]
    assert single.input_ids == tok.encode("predict: how many apples left") and single.task == LABEL


def test_a_row_without_rationale_trains_the_label_alone_and_one_without_label_nothing(tok):
    bare = Record("1", "how many", "three")
    assert len(sequences(bare, "dss", tok)) == 1
    assert sequences(bare, "single_task", tok)[0].target_ids[0] == tok.special[SEPARATOR]
    for method in ("standard", "dss", "single_task"):
        assert sequences(Record("1", "how many", None, "Tom gave one"), method, tok) == []


def test_long_texts_are_cut_but_keep_their_end_and_single_task_its_label(tok):
    row = Record("1", "one two three " * 20, "three", "four plus minus " * 20)
    for method in ("standard", "dss", "single_task"):
        for s in sequences(row, method, tok, max_input_length=10, max_target_length=7):
            assert len(s.input_ids) == 10 and s.input_ids[-1] == 1
            assert len(s.target_ids) <= 7 and s.target_ids[-1] == 1
    assert s.target_ids[-3:] == [tok.special[SEPARATOR], *tok.encode("three")]
