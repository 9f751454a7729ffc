"""The embedded task is honest, and depends on its seed alone."""

from data import toy


def test_the_rationale_names_the_kinds_in_order_and_the_label_is_their_mode():
    parts = toy.make_rows(3)
    assert parts == toy.make_rows(3) != toy.make_rows(2), "they depend on the seed alone"
    assert [len(part) for part in parts] == list(toy.SIZES.values())
    questions = [row.input for part in parts for row in part]
    assert len(set(questions)) == len(questions), "no question twice"
    kind_of = {word: kind for kind, words in toy.WORDS.items() for word in words}
    assert len(kind_of) == sum(map(len, toy.WORDS.values())) == 144, "no word is of two kinds"
    for row in [row for part in parts for row in part][::7]:
        words = row.input.replace(",", "").replace(".", "").split()
        kinds = [kind_of[word] for word in words if word in kind_of]
        assert row.rationale.split() == kinds and 4 <= len(kinds) <= 6
        assert all(
            kinds.count(row.label) > kinds.count(other) for other in set(kinds) - {row.label}
        )
        assert row.teacher_label == row.label
