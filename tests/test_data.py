"""The record, the import of the released datasets, and the embedded task."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import official, report, toy
from data.jsonl import Record, read_jsonl, write_jsonl
from data.official import import_all

texts = st.text().filter(str.strip)
maybe = st.none() | texts
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
    max_leaves=4,
)
keys = st.text().filter(lambda k: k not in {"id", "input", "label", "rationale", "teacher_label", "teacher"})
records = st.builds(
    Record, st.text(), texts, maybe, maybe, maybe,
    st.dictionaries(st.text(), json_values, max_size=2), st.dictionaries(keys, json_values, max_size=2),
)  # fmt: skip


@given(st.lists(records, max_size=4))
def test_records_are_read_as_written_unknown_keys_included(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    write_jsonl(path, rows)
    assert list(read_jsonl(path)) == rows
    assert all(not line.isspace() for line in path.read_text("utf-8").split("\n")[:-1])


@pytest.mark.parametrize(
    "line, words",
    [
        (b"{", "not JSON"),
        (b"[1]", "a record is a JSON object, this is list"),
        (b"{}", '"input" must be a text that is not blank, got None'),
        (b'{"input": "  "}', "not blank"),
        (b'{"input": "x", "label": 3.5}', '"label" must be a text or null, got 3.5'),
        (b'{"input": "x", "rationale": []}', '"rationale" must be'),
        (b'{"input": "x", "input": "y"}', "a key is there twice"),
        (b'{"input": "x", "teacher_label": false}', '"teacher_label" must be'),
        (b'{"input": "x", "id": true}', '"id" must be a text, got True'),
        (b'{"input": "x", "teacher": "PaLM"}', '"teacher" must be an object'),
        (b'{"input": "caf\xe9"}', "not UTF-8"),
        (rb'{"input": "a \ud83d"}', "half a character"),
        (rb'{"input": "x", "id": "\uDE00"}', "half a character"),
        (rb'{"input": "x", "teacher": {"reply": ["\ude00\ud83d"]}}', "half a character"),
        (rb'{"input": "x", "\ud83d": 1}', "half a character"),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_reason(tmp_path, line, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"input": "fine"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match="rows.jsonl:3: ") as error:
        list(read_jsonl(path))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_blank_texts_are_absent_rows_without_id_are_numbered_and_whole_escaped_characters_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"input": "a", "label": " ", "rationale": ""}\r\n')
    with path.open("ab") as file:
        file.write(rb'{"input": "\ud83d\ude00 \\ud83d", "id": "seven"}')
    one, two = read_jsonl(path)
    assert (one.id, one.label, one.rationale) == ("rows-1", None, None)
    assert (two.id, two.input) == ("seven", "\U0001f600 \\ud83d")


def test_half_a_character_does_not_end_the_writing_of_a_file(tmp_path):
    """A file whose name is not UTF-8 gives its rows such ids; a crash while writing lost the whole file."""
    write_jsonl(tmp_path / "x", [Record("a\udcff", "x"), {"id": "b\udcff"}])
    lines = (tmp_path / "x").read_text("utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["a\udcff", "b\udcff"]


OUTPUTS = [  # (dataset, raw output, rationale, teacher label)
    ("cqa", "It burns. So the answer is (c) a wood.\n\nQ: Next? So the answer is (a) x.", "It burns.", "a wood"),
    ("cqa", "Both. So the answer is either (a) sea or (b) ocean.\n\nQ:", "Both.", None),
    ("cqa", "So the answer is (b) U.S.", None, "U.S"),
    ("svamp", "84 / 2 = 42. The answer is (84 / 2).\n\nQ: There are", "84 / 2 = 42.", "(84 / 2)"),
    ("svamp", "Nested. The answer is ((1 + 2) * 3).", "Nested.", "((1 + 2) * 3)"),
    ("svamp", "Unknown. The answer is (23 + x).", "Unknown.", None),
    ("svamp", "It never says.\n\nQ: Next? The answer is (1 + 1).", None, None),
    ("anli1", "They differ. So the answer is contradiction.\n\nPremise: next", "They differ.", "contradiction"),
    ("anli1", "\nThey differ. The answer is neutral.", "They differ.", "neutral"),  # GPT-NeoX writes it so, too
    ("esnli", "Same thing.\nAnswer: entailment\n\nPremise: x\nAnswer: neutral", "Same thing.", "entailment"),
    ("esnli", "Same thing.\n", None, None),
]


@pytest.mark.parametrize("name, output, rationale, label", OUTPUTS)
def test_outputs_are_cut_at_the_answer_and_before_the_invented_example(name, output, rationale, label):
    assert official.parse_output(output, official.FORMATS[name]) == (rationale, label)


@given(st.sampled_from(list(official.FORMATS)), st.text())
def test_any_output_parses_to_a_rationale_that_holds_no_next_example(name, output):
    rationale, _ = official.parse_output(output, official.FORMATS[name])
    assert rationale is None or rationale.strip() and official.FORMATS[name].next_example not in rationale


CHOICES = "Where?\nAnswer Choices:\n(a) a1\n(b) b1\n(c) c1\n(d) d1\n(e) e1"
RELEASED = {  # (row, its input, an output, its label)
    "cqa": ({"question": "Where?", "choices": ["a1", "b1", "c1", "d1", "e1"], "answer": "c1"},
            CHOICES, "Because. So the answer is (c) c1.", "c1"),
    "svamp": ({"input": "Two boxes of 42?", "label": "( 84.0 / 2.0 )"},
              "Two boxes of 42?", "Because. The answer is (42 * 1).", "(42 * 1)"),
    "anli1": ({"premise": "p", "hypothesis": "h", "label": 2, "uid": "u", "reason": ""},
              "p</s>h", "Because. So the answer is contradiction.", "contradiction"),
    "esnli": ({"premise": "p", "hypothesis": "h", "label": 0}, "p</s>h", "Because.\nAnswer: entailment", "entailment"),
}  # fmt: skip
CQA, ESNLI = RELEASED["cqa"][0], RELEASED["esnli"][0]


def release(root, name, rows, split="train"):
    (root / name / "llm").mkdir(parents=True)
    (root / name / f"{name}_{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


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
    assert rows[3].teacher == {"model": "PaLM 540B", "output": "train_CoT_3.json:0"} and rows[11].teacher == {}
    neox = list(read_jsonl(tmp_path / "out" / f"{name}_train_gpt-neox.jsonl"))
    assert [r.rationale for r in neox] == ["Because."] * 12 and neox[0].teacher["model"] == "GPT-NeoX 20B"
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{name}_train.jsonl: 12 rows, 10 rationales, 10 teacher labels; teacher right on 90.9%"
    assert said[1].startswith(f"{name}_train_gpt-neox.jsonl: 12 rows")


@pytest.mark.parametrize(
    "path, content, words",
    [
        ("svamp/llm/train_CoT_0.json", '["a", "b"]', "1 rows, but 2 teacher outputs"),
        ("svamp/llm/train_CoT_0.json", "[1]", "not a JSON list of texts"),
        ("svamp/svamp_train.json", '{"input": "x"}', "svamp_train.json:1: not a row"),
        ("svamp/svamp_train.json", '{"input": "x", "label": [3]}', 'svamp_train.json:1: "label" must be a text'),
        ("svamp/svamp_train.json", r'{"input": "\ud83d", "label": "x"}', "train.json:1: it holds half a character"),
        ("cqa/cqa_train.json", CQA | {"choices": [1, 2, 3, 4, 5]}, "train.json:1: not a row"),
        ("cqa/cqa_train.json", CQA | {"answer": ["c1"]}, 'cqa_train.json:1: "label" must be'),
        ("esnli/esnli_train.json", ESNLI | {"premise": ["p"]}, "esnli_train.json:1: not a row"),
        ("svamp/svamp_train.json", b'{"input": "\xe9"}', "svamp_train.json:1: not UTF-8"),
        ("svamp/svamp_train.json", None, "none of cqa/cqa_SPLIT.json"),
    ],
)
def test_a_release_that_is_not_as_it_should_be_is_one_line_and_exit_2(tmp_path, refused, path, content, words):
    release(tmp_path, path.split("/")[0], [RELEASED["svamp"][0]])
    (tmp_path / path).unlink(missing_ok=True)
    if content is not None:
        content = json.dumps(content) if isinstance(content, dict) else content
        (tmp_path / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refused(official.main, tmp_path, "--out", tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_the_real_release_has_its_published_counts_and_one_accuracy_for_a_teacher(official, tmp_path, capsys):
    """That of the paper, in data.official and in data.report, as data/README.md has it."""
    found = list(import_all(official, tmp_path))
    text = (Path(report.__file__).parent / "README.md").read_text("utf-8")
    assert found and all(line in text for line in found)
    for line in found:
        assert report.main([str(tmp_path / line.split(":")[0])]) == 0
        assert f"rows with gold, {line.split()[-1]}; labels compared" in capsys.readouterr().out


def test_the_embedded_task_is_honest():
    """No question twice; the rationale names the items' kinds in order and no item; the label is their mode."""
    parts = toy.make_rows(3)
    assert [len(part) for part in parts] == list(toy.SIZES.values())
    questions = [row.input for part in parts for row in part]
    assert len(set(questions)) == len(questions)
    kind_of = {word: kind for kind, words in toy.WORDS.items() for word in words}
    assert len(kind_of) == sum(map(len, toy.WORDS.values())), "no word is of two kinds"
    for row in [row for part in parts for row in part][::7]:
        kinds = [kind_of[word] for word in row.input.replace(",", "").replace(".", "").split() if word in kind_of]
        assert row.rationale.split() == kinds and 4 <= len(kinds) <= 6
        assert all(kinds.count(row.label) > kinds.count(other) for other in set(kinds) - {row.label})
        assert row.teacher_label == row.label


def test_the_embedded_task_depends_on_its_seed_alone(tmp_path, capsys):
    assert toy.make_rows(1) == toy.make_rows(1) != toy.make_rows(2)
    assert toy.main(["--out", str(tmp_path), "--seed", "1"]) == 0
    assert list(read_jsonl(tmp_path / "toy_train.jsonl")) == toy.make_rows(1)[0]
    assert "toy_test.jsonl: 1,000 rows" in capsys.readouterr().out
