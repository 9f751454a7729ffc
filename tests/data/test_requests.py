"""Reading a reply: echoes are taken off, thoughts are apart, and what went wrong is named."""

import pytest
from running import ROOT

from data.jsonl import Record
from data.prompt import load_prompt
from data.requests import Requests, texts_sent
from data.teacher import Reply

PROMPT = load_prompt(ROOT / "data" / "prompts" / "esnli.json")
SAID = "It is late.\nAnswer: neutral"


def read(text, field="", cut_short=False, **changed):
    """(the Answer, the kinds of warnings) of a reply. {last}: the last text that was sent."""
    settings = {"model": "m", "endpoint": "chat", "rationalize": False, "reasoning": "drop"}
    requests = Requests(PROMPT, settings | changed, {})
    record = Record("r", "A dog runs.</s>It runs.")
    text = text.format(last=texts_sent(requests.body(record))[-1])
    warned = []
    reply = Reply(text, field, cut_short, "m", {"prompt": 90, "completion": 0})
    return requests.read(record, lambda kind, _: warned.append(kind), reply), warned


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_prompt_that_the_server_repeats_is_taken_off(endpoint):
    answer, warned = read("user\n {last}\nassistant: " + SAID, endpoint=endpoint)
    assert (answer.rationale, answer.label) == ("It is late.", "neutral") and warned[-1] == "echo"


def test_a_rationale_that_quotes_the_question_stays_untouched_and_a_cut_prompt_is_said():
    answer, warned = read("A dog runs. It runs. " + SAID)
    assert answer.rationale == "A dog runs. It runs. It is late." and warned == ["cut"]


@pytest.mark.parametrize("text, field", [("<think>Hm.</think>" + SAID, ""), (SAID, "Hm.")])
def test_thoughts_are_dropped_or_stand_before_the_rationale(text, field):
    assert read(text, field)[0].rationale == "It is late."
    assert read(text, field, reasoning="keep")[0].rationale == "Hm.\nIt is late."


@pytest.mark.parametrize(
    "text, field, cut_short, words",
    [
        ("<think>Hm. Answer: neutral", "", True, "a larger --max-tokens"),
        ("", SAID, False, "took the whole answer for thoughts"),
        ("It is late.\nAnswer: odd", "", False, "no label (entailment, neutral"),
    ],
)
def test_what_went_wrong_is_named_at_the_first_row(text, field, cut_short, words):
    answer, warned = read(text, field, cut_short)
    assert words in answer.detail and warned[-1] == answer.error
