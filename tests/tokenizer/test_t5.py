"""The tokenizer gives the ids that transformers' T5 tokenizer gives over the same spiece.model."""

import io
import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

import tokenizer

ODD = [
    "", " a  b ", "line\nbreak\n\n\nx", "( 84.0 / 2.0 )", "premise here</s>hypothesis there",
    "</s></s>", "x</s>", "<pad>x<unk>y", "<", "</S>", "<s>", "\u2581under\u2581",
    "<extra_id_0> x <extra_id_7>y<extra_id_99>", "<extra_id_100>", "<extra_id_07>",
    "ünïcödé ﬁ ｆｕｌｌ ①②½", "日本語 你好", "emoji 😀😀", "zero\u200bwidth",
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
    """transformers' tokenizer of what we save; pad, </s> and unknown have their usual names."""
    return auto_tokenizer.from_pretrained(spiece)


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_have_transformers_ids(ours, theirs, text):
    ids = theirs(text).input_ids
    assert ours.encode(text) == ids and ours.vocab_size == len(theirs)
    assert ours.decode(ids).strip() == theirs.decode(ids, skip_special_tokens=True).strip()


@given(texts)
def test_any_text_has_transformers_ids(ours, theirs, text):
    assert ours.encode(text) == theirs(text).input_ids


def test_the_next_line_character_is_white_space(ours):
    """As it is to transformers 5."""
    assert ours.encode("next\x85line") == ours.encode("next line")


def test_training_twice_gives_the_same_model_and_words_stay_whole(tmp_path):
    """A word always written alike used to fall into letters: SentencePiece proposes only what two
    words share."""
    one = tokenizer.train(LINES, tmp_path / "a.model", vocab_size=200)
    two = tokenizer.train(iter(LINES), tmp_path / "b.model", vocab_size=200)
    assert one.model == two.model == (tmp_path / "a.model").read_bytes()
    pieces = one.pieces.id_to_piece(one.encode("How many are fruit?"))
    assert " ".join(pieces) == "▁How ▁many ▁are ▁fruit ? </s>"


@pytest.mark.parametrize("unit, length", [("a", 100), ("longer and longer ", 200)])
def test_a_text_without_end_does_not_hold_up_training(tmp_path, monkeypatch, unit, length):
    """A word of a million letters took six minutes: of a text, and of a word, only the beginning is
    trained on."""
    monkeypatch.setattr("tokenizer.t5.LONGEST_TEXT", 200)
    huge = unit * 20_000
    one = tokenizer.train([*LINES, huge], tmp_path / "a.model", vocab_size=60)
    two = tokenizer.train([*LINES, huge[:length]], tmp_path / "b.model", vocab_size=60)
    assert one.model == two.model


@pytest.mark.parametrize("text", ["", "abcdefghijklmnopqrstuvwxyz"])
def test_texts_that_cannot_be_trained_on_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match="no tokenizer of 10 pieces.*blank, or have more char"):
        tokenizer.train([text], tmp_path / "x.model", vocab_size=10)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(ours, tmp_path, monkeypatch):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device: .*spiece.model"):
        ours.save(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- The files beside spiece.model ----


MODEL = "spiece.model"
CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
FAST = "tokenizer.json"


@pytest.fixture
def saved(ours, tmp_path):
    """A directory with the tokenizer."""
    ours.save(tmp_path)
    return tmp_path


def change(directory, files):
    """files: {name: bytes, the content of a JSON file, or None to delete it}"""
    for name, content in files.items():
        if content is None:
            (directory / name).unlink()
        elif isinstance(content, bytes):
            (directory / name).write_bytes(content)
        else:
            (directory / name).write_text(json.dumps(content))


def another_model(**options):
    model = io.BytesIO()
    options |= dict(vocab_size=30, hard_vocab_limit=False, minloglevel=2, model_writer=model)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), **options)
    return model.getvalue()


def test_extra_ids_come_from_the_configuration(ours, saved):
    """mT5's tokenizer_config.json says extra_ids: 0, for its spiece.model holds the sentinels."""
    change(saved, {CONFIG: {"extra_ids": 0}})
    for path in (saved, saved / MODEL):
        bare = tokenizer.T5Tokenizer(path)
        assert bare.vocab_size == ours.vocab_size - 100 and "<extra_id_0>" not in bare.special
    change(saved, {CONFIG: None})
    assert tokenizer.T5Tokenizer(saved).extra_ids == 100


def test_what_transformers_writes_for_every_t5_adds_nothing(ours, theirs, saved):
    """T5's own tokens listed once more: in transformers 5's files and in those of 4."""
    theirs.save_pretrained(saved)
    assert tokenizer.T5Tokenizer(saved).special == ours.special
    sentinels = [f"<extra_id_{k}>" for k in range(100)]
    added = {str(ours.special[text]): {"content": text} for text in ["<pad>", "</s>", *sentinels]}
    change(saved, {CONFIG: {"added_tokens_decoder": added}, FAST: None})
    change(saved, {MAP: {"additional_special_tokens": sentinels}, ADDED: {"<extra_id_0>": 399}})
    assert tokenizer.T5Tokenizer(saved).special == ours.special


IDENTITY = another_model(
    normalization_rule_name="identity", pad_id=0, eos_id=1, unk_id=2, bos_id=-1
)
ALONE = {MODEL: None, FAST: {"model": {"type": "Unigram"}}}


@pytest.mark.parametrize(
    "files, words",
    [
        ({MODEL: None}, "spiece.model: no such SentencePiece model"),
        ({MODEL: b"<html>"}, "spiece.model: not a SentencePiece model"),
        ({MODEL: b"version https://git-lfs.github.com/spec/v1"}, "spiece.model: a git-lfs pointer"),
        ({MODEL: another_model()}, "spiece.model: .*T5's are"),
        ({MODEL: IDENTITY}, "another normalization"),
        ({CONFIG: b"{"}, "config.json: not a JSON object"),
        ({CONFIG: b"[" * 100_000}, "config.json: not a JSON object"),
        ({CONFIG: {"extra_ids": "9"}}, "config.json: extra_ids is '9', not from 0"),
        ({ADDED: {"{": 500}}, "has added tokens such as '{'"),
        ({ADDED: {"one": 5}}, "such as 'one'"),  # a piece, found in a word from now on
        ({CONFIG: {"added_tokens_decoder": {"500": {"content": " <="}}}}, "such as ' <='"),
        ({CONFIG: {"extra_special_tokens": ["<ORG>"]}}, "such as '<ORG>'"),
        ({MAP: {"additional_special_tokens": [{"content": "<ORG>"}]}}, "such as '<ORG>'"),
        ({FAST: {"added_tokens": [{"id": 1}]}}, "added tokens that cannot be read"),
        (ALONE, "tokenizer.json is not read; copy the spiece.model of the model"),
        (
            ALONE | {CONFIG: {"tokenizer_class": "ByT5Tokenizer"}},
            r"\(ByT5Tokenizer\) is of another",
        ),
        (ALONE | {FAST: {"model": {"type": "BPE"}}}, "of another kind than T5's"),
    ],
)
def test_what_is_not_t5s_is_refused_by_name(saved, files, words):
    change(saved, files)
    with pytest.raises((FileNotFoundError, ValueError), match=words) as error:
        tokenizer.T5Tokenizer(saved)
    assert str(saved) in str(error.value) and "\n" not in str(error.value)
