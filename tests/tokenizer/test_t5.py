"""The tokenizer gives the ids that transformers' T5 tokenizer gives over the same spiece.model."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import sentencepiece
from hypothesis import given
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
    """transformers' tokenizer of what we save; pad, </s> and unknown have their usual names."""
    return auto_tokenizer.from_pretrained(spiece)


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_have_transformers_ids(ours, theirs, text):
    ids = theirs(text).input_ids
    assert ours.encode(text) == ids
    assert ours.decode(ids).strip() == theirs.decode(ids, skip_special_tokens=True).strip()


def test_the_next_line_character_is_white_space(ours, theirs, transformers):
    if transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 takes U+0085 for an unknown character")
    ids = ours.encode("next\x85line")
    assert ids == theirs("next\x85line").input_ids == ours.encode("next line")


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


def test_training_twice_gives_the_same_model_and_words_stay_whole(tmp_path):
    """A word always written alike used to fall into letters: SentencePiece proposes only what two
    words share."""
    one = tokenizer.train(LINES, tmp_path / "a.model", vocab_size=200)
    two = tokenizer.train(iter(LINES), tmp_path / "b.model", vocab_size=200)
    assert one.model == two.model == (tmp_path / "a.model").read_bytes()
    pieces = one.pieces.id_to_piece(one.encode("How many are fruit?"))
    assert " ".join(pieces) == "▁How ▁many ▁are ▁fruit ? </s>"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("unit", ["a", "</s>", "longer and longer "])
def test_a_text_without_end_does_not_hold_up_training(tmp_path, unit):
    """A word of a million letters took six minutes: of a text, and of a word, only the beginning is
    trained on."""
    huge = unit * (1_000_000 // len(unit))
    cut = huge[:20_000] if " " in unit else huge[:100]
    one = tokenizer.train([*LINES, huge], tmp_path / "a.model", vocab_size=60)
    assert one.model == tokenizer.train([*LINES, cut], tmp_path / "b.model", vocab_size=60).model
    assert len(one.encode(huge)) > 60_000, "encoding, which takes no time, cuts nothing"


@pytest.mark.parametrize("lines", [[], [""], ["abcdefghijklmnopqrstuvwxyz" * 3]])
def test_texts_that_cannot_be_trained_on_are_refused(tmp_path, lines):
    with pytest.raises(ValueError, match="no tokenizer of 10 pieces.*blank, or have more char"):
        tokenizer.train(lines, tmp_path / "x.model", vocab_size=10)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(ours, tmp_path, monkeypatch):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device: .*spiece.model"):
        ours.save(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- The files beside spiece.model ----


@pytest.fixture
def saved(ours, tmp_path):
    """A directory with the tokenizer."""
    ours.save(tmp_path)
    return tmp_path


T5_IDS = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 31\n"
CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"


def write(name, text):
    return lambda directory: (directory / name).write_text(text)


def put(name, **content):
    return write(name, json.dumps(content))


def alone(kind="T5Tokenizer", model="Unigram"):
    """A tokenizer.json, and no spiece.model."""

    def change(directory):
        (directory / "spiece.model").unlink()
        put(CONFIG, tokenizer_class=kind)(directory)
        put("tokenizer.json", model={"type": model})(directory)

    return change


def another_model(**options):
    def change(directory):
        options_of_all = dict(vocab_size=30, hard_vocab_limit=False, minloglevel=2)
        with open(directory / "spiece.model", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(LINES), model_writer=file, **options_of_all, **options
            )

    return change


def test_extra_ids_come_from_the_configuration(ours, saved):
    """mT5's tokenizer_config.json says extra_ids: 0, for its spiece.model holds the sentinels."""
    put(CONFIG, extra_ids=0)(saved)
    for path in (saved, saved / "spiece.model"):
        bare = tokenizer.T5Tokenizer(path)
        assert bare.vocab_size == ours.vocab_size - 100 and "<extra_id_0>" not in bare.special
    (saved / "tokenizer_config.json").unlink()
    assert tokenizer.T5Tokenizer(saved).extra_ids == 100


def test_what_transformers_writes_for_every_t5_adds_nothing(ours, theirs, saved):
    """T5's own tokens listed once more: in transformers 5's files and in those of 4."""
    theirs.save_pretrained(saved)
    again = tokenizer.T5Tokenizer(saved)
    assert again.special == ours.special and again.vocab_size == ours.vocab_size
    sentinels = [f"<extra_id_{k}>" for k in range(100)]
    added = {str(ours.special[text]): {"content": text} for text in ["<pad>", "</s>", *sentinels]}
    put(CONFIG, added_tokens_decoder=added)(saved)
    put(MAP, additional_special_tokens=sentinels)(saved)
    put("added_tokens.json", **{"<extra_id_0>": ours.vocab_size - 1})(saved)
    (saved / "tokenizer.json").unlink()
    assert tokenizer.T5Tokenizer(saved).special == ours.special


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: (d / "spiece.model").unlink(), "spiece.model: no such SentencePiece model"),
        (write("spiece.model", "<html>"), "spiece.model: not a SentencePiece model"),
        (write("spiece.model", POINTER), "spiece.model: a git-lfs pointer"),
        (another_model(), "spiece.model: .*T5's are"),
        (another_model(normalization_rule_name="identity", **T5_IDS), "another normalization"),
        (write(CONFIG, "{"), "config.json: not a JSON object"),
        (write(CONFIG, "[" * 100_000), "config.json: not a JSON object"),
        (put(CONFIG, extra_ids="9"), "config.json: extra_ids is '9', not from 0"),
        (put("added_tokens.json", **{"{": 500}), "has added tokens such as '{'"),
        (put("added_tokens.json", one=5), "such as 'one'"),  # a piece, found in a word from now on
        (put(CONFIG, added_tokens_decoder={"500": {"content": " <="}}), "such as ' <='"),
        (put(CONFIG, extra_special_tokens=["<ORG>"]), "such as '<ORG>'"),
        (put(MAP, additional_special_tokens=[{"content": "<extra_id_100>"}]), "'<extra_id_100>'"),
        (put("tokenizer.json", added_tokens=[{"id": 1}]), "added tokens that cannot be read"),
        (alone(), "tokenizer.json is not read; copy the spiece.model of the model"),
        (alone("ByT5Tokenizer"), r"\(ByT5Tokenizer\) is of another kind than T5's"),
        (alone("PreTrainedTokenizerFast", "BPE"), "of another kind than T5's"),
    ],
)
def test_what_is_not_t5s_is_refused_by_name(saved, change, words):
    change(saved)
    with pytest.raises((FileNotFoundError, ValueError), match=words) as error:
        tokenizer.T5Tokenizer(saved)
    assert str(saved) in str(error.value) and "\n" not in str(error.value)
