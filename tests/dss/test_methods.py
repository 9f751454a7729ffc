"""Each method's sequences, its control, and that a new entry in METHODS is a method."""

from dataclasses import replace

from running import SIX, few_rows, json_lines, result, run

from data.jsonl import Record
from dss.batch import LABEL, RATIONALE
from dss.methods import METHODS, SEPARATOR, Method, Target, sequences

ROW = Record("1", "how many apples left", "three", "Tom gave one")


def joined(tok, *parts):
    """The ids of two texts, with the separator between them."""
    first, second = parts
    return [*tok.encode(first)[:-1], tok.special[SEPARATOR], *tok.encode(second)]


def test_each_method_has_its_sequences(tok):
    question = tok.encode("predict: how many apples left")
    label = (question, tok.encode("three"), LABEL)
    rationale = (tok.encode("explain: how many apples left"), tok.encode("Tom gave one"), RATIONALE)
    want = {
        "standard": [label],
        "dss": [label, rationale],
        "label_first": [(question, joined(tok, "three", "Tom gave one"), LABEL)],
        "single_task": [(question, joined(tok, "Tom gave one", "three"), LABEL)],
        "dss-shuffled": [label, rationale],
        "dss-scrambled": [label, rationale],
        "standard-matched": [label],
    }
    assert {method: sequences(ROW, method, tok) for method in want} == want


def test_a_row_without_rationale_trains_the_label_and_one_without_label_nothing(tok):
    bare = replace(ROW, rationale=None)
    assert sequences(bare, "dss", tok) == sequences(bare, "standard", tok)
    (single,) = sequences(bare, "single_task", tok)
    assert single.target_ids == [tok.special[SEPARATOR], *tok.encode("three")]
    (first,) = sequences(bare, "label_first", tok)
    assert first.target_ids == [*tok.encode("three")[:-1], tok.special[SEPARATOR], 1]
    for method in METHODS:
        assert sequences(replace(ROW, label=None), method, tok) == []


def test_long_texts_are_cut_but_keep_their_end_and_single_task_its_label(tok):
    row = Record("1", "one two three " * 20, "three", "four plus minus " * 20)
    for method in METHODS:
        found = sequences(row, method, tok, max_input_length=10, max_target_length=7)
        for s in found:
            assert len(s.input_ids) == 10 and s.input_ids[-1] == 1
            assert len(s.target_ids) <= 7 and s.target_ids[-1] == 1
        end = [tok.special[SEPARATOR], *tok.encode("three")]
        assert (found[0].target_ids[-len(end) :] == end) == (method == "single_task")


def changed(method):
    """Pairs of a row before and after; 32 of 40 have a rationale, and nothing else has changed."""
    rows = []
    for i in range(40):
        rationale = None if i % 5 == 0 else f"a b c d e {i}"
        rows.append(Record(str(i), f"q{i}", f"l{i}", rationale))
    after = METHODS[method].change_rows(rows, 0)
    assert after == METHODS[method].change_rows(rows, 0) != METHODS[method].change_rows(rows, 1)
    pairs = list(zip(rows, after, strict=True))
    for before, after in pairs:
        assert replace(after, rationale=before.rationale) == before
        assert (before.rationale is None) == (after.rationale is None)
    return [(before.rationale, after.rationale) for before, after in pairs if after.rationale]


def test_shuffled_rationales_all_stand_on_another_row():
    before, after = zip(*changed("dss-shuffled"))
    assert sorted(before) == sorted(after)
    assert not any(a == b for a, b in zip(before, after))


def test_scrambled_rationales_keep_their_words_and_stay_on_their_row():
    orders = set()
    for before, after in changed("dss-scrambled"):
        assert sorted(after.split()) == sorted(before.split())
        orders.add(tuple(word for word in after.split() if word.isalpha()))
    assert len(orders) > 10, "not one order for all rows"


def test_a_new_entry_is_a_method_that_trains_tests_and_reports(tmp_path, monkeypatch, capsys):
    """Its second task is to write the question down."""

    def label_and_question(row, tokenizer):
        return [
            Target("predict: ", tokenizer.encode(row.label), LABEL),
            Target("ask: ", tokenizer.encode(row.input), RATIONALE),
        ]

    asking = Method(label_and_question)
    monkeypatch.setitem(METHODS, "asking", asking)
    files = few_rows(tmp_path)
    assert run(files, SIX, f"standard asking --out {tmp_path}/out") == 0
    shown = capsys.readouterr().out
    assert "dss - standard:" in shown and "asking - standard:" in shown
    assert result(tmp_path / "out", "asking")["test_accuracy"] is not None
    line = json_lines(tmp_path / "out" / "asking" / "metrics.jsonl")[-2]
    assert line["rationale_loss"] > 0
