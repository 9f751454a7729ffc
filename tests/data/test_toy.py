"""The embedded task is honest, and depends on its seed alone."""

import re
from collections import Counter

from data import toy


def test_the_rationale_names_the_kinds_in_order_and_the_label_is_their_mode():
    train, validation, test = toy.make_rows(3)
    assert (train, validation, test) == toy.make_rows(3) != toy.make_rows(2)
    questions = {row.input for row in (*train, *validation, *test)}
    assert len(questions) == 1600, "no question twice"
    kind_of = {word: kind for kind, words in toy.WORDS.items() for word in words}
    assert len(kind_of) == 144, "no word is of two kinds"
    for row in train:
        words = re.findall(r"\w+", row.input)
        assert row.rationale.split() == [kind_of[word] for word in words if word in kind_of]
        (label, most), *others = Counter(row.rationale.split()).most_common()
        assert row.label == row.teacher_label == label
        assert all(count < most for _, count in others)
