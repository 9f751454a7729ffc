"""The record: read as written, refused in one line, and other formats named."""

import gzip
import json

import pytest

from data.jsonl import Record, other_format, read_jsonl, write_jsonl


def test_records_are_read_as_written_unknown_keys_included(tmp_path):
    full = Record("a", "x\u2028y", "l", "r\n", "t", {"model": ["m"]}, {"mine": {"k": None}})
    write_jsonl(tmp_path / "x.jsonl", [full, Record("b", "x")])
    assert list(read_jsonl(tmp_path / "x.jsonl")) == [full, Record("b", "x")]


@pytest.mark.parametrize(
    "line, words",
    [
        (b"[1]", "a record is a JSON object, this is list"),
        (b'{"input": "  "}', '"input" must be a text that is not blank'),
        (b'{"input": "x", "label": 3.5}', '"label" must be a text or null, got 3.5'),
        (b'{"input": "x", "teacher": "PaLM"}', '"teacher" must be an object'),
        (b'{"input": "caf\xe9"}', "not UTF-8"),
        (rb'{"input": "x", "teacher": {"reply": ["\ude00\ud83d"]}}', "half a character"),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_reason(tmp_path, line, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"input": "fine"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match="rows.jsonl:3: ") as error:
        list(read_jsonl(path))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_blank_texts_are_absent_and_whole_numbers_are_their_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf\r\n  {"input": "a", "label": " ", "rationale": ""} \r\n\n'
        rb'{"input": "\ud83d\ude00 \\ud83d", "id": 7, "label": 0, "teacher_label": -1}'
    )
    one, two = read_jsonl(path)
    assert (one.id, one.label, one.rationale) == ("rows-2", None, None)
    assert (two.id, two.label, two.teacher_label) == ("7", "0", "-1")
    assert two.input == "\U0001f600 \\ud83d"


def test_half_a_character_does_not_end_the_writing_of_a_file(tmp_path):
    """A file whose name is not UTF-8 gives its rows such ids."""
    write_jsonl(tmp_path / "x", [Record("a\udcff", "x")])
    assert json.loads((tmp_path / "x").read_text("utf-8"))["id"] == "a\udcff"


ROW = b'{"input": "a, b", "label": "x"}'
FORMATS = [
    (b'\xef\xbb\xbf [\n "a",\n "b"]', "JSON array"),
    (json.dumps(json.loads(ROW), indent=1).encode() + b"\n" + ROW, "over several lines"),
    (ROW + ROW, "several on a line"),
    (gzip.compress(ROW), "gzip"),
    (ROW.decode().encode("utf-16"), "UTF-16"),
    (b"input,label\na,b\n", "table"),
]


@pytest.mark.parametrize("content, words", FORMATS)
def test_another_format_is_named_and_what_converts_it(tmp_path, content, words):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=f"/x: this (is|has) .*{words}"):
        list(read_jsonl(tmp_path / "x"))


def test_lines_of_plain_text_are_no_other_format():
    for text in (b"[URGENT] a, b, c", b"{smiley} hello", b"a,b\nc,d", b"[1] first"):
        assert other_format(text) == ""
