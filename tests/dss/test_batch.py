"""Sequences become one packed stream that loses and mixes nothing, in parts for processes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dss.batch import (
    LABEL,
    RATIONALE,
    Sequence,
    ahead,
    count_targets,
    count_tokens,
    make_step,
    pack,
    share_tokens,
)

ids = st.lists(st.integers(1, 99), min_size=1, max_size=12)
a_sequence = st.builds(Sequence, ids, ids, st.sampled_from([LABEL, RATIONALE]))
some_sequences = st.lists(a_sequence, min_size=1, max_size=6)
some_rows = st.lists(st.lists(a_sequence, min_size=1, max_size=2), min_size=1, max_size=20)


@given(some_sequences, st.integers(0, 9))
def test_packing_keeps_every_token_in_its_place(sequences, start_token):
    batch = pack(sequences, start_token=start_token)
    for where, side in ((batch.inputs, 0), (batch.targets, 1)):
        assert where.cu_seqlens.dtype == torch.int32
        assert where.max_seqlen == max(len(s[side]) for s in sequences)
        assert where.cu_seqlens[0] == 0 and len(where.cu_seqlens) == len(sequences) + 1
    for b, sequence in enumerate(sequences):
        i, j = batch.inputs.cu_seqlens[b : b + 2]
        assert batch.input_ids[i:j].tolist() == sequence.input_ids
        i, j = batch.targets.cu_seqlens[b : b + 2]
        assert batch.labels[i:j].tolist() == sequence.target_ids
        assert batch.decoder_input_ids[i:j].tolist() == [start_token, *sequence.target_ids[:-1]]
        assert set(batch.task[i:j].tolist()) == {sequence.task}
    assert len(batch.input_ids) == batch.inputs.cu_seqlens[-1]
    assert len(batch.labels) == len(batch.task) == batch.targets.cu_seqlens[-1]
    counted = tuple((batch.task == task).sum() for task in (LABEL, RATIONALE))
    assert count_targets(sequences) == counted


@given(some_rows, st.integers(1, 4), st.integers(0, 3))
def test_all_processes_take_as_many_passes_and_train_each_target_once(rows, size, micro_batch):
    parts = share_tokens(rows, size)
    assert sorted(row for part in parts for row in part) == sorted(rows)
    tokens = [sum(map(count_tokens, part)) for part in parts]
    assert max(tokens) - min(tokens) <= max(map(count_tokens, rows)), "evenly"
    steps = [make_step(rows, micro_batch, "cpu", 0, rank, size) for rank in range(size)]
    assert len({len(step.batches) for step in steps}) == 1
    every_sequence = [sequence for row in rows for sequence in row]
    for step in steps:
        assert (step.n_label, step.n_rationale) == count_targets(every_sequence)
        assert step.tokens == count_tokens(every_sequence)
    for task, count in ((LABEL, steps[0].n_label), (RATIONALE, steps[0].n_rationale)):
        trained = [(batch.task == task).sum() for step in steps for batch in step.batches]
        assert sum(trained) == count


def test_what_is_made_ahead_is_in_order_and_its_error_is_raised():
    assert list(ahead(lambda i: i * i, range(9))) == [i * i for i in range(9)]
    results = ahead(lambda i: 1 // (3 - i), range(5))
    assert [next(results), next(results)] == [0, 0]
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
