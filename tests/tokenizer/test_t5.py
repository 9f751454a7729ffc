"""The tokenizer gives the ids that transformers' T5 tokenizer gives over the same spiece.model."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tokenizer

ODD = [
    "", " leading", "trailing  ", "a  b   c", "line\nbreak\n\n\nx", "tab\there",
    "\r\nwindows\r\n", "( 84.0 / 2.0 )", "premise here</s>hypothesis there",
    "premise </s> hypothesis", "</s></s>", "x</s>", "<pad>x<unk>y", "<", "</S>",
    "<extra_id_0> x <extra_id_7>y<extra_id_99>", "<extra_id_100>", "<extra_id_07>", "<s>",
    "ünïcödé ﬁ ｆｕｌｌ ①②½", "日本語 你好", "emoji 😀😀", "zero\u200bwidth", "\u2581under\u2581",
    "\u00a0\u3000\u2028\u2009", "ab\u0301c", "\ufeffbom", "a\x00b\x01c",
]  # fmt: skip
WORDS = ["one", " ", "\n", "</s>", "<extra_id_3>", "é", "?", "\t", "Mia", "<pad>", "84.0", "日"]
LINES = [f"How many are {kind}?" for kind in ("fruit", "tools", "animals")] * 5
texts = st.text() | st.lists(st.sampled_from(WORDS)).map("".join)


@pytest.fixture(scope="module")
def ours(spiece):
    return tokenizer.T5Tokenizer(spiece)


@pytest.fixture(scope="module")
def theirs(spiece, auto_tokenizer):
    return auto_tokenizer.from_pretrained(spiece)


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_have_transformers_ids(ours, theirs, text):
    assert ours.encode(text) == theirs(text).input_ids
    decoded = theirs.decode(theirs(text).input_ids, skip_special_tokens=True)
    assert ours.decode(ours.encode(text)).strip() == decoded.strip()


def test_the_next_line_character_is_white_space(ours, theirs, transformers):
    if transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 takes U+0085 for an unknown character")
    assert (
        ours.encode("next\x85line") == theirs("next\x85line").input_ids == ours.encode("next line")
    )


@given(texts)
def test_any_text_has_transformers_ids(ours, theirs, text):
    assert ours.encode(text) == theirs(text).input_ids


def test_released_texts_have_transformers_ids(ours, theirs, official):
    for line in (official / "svamp" / "svamp_train.json").read_text("utf-8").splitlines()[:200]:
        for text in json.loads(line).values():
            assert ours.encode(text) == theirs(text).input_ids


def test_vocabulary_is_laid_out_as_t5s(ours, theirs):
    assert ours.vocab_size == len(theirs)
    assert ours.encode("</s>") == [1, 1] and ours.encode("") == [1]
    assert ours.encode("<extra_id_0>") == [ours.vocab_size - 1, 1]
    assert ours.encode("<extra_id_99>") == [ours.vocab_size - 100, 1]
    assert ours.special["<pad>"] == 0 and ours.special["<unk>"] == 2


@given(st.lists(st.sampled_from(["one", "two", "apples", "left", "how", "many"]), max_size=12))
@example([])
def test_decoding_gives_back_known_words(ours, words):
    assert ours.decode(ours.encode("  ".join(words))) == " ".join(words)


def test_training_twice_gives_the_same_model_and_words_stay_whole(tmp_path):
    """A word always written alike used to fall into letters: SentencePiece proposes only what two
    words share."""
    one = tokenizer.train(LINES, tmp_path / "a.model", vocab_size=200)
    two = tokenizer.train(iter(LINES), tmp_path / "b.model", vocab_size=200)
    assert one.model == two.model == (tmp_path / "a.model").read_bytes()
    assert (
        " ".join(map(one.pieces.id_to_piece, one.encode("How many are fruit?")))
        == "▁How ▁many ▁are ▁fruit ? </s>"
    )
    assert not list(tmp_path.glob("*.tmp"))


def test_extra_ids_come_from_the_configuration(spiece, tmp_path):
    """mT5's tokenizer_config.json says extra_ids: 0, for its spiece.model holds the sentinels."""
    tokenizer.T5Tokenizer(spiece).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 0}')
    bare = tokenizer.T5Tokenizer(tmp_path)
    assert bare.vocab_size == tokenizer.T5Tokenizer(spiece).vocab_size - 100
    assert "<extra_id_0>" not in bare.special
    assert tokenizer.T5Tokenizer(tmp_path / "spiece.model").extra_ids == 0, (
        "named as a file or by its directory"
    )
    (tmp_path / "tokenizer_config.json").unlink()
    assert tokenizer.T5Tokenizer(tmp_path / "spiece.model").extra_ids == 100


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        "[" * 100_000,
        *(f'{{"extra_ids": {n}}}' for n in ("-1", "1000000", "Infinity", '"9"', "true")),
    ],
)
def test_a_configuration_that_is_none_is_refused_by_name(spiece, tmp_path, content):
    tokenizer.T5Tokenizer(spiece).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(
        ValueError, match="tokenizer_config.json: (extra_ids is|not a tokenizer configuration)"
    ):
        tokenizer.T5Tokenizer(tmp_path)


@pytest.mark.parametrize("unit", ["a", "ab ", "</s>", "longer and longer "])
def test_a_text_without_end_does_not_hold_up_training(tmp_path, unit):
    """A word of a million letters took six minutes: of a text, and of a word, only the beginning is
    trained on."""
    huge = unit * (1_000_000 // len(unit))
    cut = huge[:20_000] if " " in unit else huge[:100]
    one = tokenizer.train([*LINES, huge], tmp_path / "a.model", vocab_size=60)
    assert one.model == tokenizer.train([*LINES, cut], tmp_path / "b.model", vocab_size=60).model
    assert len(one.encode(huge)) > 60_000, "encoding, which takes no time, cuts nothing"


def test_a_full_disk_leaves_nothing_behind(spiece, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Path, "write_bytes", Mock(side_effect=OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left on device: .*spiece.model"):
        tokenizer.T5Tokenizer(spiece).save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content, error", [(None, FileNotFoundError), (b"", ValueError), (b"not a model", ValueError)]
)
def test_a_file_that_is_no_model_is_refused_by_name(tmp_path, content, error):
    path = tmp_path / "spiece.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match="spiece.model"):
        tokenizer.T5Tokenizer(path)


def test_a_model_with_other_ids_is_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"] * 9),
        model_prefix=str(tmp_path / "m"),
        vocab_size=8,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="T5's are"):
        tokenizer.T5Tokenizer(tmp_path / "m.model")


@pytest.mark.parametrize("lines", [[], [""], ["abcdefghijklmnopqrstuvwxyz" * 3]])
def test_texts_that_cannot_be_trained_on_are_refused(tmp_path, lines):
    with pytest.raises(ValueError, match="no tokenizer.*(all blank|characters alone need 30)$"):
        tokenizer.train(lines, tmp_path / "x.model", vocab_size=10)
    assert not list(tmp_path.iterdir())
