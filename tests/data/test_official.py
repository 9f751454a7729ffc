"""The import of the paper's released datasets."""

import json
import re

import pytest
from running import ROOT

from data import official, report
from data.jsonl import read_jsonl, write_jsonl
from data.official import import_all

CHOICES = "Where?\nAnswer Choices:\n(a) a1\n(b) b1\n(c) c1\n(d) d1\n(e) e1"
CQA = {"question": "Where?", "choices": ["a1", "b1", "c1", "d1", "e1"], "answer": "c1"}
SVAMP = {"input": "Two boxes of 42?", "label": "( 84.0 / 2.0 )"}
NLI = {"premise": "p", "hypothesis": "h", "label": 2}
RELEASED = [  # (dataset, row, its input, an output, its label)
    ("cqa", CQA, CHOICES, "Because. So the answer is (c) c1.\n\nQ: (a) a1", "c1"),
    ("svamp", SVAMP, "Two boxes of 42?", "Because. The answer is (42 * 1). Q: Hm", "(42 * 1)"),
    ("esnli", NLI, "p</s>h", "Because.\nAnswer: entailment\nPremise: q", "entailment"),
]


def release(root, name, rows, outputs):
    """outputs: {name of a file: its content}"""
    (root / name / "llm").mkdir(parents=True)
    write_jsonl(root / name / f"{name}_train.json", rows)
    for file, content in outputs.items():
        (root / name / "llm" / file).write_text(json.dumps(content))


@pytest.mark.parametrize("name, row, question, output, label", RELEASED)
def test_a_dataset_is_imported_with_its_teachers_outputs(
    tmp_path, capsys, name, row, question, output, label
):
    outputs = {f"train_CoT_{k}.json": [f"{k}. {output}"] for k in range(10)}
    outputs["train_CoT_10.json"] = ["No answer."]  # after 9, not after 1
    release(tmp_path, name, [row] * 12, outputs)
    assert official.main([str(tmp_path), "--out", str(tmp_path)]) == 0
    rows = list(read_jsonl(tmp_path / f"{name}_train.jsonl"))
    assert {r.input for r in rows} == {question} and len({r.id for r in rows}) == 12
    assert [r.rationale for r in rows] == [f"{k}. Because." for k in range(10)] + [None, None]
    assert [r.teacher_label for r in rows] == [label] * 10 + [None, None]
    assert rows[10].teacher == {"model": "PaLM 540B"} and rows[11].teacher == {}
    counts = "12 rows, 10 rationales, 10 teacher labels"
    assert capsys.readouterr().out == f"{name}_train.jsonl: {counts}\n"


@pytest.mark.parametrize(
    "name, row, outputs, words",
    [
        ("svamp", SVAMP, {"train_CoT_0.json": ["a", "b"]}, "1 rows, but 2 teacher outputs"),
        ("svamp", {"input": "x"}, {}, "svamp_train.json:1: not a row"),
        ("cqa", CQA | {"answer": [3]}, {}, 'cqa_train.json:1: "label" must be'),
        ("other", {}, {}, "none of cqa/cqa_SPLIT.json"),
        ("svamp", SVAMP, {"train_CoT_1.json": ["a"]}, "train_CoT_0.json is missing among train"),
        ("svamp", SVAMP, {"train_CoT_0 (1).json": ["a"]}, "missing among train_CoT_0 (1).json"),
    ],
)
def test_a_release_that_is_not_as_it_should_be_is_refused(
    tmp_path, refused, name, row, outputs, words
):
    """With an output missing, every later row would get the rationale of another."""
    release(tmp_path, name, [row], outputs)
    assert words in refused(official.main, tmp_path, "--out", tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_the_real_release_has_its_published_counts_and_accuracy(official, tmp_path, capsys):
    """As data/README.md has them, of the smallest dataset."""
    text = " ".join((ROOT / "data" / "README.md").read_text("utf-8").split())
    (tmp_path / "svamp").symlink_to(official / "svamp")
    for line in import_all(tmp_path, tmp_path):
        name = line.split(".")[0]
        assert line in text and report.main([str(tmp_path / f"{name}.jsonl")]) == 0
        accuracy = re.search(r"teacher right on .* (\S+%)", capsys.readouterr().out)[1]
        assert f"{accuracy} of {name}" in text
