"""Reading a reply: echoes are taken off, thoughts kept apart, and what went wrong is named."""

import pytest
from running import ROOT

from data.jsonl import Record
from data.prompt import load_prompt
from data.requests import Requests
from data.teacher import Reply

SAID = "It is late.\nAnswer: neutral"


def read(text, field="", cut_short=False, endpoint="chat", reasoning="drop"):
    """(the Answer, the kinds of warnings) of a reply. {all}, {last}: what was sent."""
    prompt = load_prompt(ROOT / "data" / "prompts" / "esnli.json")
    settings = {"model": "m", "endpoint": endpoint, "rationalize": False, "keep": "all"}
    requests = Requests(prompt, settings | {"reasoning": reasoning}, {})
    record = Record("r", "A dog runs.</s>It runs.")
    body = requests.body(record.input, None)
    sent = [m["content"] for m in body.get("messages", [])] or [body["prompt"]]
    text = text.format(all="\n".join(f"user: {each}" for each in sent), last=sent[-1])
    warned = []
    usage = {"prompt": 0, "completion": 0, "cached": 0}
    reply = Reply(text, field, cut_short, "m", usage)
    return requests.read(record, body, lambda kind, _: warned.append(kind), reply), warned


ECHOES = ["{last} ", "{last}\nassistant: ", "user\n{last}\nmodel\n", "{all}\nAssistant:"]


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_prompt_that_the_server_repeats_is_taken_off(echo, endpoint):
    answer, warned = read(echo + SAID, endpoint=endpoint)
    assert (answer.rationale, answer.label, warned) == ("It is late.", "neutral", ["echo"])


def test_a_rationale_that_quotes_the_question_stays_untouched():
    answer, warned = read("A dog runs. It runs. " + SAID)
    assert answer.rationale == "A dog runs. It runs. It is late." and not warned


def test_thoughts_are_dropped_or_kept():
    for text, field in (("<think>Hm.</think>" + SAID, ""), (SAID, "Hm.")):
        assert read(text, field)[0].rationale == "It is late."
        assert read(text, field, reasoning="keep")[0].rationale == "Hm.\nIt is late."


@pytest.mark.parametrize(
    "text, field, cut_short, words",
    [
        ("<think>Hm. Answer: neutral", "", True, "a larger --max-tokens"),
        ("", "Hm.", True, "a larger --max-tokens"),
        ("", SAID, False, "the answer is in the reasoning field"),
        ("", "Hm.", False, "thoughts and no answer"),
        ("It is late.\nAnswer: odd", "", False, "no class (entailment, neutral, contradiction)"),
    ],
)
def test_what_went_wrong_is_named_at_the_first_row(text, field, cut_short, words):
    answer, warned = read(text, field, cut_short)
    assert words in answer.detail and warned == [answer.error]
