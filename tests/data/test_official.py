"""The import of the paper's released datasets."""

import json
from pathlib import Path

import pytest

from data import official, report
from data.jsonl import read_jsonl
from data.official import import_all

OUTPUTS = [  # (dataset, raw output, rationale, teacher label)
    (
        "cqa",
        "It burns. So the answer is (c) a wood.\n\nQ: Next? So the answer is (a) x.",
        "It burns.",
        "a wood",
    ),
    ("svamp", "84 / 2 = 42. The answer is (84 / 2).\n\nQ: There are", "84 / 2 = 42.", "(84 / 2)"),
    ("svamp", "Unknown. The answer is (23 + x).", "Unknown.", None),
    ("svamp", "It never says.\n\nQ: Next? The answer is (1 + 1).", None, None),
    (
        "anli1",
        "They differ. So the answer is contradiction.\n\nPremise: next",
        "They differ.",
        "contradiction",
    ),
    (
        "anli1",
        "\nThey differ. The answer is neutral.",
        "They differ.",
        "neutral",
    ),  # GPT-NeoX writes it so, too
    (
        "esnli",
        "Same thing.\nAnswer: entailment\n\nPremise: x\nAnswer: neutral",
        "Same thing.",
        "entailment",
    ),
]


@pytest.mark.parametrize("name, output, rationale, label", OUTPUTS)
def test_outputs_are_cut_at_the_answer_and_before_the_invented_example(
    name, output, rationale, label
):
    assert official.parse_output(output, official.FORMATS[name]) == (rationale, label)


CHOICES = "Where?\nAnswer Choices:\n(a) a1\n(b) b1\n(c) c1\n(d) d1\n(e) e1"
RELEASED = {  # (row, its input, an output, its label)
    "cqa": ({"question": "Where?", "choices": ["a1", "b1", "c1", "d1", "e1"], "answer": "c1"},
            CHOICES, "Because. So the answer is (c) c1.", "c1"),
    "svamp": ({"input": "Two boxes of 42?", "label": "( 84.0 / 2.0 )"},
              "Two boxes of 42?", "Because. The answer is (42 * 1).", "(42 * 1)"),
    "anli1": ({"premise": "p", "hypothesis": "h", "label": 2, "uid": "u", "reason": ""},
              "p</s>h", "Because. So the answer is contradiction.", "contradiction"),
    "esnli": ({"premise": "p", "hypothesis": "h", "label": 0},
              "p</s>h", "Because.\nAnswer: entailment", "entailment"),
}  # fmt: skip
CQA = RELEASED["cqa"][0]


def release(root, name, rows, split="train"):
    (root / name / "llm").mkdir(parents=True)
    (root / name / f"{name}_{split}.json").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )


@pytest.mark.parametrize("name", RELEASED)
def test_each_dataset_is_imported_with_both_teachers(tmp_path, capsys, name):
    row, question, good, label = RELEASED[name]
    release(tmp_path, name, [row] * 12)
    for k in range(11):  # K counts 0..10: 10 comes after 9, not after 1
        outputs = ["no answer"] if k == 10 else [good.replace("Because", f"Because {k}")]
        (tmp_path / name / "llm" / f"train_CoT_{k}.json").write_text(json.dumps(outputs))
    (tmp_path / "gpt-neox" / name).mkdir(parents=True)
    (tmp_path / "gpt-neox" / name / "train.json").write_text(json.dumps(["\n" + good] * 12))
    assert official.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    rows = list(read_jsonl(tmp_path / "out" / f"{name}_train.jsonl"))
    assert [r.input for r in rows] == [question] * 12 and len({r.id for r in rows}) == 12
    assert [r.rationale for r in rows] == [f"Because {k}." for k in range(10)] + [None, None]
    assert [r.teacher_label for r in rows] == [label] * 10 + [None, None]
    assert (
        rows[3].teacher == {"model": "PaLM 540B", "output": "train_CoT_3.json:0"}
        and rows[11].teacher == {}
    )
    neox = list(read_jsonl(tmp_path / "out" / f"{name}_train_gpt-neox.jsonl"))
    assert [r.rationale for r in neox] == ["Because."] * 12 and neox[0].teacher[
        "model"
    ] == "GPT-NeoX 20B"
    said = capsys.readouterr().out.splitlines()
    assert (
        said[0]
        == f"{name}_train.jsonl: 12 rows, 10 rationales, 10 teacher labels; teacher right on 90.9%"
    )
    assert said[1].startswith(f"{name}_train_gpt-neox.jsonl: 12 rows")


@pytest.mark.parametrize(
    "path, content, words",
    [
        ("svamp/llm/train_CoT_0.json", '["a", "b"]', "1 rows, but 2 teacher outputs"),
        ("svamp/llm/train_CoT_0.json", "[1]", "not a JSON list of texts"),
        ("svamp/svamp_train.json", '{"input": "x"}', "svamp_train.json:1: not a row"),
        (
            "svamp/svamp_train.json",
            '{"input": "x", "label": [3]}',
            'svamp_train.json:1: "label" must be a text',
        ),
        ("cqa/cqa_train.json", CQA | {"answer": ["c1"]}, 'cqa_train.json:1: "label" must be'),
        ("svamp/svamp_train.json", b'{"input": "\xe9"}', "svamp_train.json:1: not UTF-8"),
        ("svamp/svamp_train.json", None, "none of cqa/cqa_SPLIT.json"),
    ],
)
def test_a_release_that_is_not_as_it_should_be_is_one_line_and_exit_2(
    tmp_path, refused, path, content, words
):
    release(tmp_path, path.split("/")[0], [RELEASED["svamp"][0]])
    (tmp_path / path).unlink(missing_ok=True)
    if content is not None:
        content = json.dumps(content) if isinstance(content, dict) else content
        (tmp_path / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refused(official.main, tmp_path, "--out", tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    "name", ["train_CoT_0 (1).json", "train_CoT_2.json", "train_CoT_0.json.bak"]
)
def test_a_file_among_the_outputs_that_is_not_the_next_is_refused(tmp_path, refused, name):
    """Every later row would get the rationale of another."""
    release(tmp_path, "svamp", [RELEASED["svamp"][0]] * 3)
    (tmp_path / "svamp" / "llm" / "train_CoT_0.json").write_text('["a"]')
    (tmp_path / "svamp" / "llm" / name).write_text('["b"]')
    assert f"train_CoT_1.json is missing, and {name} is there" in refused(
        official.main, tmp_path, "--out", tmp_path / "o"
    )


def test_the_real_release_has_its_published_counts_and_one_accuracy_for_a_teacher(
    official, tmp_path, capsys
):
    """That of the paper, in data.official and in data.report, as data/README.md has it."""
    found = list(import_all(official, tmp_path))
    text = (Path(report.__file__).parent / "README.md").read_text("utf-8")
    assert found and all(line in text for line in found)
    for line in found:
        assert report.main([str(tmp_path / line.split(":")[0])]) == 0
        assert f"rows with gold, {line.split()[-1]}; labels compared" in capsys.readouterr().out
