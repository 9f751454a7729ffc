"""Thoughts in tags stay out of the answer; text that only looks like a tag is left alone."""

import pytest

from data.thoughts import markup_at_start, split_thoughts

HM = "Hm. Verdict: maybe?"
SAID = "It is late.\nVerdict: bug"
HARMONY = "<|channel|>analysis<|message|>"
TAGS = {"<think>": "</think>", "<THINKING>": "</Thinking>", "<seed:think>": "</seed:think>"}
TAGS |= {"[THINK]": "[/THINK]", "◁think▷": "◁/think▷", "<|channel>thought\n": "<channel|>"}
TAGS |= {HARMONY: "<|end|><|start|>assistant<|channel|>final<|message|>"}
TAGS |= {"analysis": "assistantfinal", "": "</think>"}  # "": it is in the chat template


@pytest.mark.parametrize("opening", TAGS)
def test_a_thought_is_what_a_tag_holds(opening):
    thoughts, said = split_thoughts(f"{opening}{HM}{TAGS[opening]}\n\n{SAID}")
    assert (thoughts, said.strip()) == (HM, SAID)


@pytest.mark.parametrize("opening", ["<think>", "[THINK]", HARMONY])
def test_a_thought_that_never_ends_has_no_answer(opening):
    assert split_thoughts(f"{opening}{HM}") == (HM, "")


@pytest.mark.parametrize("text", ["<b>Late</b>", "Analysis: late", "[URGENT] It is", "<5 minutes>"])
def test_what_looks_like_a_tag_stays_untouched(text):
    assert split_thoughts(text) == ("", text) and markup_at_start(text) == ""


@pytest.mark.parametrize("tag", ["<plan>", "</think>", "<|im_start|>", "[/THINK]", "◁x▷"])
def test_markup_that_is_left_is_named(tag):
    assert markup_at_start(f" {tag} It is late.") == tag
