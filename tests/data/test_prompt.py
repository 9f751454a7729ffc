"""Prompt files and the reading of answers: every file shipped works, a file that cannot work is
refused in one line.
"""

import json
import re

import pytest
from running import ROOT

from data.prompt import load_prompt

FOLDER = ROOT / "data" / "prompts"
NAMES = sorted(path.stem for path in FOLDER.iterdir())


def prompt(name):
    return load_prompt(FOLDER / f"{name}.json")


@pytest.mark.parametrize("name", NAMES)
def test_each_file_reads_back_its_own_answers_before_what_a_teacher_invents_next(name):
    p = prompt(name)
    assert 9 <= len(p.exemplars) <= 12
    for e in p.exemplars:
        read = p.parse(p.reply(e).strip() + p.stop[0] + " next" + p.reply(p.exemplars[0]), e.input)
        assert (read.rationale, read.label, read.error) == (e.rationale, e.label, None)


def test_the_prompt_file_in_the_readme_works(tmp_path):
    text = (FOLDER.parent / "README.md").read_text("utf-8")
    content = re.search(r"```json\n(\{\"instruction\".*?)```", text, re.DOTALL)[1]
    p = load_prompt(write(tmp_path, content))
    assert p.completion("Fine.", "good").endswith("known to be good.)\nReasons:")


def test_a_question_is_put_as_chat_and_as_completion():
    p = prompt("esnli")
    chat = p.chat("A dog runs.</s>An animal moves.")
    text = p.completion("A dog runs.</s>An animal moves.")
    roles = [m["role"] for m in chat]
    assert roles == ["user", "assistant"] * 9 + ["user"], "some templates refuse a system message"
    assert chat[-1]["content"] == "Premise: A dog runs.\nHypothesis: An animal moves.\nReasonings:"
    assert text.endswith("\n\n" + chat[-1]["content"]) and text.count("\nAnswer: ") == 9
    for first in (chat[0]["content"], text):
        assert first.startswith(p.instruction + "\n\nPremise: ") and "known" not in first
    with pytest.raises(ValueError, match="the prompt wants premise, hypothesis joined by </s>"):
        p.ask("A dog runs.")


def test_the_hint_of_rationalize_is_in_every_question_and_braces_stay():
    assert prompt("svamp").ask("Is {label} {input}?") == "Q: Is {label} {input}?\nA:"
    text = prompt("cqa").completion("Hm?\n(a) x\n(b) y", "y")
    assert text.endswith("\n(b) y\n(The answer is known to be (b) y.)\nA:")
    assert text.count("known") == 11


Q = "Where?\nAnswer Choices:\n(a) park\n(b) Garden Center\n(c) wooded area\n(d) U.S."


ANSWERED = [  # (prompt file, rationale, the text after it, label)
    ("svamp", "Two.", " The answer is 4 ÷ 2 = 2.", "4 / 2"),
    ("svamp", "Two.", " The answer is \\(\\boxed{\\text{1,000 + 4}}\\).", "1000 + 4"),
    ("cqa", "Trees.", " So the answer is (c) wooded area.<|im_end|>\nHi", "wooded area"),
    ("cqa", "Land.", " So the answer is D.", "U.S."),
    ("esnli", "Same.", "\nＡｎｓｗｅｒ： ｎｅｕｔｒａｌ", "neutral"),
    ("esnli", "Same.", "\n\n**Answer**: **Neutral**, not contradiction", "neutral"),
    ("anli", "The answer is 71.", " So the answer is neutral.", "neutral"),
]


@pytest.mark.parametrize("name, rationale, rest, label", ANSWERED)
def test_an_answer_is_read(name, rationale, rest, label):
    read = prompt(name).parse(rationale + rest, Q)
    assert (read.rationale, read.label, read.error) == (rationale, label, None)


PROBLEMS = {
    "The answer is (1 + 1).": "unparsed",  # no rationale
    "<plan> Two. The answer is (2).": "unparsed",
    "Two. The answer is (9**9**9).": "label_invalid",
    "First the answer is (3 + 5).\nWait. The answer is (3 + 4).": "label_invalid",
}
CUT_SHORT = {
    "Two. The answer is 84 / 2": "truncated",  # it may have been going to be 84 / 24
    "So far: the answer is (3 + 5).\nBut wait, that is": "truncated",
    "Two. The answer is (1 + 1).\n\nQ: And": None,
    "Two. The answer is (1 + 1).\n": None,
}


@pytest.mark.parametrize("text", [*PROBLEMS, *CUT_SHORT])
def test_a_problem_is_named(text):
    read = prompt("svamp").parse(text, Q, text in CUT_SHORT)
    assert read.error == (PROBLEMS | CUT_SHORT)[text] and bool(read.detail) == bool(read.error)


CLASSES = ["neutral or contradiction", "neutral (maybe entailment)", "neutrality"]
CLASSES += ["neutral\nAnswer: entailment"]


@pytest.mark.parametrize("text", CLASSES)
def test_an_answer_that_names_two_classes_or_none_is_rejected(text):
    assert prompt("esnli").parse(f"Same.\nAnswer: {text}", "").error == "label_invalid"


FINE = {
    "question": "Q: {input}\nA:",
    "answer": " {rationale} It is {label}.",
    "answer_marker": "It is",
    "label_type": "equation",
    "exemplars": [{"input": "1 and 1?", "rationale": "One more.", "label": "2"}],
}


def write(tmp_path, content):
    path = tmp_path / "p.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "change, words",
    [
        ('{"answer": ""}', "'exemplars' is missing"),
        ({"odd": ""}, "unexpected keyword argument 'odd'"),
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
    path = write(tmp_path, change if isinstance(change, str) else FINE | change)
    with pytest.raises(ValueError) as error:
        load_prompt(path)
    said = str(error.value)
    assert words in said and said.startswith(f"{path}: ") and "\n" not in said


LABEL_FIRST = FINE | {
    "answer": " It is {label}. {rationale}",
    "rationale_first": False,
    "label_type": "class",
    "labels": ["late", "very_late"],
    "exemplars": [{"input": "1 and 1?", "rationale": "One more. It waits.", "label": "very_late"}],
}


@pytest.mark.parametrize(
    "text, rationale, label",
    [
        ("It is late. It came after two.", "It came after two.", "late"),
        ("So: it is **Very Late**.\nIt waits. Long.", "It waits. Long.", "very_late"),
    ],
)
def test_a_label_may_come_first(tmp_path, text, rationale, label):
    read = load_prompt(write(tmp_path, LABEL_FIRST)).parse(text, "")
    assert (read.rationale, read.label, read.error) == (rationale, label, None)


SCHEMA = {"schema": True}
for key in ("question", "label_type", "labels", "exemplars"):
    SCHEMA[key] = LABEL_FIRST[key]


def test_a_schema_names_its_keys_in_order_and_its_exemplars_are_json(tmp_path):
    p = load_prompt(write(tmp_path, LABEL_FIRST | {"schema": True}))
    schema = p.response_format()["json_schema"]["schema"]
    assert schema["required"] == list(schema["properties"]) == ["label", "rationale"]
    assert schema["properties"]["label"]["enum"] == ["late", "very_late"]
    reply = p.chat("x")[1]["content"]
    assert reply == '{"label": "very_late", "rationale": "One more. It waits."}'


@pytest.mark.parametrize(
    "text, short, problem",
    [
        ('{"rationale": "So.", "label": "Very-late"}', False, None),
        ('```json\n{"label": "very_late", "rationale": " So."}\n```', True, None),
        ('{"rationale": "So.", "label": "ve', True, "truncated"),
        ('{"rationale": "So.", "label": null}', False, "unparsed"),
    ],
)
def test_an_answer_under_a_schema_is_read_or_its_problem_named(tmp_path, text, short, problem):
    read = load_prompt(write(tmp_path, SCHEMA)).parse(text, "", short)
    assert read.error == problem
    assert problem or (read.rationale, read.label) == ("So.", "very_late")
