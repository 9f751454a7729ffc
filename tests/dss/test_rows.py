"""Which rows train, select and test a student, with which label, and which tokenizer they get."""

import shutil
from contextlib import nullcontext

import pytest
from running import counting, prepare, write_rows

import tokenizer
import train
from data.jsonl import Record, write_jsonl
from dss.config import parse_args
from dss.rows import load_rows


@pytest.fixture
def files(tmp_path):
    """20 rows with both labels, one with gold alone, three with the teacher's alone, two with
    neither; and 4 test rows."""
    rows = counting(24)
    gaps = [Record("b", "How many?", "1 + 1"), Record("n", "x y"), Record("m", "y", None, "no")]
    for i in range(3):
        gaps.append(Record(f"t{i}", f"Of {i}?", None, f"Count {i}.", f"teacher {i}"))
    return " ".join(write_rows(tmp_path, [*rows[:20], *gaps, *rows[20:]], 26))


def load(line):
    return load_rows(parse_args(line.split()))


def ids(*rows):
    return [row.id for some in rows for row in some]


def test_rows_are_divided_by_seed_without_overlap(files, tmp_path):
    rows = load(files)
    assert len(rows.train) == 19 and len(rows.validation) == 2
    assert not set(ids(rows.train)) & set(ids(rows.validation))
    assert load(files) == rows and load(f"{files} --seed 1").train != rows.train
    assert rows.unlabelled == 5 and rows.metric == "equation" and rows.labels == []
    given = load(f"{files} --eval-data {tmp_path}/test.jsonl")
    assert len(given.train) == 21
    assert ids(given.validation) == ids(given.test) == ["r20", "r21", "r22", "r23"]


def test_a_larger_share_adds_rows_to_a_smaller(files):
    few = load(f"{files} --subsample 0.25")
    many = load(f"{files} --subsample 0.5")
    assert len(ids(many.train, many.validation)) == 10
    assert set(ids(few.train, few.validation)) < set(ids(many.train, many.validation))


def test_teacher_labels_train_and_select_and_gold_labels_test(files):
    rows = load(f"{files} --labels teacher")
    assert all(row.label == row.teacher_label for row in rows.train + rows.validation)
    assert len(rows.train + rows.validation) == 23 and rows.unlabelled == 3
    assert all(row.label != row.teacher_label for row in rows.test)


def test_gold_or_teacher_keeps_gold_where_subsample_leaves_it(files):
    rows = load(f"{files} --labels gold-or-teacher --subsample 0.5")
    gold = load(f"{files} --labels gold --subsample 0.5")
    assert rows.validation == gold.validation
    assert rows.train[: len(gold.train)] == gold.train
    added = rows.train[len(gold.train) :]
    assert all(row.label == row.teacher_label for row in added)
    assert {"t0", "t1", "t2"} < set(ids(added))
    everyone = ids(rows.train, rows.validation)
    assert len(set(everyone)) == len(everyone) == 26 - rows.unlabelled
    full = load(f"{files} --labels gold-or-teacher")
    assert len(ids(full.train, full.validation)) == 24 and full.unlabelled == 2


@pytest.mark.parametrize(
    "method, least", [("standard", 0), ("dss", 1), ("dss-shuffled", 2), ("single_task", 1)]
)
def test_a_method_without_the_rationales_it_needs_is_refused(tmp_path, method, least):
    """It would train as another method, under its own name in the table."""
    path = tmp_path / "rows.jsonl"
    line = f"--data {path} --eval-data {path} --method {method}"
    for number in range(3):
        explained = [Record("r", "q", "x", "why")] * number
        write_jsonl(path, [Record("r", "q", "x"), *explained])
        if number >= least:
            load(line)
        else:
            with pytest.raises(ValueError, match=f"rows.jsonl: .* too few for --method {method};"):
                load(line)


def test_a_method_with_a_separator_needs_a_tokenizer_that_has_one(files, spiece, tmp_path, refused):
    shutil.copytree(spiece, tmp_path / "none")
    (tmp_path / "none" / "tokenizer_config.json").write_text('{"extra_ids": 0}')
    line = f"{files} --spiece {tmp_path}/none --method label_first --out {tmp_path}/out"
    said = refused(train.main, *line.split())
    assert "--method label_first needs the token <extra_id_0>" in said
    assert not (tmp_path / "out").exists()


FREE = [f"change {i} {'👍👎'[i % 2]}" for i in range(19)] + ["change 👍", "change 👎"]


@pytest.mark.parametrize(
    "labels, is_refused",
    [(["да", "нет", "ok"], True), (["a 👍", "a 👎"], True), (["a²", "a2"], False), (FREE, False)],
)
def test_labels_that_are_the_same_tokens_are_refused_but_in_free_text(tmp_path, labels, is_refused):
    """a² and a2 are one class."""
    tokenizer.train(["predict: q x a change 0123456789"], tmp_path / "spiece.model", 40)
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [Record(f"r{i}", f"q {i}", label) for i, label in enumerate(labels)])
    line = f"--data {path} --eval-data {path} --spiece {tmp_path} --out {tmp_path}/out"
    refusal = pytest.raises(ValueError, match="labels '.*' and '.*' are the same token ids")
    with refusal if is_refused else nullcontext():
        prepare(line, "--method standard")


@pytest.mark.parametrize("label", ["e\u0301tude", "ﬁx\u3000me", "ｆｕｌｌ：ｗｉｄｔｈ", "क़लम ™"])
def test_a_label_is_right_as_the_tokenizer_writes_it(tmp_path, label):
    rows = [Record(f"r{i}", f"q {i}", (label, "no")[i % 2]) for i in range(20)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    student = prepare("--data", tmp_path / "rows.jsonl", "--method", "standard").student
    answer = student.tokenizer.decode(student.tokenizer.encode(label))
    assert answer != label and student.is_right(answer, rows[0])
    assert not student.is_right(answer, rows[1])


def test_a_tokenizer_that_is_not_the_weights_own_is_warned_of(spiece, tmp_path, capsys):
    rows = [Record(f"r{i}", f"how many are {i}", ("one", "two")[i % 2]) for i in range(20)]
    line = [*write_rows(tmp_path, rows, 16), "--method standard --out", tmp_path / "out"]
    line.append("--spiece")
    prepare(*line, spiece).student.save(tmp_path / "weights")
    tokenizer.train(["one two"], tmp_path / "spiece.model", 12)
    for path, warned in ((spiece, False), (tmp_path, True)):
        capsys.readouterr()
        prepare(*line, path, "--weights", tmp_path / "weights")
        assert ("warning: --spiece" in capsys.readouterr().err) == warned


def test_keys_that_hold_no_rationale_are_named(tmp_path):
    rows = [dict(input=f"q {i}", label="x", llm_rationale="why") for i in range(9)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"a rationale \(keys that are not read: llm_rationale\)"):
        load(f"--data {tmp_path}/rows.jsonl --method dss")
