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
    with pytest.raises(ValueError, match="tokenizer_config.json: (extra_ids is|not a JSON object)"):
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


T5_IDS = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "T5's are"),
        (T5_IDS | dict(normalization_rule_name="identity"), "trained with another normalization"),
        (T5_IDS | dict(normalization_rule_name="nmt_nfkc_cf"), None),  # a variant of NFKC
        (T5_IDS | dict(normalization_rule_name="nfkc"), None),
    ],
)
def test_a_model_with_other_ids_or_normalization_is_refused(tmp_path, options, words):
    import sentencepiece

    options = options | dict(vocab_size=30, hard_vocab_limit=False, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(tmp_path / "m"), **options
    )
    if words is None:
        assert tokenizer.T5Tokenizer(tmp_path / "m.model").encode("How") != [1]
        return
    with pytest.raises(ValueError, match=words):
        tokenizer.T5Tokenizer(tmp_path / "m.model")


@pytest.mark.parametrize("lines", [[], [""], ["abcdefghijklmnopqrstuvwxyz" * 3]])
def test_texts_that_cannot_be_trained_on_are_refused(tmp_path, lines):
    with pytest.raises(ValueError, match="no tokenizer.*(all blank|characters alone need 30)$"):
        tokenizer.train(lines, tmp_path / "x.model", vocab_size=10)
    assert not list(tmp_path.iterdir())


# ---- Tokenizers as transformers saves them, and tokens added later ------------------------------

ADDED = ["{", " <=", "①x", "Mia and"]
TEXTS = [*WORDS, "{", "｛", " <=", "<=", "①x", "1x", "<ORG>", "＜ORG＞", "<org>", "Mia and", "{{"]
mixed = st.lists(st.sampled_from(TEXTS), max_size=8).map("".join)


def save_fast(spiece, directory, added, special):
    """Save with transformers a tokenizer.json alone; returns transformers' tokenizer."""
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(spiece)
    theirs.add_tokens(added)
    theirs.add_tokens(special, special_tokens=True)
    theirs.save_pretrained(directory)
    return theirs


@pytest.fixture(scope="module", params=["nothing added", "tokens added", "also special ones"])
def fast(request, spiece, auto_tokenizer, tmp_path_factory):
    """(a directory with tokenizer.json and no spiece.model, transformers' tokenizer)."""
    directory = tmp_path_factory.mktemp("fast")
    added = [] if request.param == "nothing added" else ADDED
    special = ["<ORG>", "<sep>"] if request.param == "also special ones" else []
    return directory, save_fast(spiece, directory, added, special)


@given(mixed)
def test_a_tokenizer_json_alone_has_transformers_ids_and_texts(fast, text):
    directory, theirs = fast
    assert not (directory / "spiece.model").exists()
    ours = tokenizer.T5Tokenizer(directory)
    ids = theirs(text).input_ids
    assert ours.encode(text) == ids and ours.vocab_size == len(theirs)
    assert ours.decode(ids).strip() == theirs.decode(ids, skip_special_tokens=True).strip()


def test_what_we_save_of_a_tokenizer_json_is_the_same_tokenizer(fast, auto_tokenizer, tmp_path):
    directory, theirs = fast
    tokenizer.T5Tokenizer(directory).save(tmp_path)
    ours, again = tokenizer.T5Tokenizer(tmp_path), auto_tokenizer.from_pretrained(tmp_path)
    for text in [*ODD[:-1], "x{y <=①x Mia and <ORG> z"]:
        ids = theirs(text).input_ids
        assert ours.encode(text) == again(text).input_ids == ids
        assert ours.decode(ids).strip() == again.decode(ids, skip_special_tokens=True).strip()


def entry(text, **flags):
    return {"content": text, "normalized": True, "special": False} | flags


def put(directory, name, **content):
    path = directory / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | content))


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_added_tokens_are_read_wherever_they_stand(spiece, tmp_path, where):
    first = tokenizer.T5Tokenizer(spiece).vocab_size
    tokenizer.T5Tokenizer(spiece).save(tmp_path)
    if where == "added_tokens.json":
        put(tmp_path, where, **{"~~": first, "<B>": first + 1})
    elif where == "tokenizer_config.json":
        tokens = {str(first): entry("~~"), str(first + 1): entry("<B>", lstrip=True)}
        put(tmp_path, where, added_tokens_decoder=tokens)
    else:
        put(tmp_path, where, added_tokens=[entry("~~", id=first), entry("<B>", id=first + 1)])
    ours = tokenizer.T5Tokenizer(tmp_path)
    assert ours.vocab_size == first + 2
    assert ours.encode("one~~ two <B>")[1:] == [first, *ours.encode("two")[:-1], first + 1, 1]
    assert ours.decode(ours.encode("one ~~ two<B>")) == "one~~ two<B>"


def test_files_that_add_nothing_change_nothing(spiece, tmp_path):
    """What only looks like an addition: T5's own tokens listed once more, in three files."""
    ours = tokenizer.T5Tokenizer(spiece)
    ours.save(tmp_path)
    put(tmp_path, "added_tokens.json", **{"<extra_id_0>": ours.vocab_size - 1})
    listed = {"1": entry("</s>", special=True, rstrip=True), "2": entry("<unk>", special=True)}
    put(tmp_path, "tokenizer_config.json", added_tokens_decoder=listed, unknown_key={"a": [1]})
    put(tmp_path, "tokenizer.json", added_tokens=[entry("<pad>", id=0)], model={"type": "BPE"})
    again = tokenizer.T5Tokenizer(tmp_path)
    assert again.special == ours.special and again.vocab_size == ours.vocab_size
    assert [again.encode(text) for text in ODD] == [ours.encode(text) for text in ODD]


def at_a_sentinels_place(directory):
    size = tokenizer.T5Tokenizer(directory).vocab_size
    put(directory, "added_tokens.json", **{"~": size - 50})


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 31\n"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: put(d, "added_tokens.json", **{"~": 5}), "'~' has the id of another token"),
        (lambda d: put(d, "added_tokens.json", **{"</s>": 5000}), "</s>' has the id of another"),
        (at_a_sentinels_place, "'~' has the id of another token"),
        (
            lambda d: put(d, "added_tokens.json", **{"~": 5000, "|": 5000}),
            "'|' has the id of anoth",
        ),
        (lambda d: put(d, "added_tokens.json", a="b"), "added tokens that cannot be read"),
        (lambda d: put(d, "tokenizer.json", added_tokens=[{"id": 1}]), "added tokens that cannot"),
        (
            lambda d: put(d, "tokenizer.json", added_tokens=[entry("x", id=1, single_word=True)]),
            "word",
        ),
        (lambda d: (d / "spiece.model").write_text(POINTER), "spiece.model: a git-lfs pointer"),
        (lambda d: (d / "tokenizer.json").write_text(POINTER), "tokenizer.json: a git-lfs pointer"),
        (lambda d: (d / "tokenizer.json").write_text("[1]"), "tokenizer.json: not a JSON object"),
    ],
)
def test_tokens_and_files_that_cannot_be_right_are_refused(spiece, tmp_path, change, words):
    tokenizer.T5Tokenizer(spiece).save(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        tokenizer.T5Tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def first_stretch_only(content):
    content["pre_tokenizer"]["pretokenizers"][1]["prepend_scheme"] = "first"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c["model"].update(type="BPE"), "not a unigram model"),
        (lambda c: c["model"].update(unk_id=0), "not a unigram model"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "its normalization is Lowercase"),
        (lambda c: c.update(normalizer=None), "copy the spiece.model of the model"),
        (first_stretch_only, "each part of a text"),
        (lambda c: c["model"].update(vocab=[]), "tokenizer.json: "),
        (lambda c: c["model"]["vocab"].reverse(), "tokenizer.json: "),
        (dict.clear, "copy the spiece.model of the model"),
    ],
)
def test_a_tokenizer_json_of_another_kind_is_refused(
    spiece, auto_tokenizer, tmp_path, change, words
):
    save_fast(spiece, tmp_path, [], [])
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as error:
        tokenizer.T5Tokenizer(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["ByT5Tokenizer", "RobertaTokenizer", "LlamaTokenizerFast"])
def test_another_kind_of_tokenizer_is_named(tmp_path, kind):
    put(tmp_path, "tokenizer.json")
    put(tmp_path, "tokenizer_config.json", tokenizer_class=kind)
    with pytest.raises(
        ValueError, match=f"tokenizer.json: of class {kind}, another kind than T5's"
    ):
        tokenizer.T5Tokenizer(tmp_path)
