"""Prompt files and the reading of answers: every file shipped works, a file that cannot work is
refused in one line.
"""

import json
import re
from dataclasses import replace

import pytest
from extracting import PROMPT
from running import ROOT

from data.prompt import check, load_prompt

FOLDER = ROOT / "data" / "prompts"
PROMPTS = {path.stem: load_prompt(path) for path in FOLDER.iterdir()}
NLI = PROMPTS["esnli"]
FIRST = {"answer": " Verdict: {label}. {rationale}", "answer_marker": ["Verdict:"]}
OTHERS = {
    "label first": replace(NLI, rationale_first=False, **FIRST),
    "schema": replace(NLI, schema=True),
}


@pytest.mark.parametrize("p", PROMPTS.values(), ids=PROMPTS)
def test_each_file_reads_back_its_own_answers_before_what_a_teacher_invents_next(p):
    assert 9 <= len(p.exemplars) <= 12
    for e in p.exemplars:
        read = p.parse(p.reply(e).strip() + p.stop[0] + " next" + p.reply(p.exemplars[0]), e.input)
        assert (read.rationale, read.label, read.error) == (e.rationale, e.label, None)


def test_the_prompt_file_in_the_readme_works(tmp_path):
    text = (FOLDER.parent / "README.md").read_text("utf-8")
    (tmp_path / "p").write_text(re.search(r"```json\n(\{\"instr.*?)```", text, re.DOTALL)[1])
    text = load_prompt(tmp_path / "p").completion("Fine.", "good")
    assert text.endswith("known to be good.)\nReasons:")


def test_a_question_is_put_as_chat_and_as_completion():
    chat = NLI.chat("A dog runs.</s>An animal moves.")
    text = NLI.completion("A dog runs.</s>An animal moves.")
    roles = [m["role"] for m in chat]
    assert roles == ["user", "assistant"] * 9 + ["user"], "some templates refuse a system message"
    assert chat[-1]["content"] == "Premise: A dog runs.\nHypothesis: An animal moves.\nReasonings:"
    assert text.endswith("\n\n" + chat[-1]["content"]) and text.count("\nAnswer: ") == 9
    for first in (chat[0]["content"], text):
        assert first.startswith(NLI.instruction + "\n\nPremise: ") and "known" not in first
    with pytest.raises(ValueError, match="the prompt wants premise, hypothesis joined by </s>"):
        NLI.ask("A dog runs.")


def test_the_hint_of_rationalize_is_in_every_question_and_braces_stay():
    assert PROMPTS["svamp"].ask("Is {label} {input}?") == "Q: Is {label} {input}?\nA:"
    text = PROMPTS["cqa"].completion("Hm?\n(a) x\n(b) y", "y")
    assert text.endswith("\n(b) y\n(The answer is known to be (b) y.)\nA:")
    assert text.count("known") == 11


Q = "Where?\nAnswer Choices:\n(a) park\n(b) Garden Center\n(c) wooded area"
ANSWERED = [  # (prompt, rationale, what is said after it, label)
    ("svamp", "Two.", " The answer is 4 ÷ 2 = 2.", "4 / 2"),
    ("svamp", "Two.", " The answer is \\(\\boxed{\\text{1,000 + 4}}\\).", "1000 + 4"),
    ("cqa", "Trees.", " So the answer is (c) wooded area.<|im_end|>\nHi", "wooded area"),
    ("esnli", "Same.", "\nＡｎｓｗｅｒ： ｎｅｕｔｒａｌ", "neutral"),
    ("esnli", "Same.", "\n\n**Answer**: **Neutral**, not contradiction", "neutral"),
    ("anli", "The answer is 71.", " So the answer is neutral.", "neutral"),
]


@pytest.mark.parametrize("name, rationale, rest, label", ANSWERED)
def test_an_answer_is_read(name, rationale, rest, label):
    read = PROMPTS[name].parse(rationale + rest, Q)
    assert (read.rationale, read.label, read.error) == (rationale, label, None)


@pytest.mark.parametrize(
    "name, text",
    [
        ("label first", "Verdict: neutral. So it is. I know."),
        ("label first", "Hm. verdict: **Neutral**.\nSo it is. I know."),
        ("schema", '```json\n{"rationale": " So it is. I know.", "label": "Neutral"}\n```'),
    ],
)
def test_a_label_may_come_first_and_an_answer_may_be_json(name, text):
    check(OTHERS[name])
    read = OTHERS[name].parse(text, "", cut_short=name == "schema")
    assert (read.rationale, read.label, read.error) == ("So it is. I know.", "neutral", None)


@pytest.mark.parametrize(
    "name, text, cut_short, error",
    [
        ("svamp", "The answer is (1 + 1).", False, "unparsed"),  # no rationale
        ("svamp", "<plan> Two. The answer is (2).", False, "unparsed"),
        ("svamp", "Two. The answer is (9**9**9).", False, "label_invalid"),
        ("svamp", "So the answer is (3 + 5). No, the answer is (3 + 4).", False, "label_invalid"),
        ("svamp", "Two. The answer is 84 / 2", True, "truncated"),  # of 84 / 24
        ("svamp", "So far: the answer is (3 + 5).\nBut wait, that is", True, "truncated"),
        ("svamp", "Two. The answer is (1 + 1).\n\nQ: And", True, None),
        ("svamp", "Two. The answer is (1 + 1).\n", True, None),
        ("esnli", "Same.\nAnswer: neutral (maybe entailment)", False, "label_invalid"),
        ("esnli", "Same.\nAnswer: neutral\nAnswer: entailment", False, "label_invalid"),
        ("schema", '{"rationale": "So.", "label": "neut', True, "truncated"),
        ("schema", '{"rationale": "So.", "label": null}', False, "unparsed"),
    ],
)
def test_a_problem_is_named(name, text, cut_short, error):
    read = (PROMPTS | OTHERS)[name].parse(text, "", cut_short)
    assert read.error == error and bool(read.detail) == bool(error)


def test_a_schema_names_its_keys_in_order_and_its_exemplars_are_json():
    p = replace(OTHERS["schema"], rationale_first=False)
    schema = p.response_format()["json_schema"]["schema"]
    assert schema["required"] == list(schema["properties"]) == ["label", "rationale"]
    assert schema["properties"]["label"]["enum"] == NLI.labels
    assert list(json.loads(p.chat("x</s>y")[1]["content"])) == ["label", "rationale"]
    numbers = replace(p, label_type="equation", labels=[])
    assert numbers.parse('{"label": 7, "rationale": "So."}', "").label == "7"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"exemplars": [{"input": "x"}]}, "missing 2 required"),
        ({"answer_marker": []}, '"answer_marker" is missing'),
        ({"stop": "Q:"}, '"stop" must be a list'),
        ({"label_type": "number"}, '"label_type" must be one of choice, class, equation, text'),
        ({"label_type": "class"}, '"labels" goes with label_type "class"'),
        ({"label_type": "class", "labels": ["a b", "A_b"]}, '"labels" must differ'),
        ({"question": "Q:"}, '"question" must have places for input (and hint), it has []'),
        ({"answer": "It is {label}. {rationale}"}, "exemplar 1 is not read back as it is"),
    ],
)
def test_a_file_that_cannot_work_is_one_line(tmp_path, change, words):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(PROMPT | change))
    with pytest.raises(ValueError) as error:
        load_prompt(path)
    said = str(error.value)
    assert words in said and said.startswith(f"{path}: ") and "\n" not in said
