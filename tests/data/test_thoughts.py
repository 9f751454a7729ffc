"""Thoughts in tags of any name stay out of the answer; text that only looks like a tag is left
alone.
"""

import pytest

from data.thoughts import markup_at_start, split_thoughts

HM = "Hm. Verdict: maybe?"
SAID = "It is late.\nVerdict: bug"
TAGS = [
    ("<think>", "</think>"),
    ("<THINKING>", "</Thinking>"),
    ("<inner_monologue>", "</inner_monologue>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("analysis", "assistantfinal"),
    ("", "</think>"),  # the opening tag is in the chat template
    ("", "◁/think▷"),
]


def split(text):
    thoughts, said = split_thoughts(text, lambda inside: "Verdict:" in inside)
    return thoughts, said.strip()


@pytest.mark.parametrize("opening, closing", TAGS)
def test_a_thought_is_what_a_tag_holds(opening, closing):
    assert split(f"{opening}{HM}{closing}\n\n{SAID}") == (HM, SAID)


@pytest.mark.parametrize(
    "opening", ["<think>", "<seed:think>", "[THINK]", "<|channel|>analysis<|message|>"]
)
def test_a_thought_that_never_ends_has_no_answer(opening):
    assert split(f"{opening}{HM}")[1] == ""


def test_a_tag_that_holds_the_answer_is_taken_off():
    assert split(f"<answer>{SAID}</answer>") == ("", SAID)
    assert split(f"<think>{HM}</think><answer>{SAID}</answer>") == (HM, SAID)


LOOK_ALIKES = [
    "<b>Late</b> it is.",
    "Analysis: it is late.",
    "[URGENT] It is late.",
    "1 < 2 and 3 > 2.",
    "<5 minutes>",
]


@pytest.mark.parametrize("text", LOOK_ALIKES)
def test_what_looks_like_a_tag_stays_untouched(text):
    assert (
        split(f"{text}\nVerdict: bug") == ("", f"{text}\nVerdict: bug")
        and markup_at_start(text) == ""
    )


@pytest.mark.parametrize("tag", ["<plan>", "</think>", "<|im_start|>", "[/THINK]", "◁x▷"])
def test_markup_that_is_left_is_named(tag):
    assert markup_at_start(f" {tag} It is late.") == tag
