"""extract.py interrupted, killed and continued: nothing lost, nothing twice; and 20,000 rows."""

import json
import re
import signal
import sys
import time
from collections import Counter

import pytest
from extracting import KEY, PROMPT, always, arguments, ask, errors, lasting, make_files, rows, run, start, wait_for_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from teacher_stub import Stub, answer

import extract
from data.files import locked
from data.teacher.output import put_in_order


def test_nothing_left_to_do_sends_nothing(files, capsys):
    ask(files)
    before = (files / "out.jsonl").read_bytes()
    assert run(files, "http://127.0.0.1:9/v1") == 0, "not even a teacher is needed, wherever it is"
    assert (files / "out.jsonl").read_bytes() == before and "6 of them done or failed before" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, words",
    [
        ("--max-tokens-field max_completion_tokens", "max_tokens 256, not unset; max_completion_tokens unset, not 256"),
        ("--no-stop", "stop ['\\nQ:'], not unset"),
        ("--model other", "model stub-1, not other"),
        ("--endpoint completions", "endpoint chat, not completions"),
        ('--extra-body {"top_k":1}', "top_k unset, not 1"),
        ("--rationalize", "rationalize False, not True"),
        ("--keep correct", "keep all, not correct"),
    ],
)
def test_a_setting_that_changes_requests_is_named_and_nothing_is_touched(files, refused, line, words):
    url = ask(files, line="--limit 3").url
    before = (files / "out.jsonl").read_bytes()
    said = refused(extract.main, *arguments(files, url, line))
    assert re.search(f"(was made with|;) {re.escape(words)}", said)
    assert (files / "out.jsonl").read_bytes() == before


def test_a_changed_prompt_file_or_row_is_named(files, refused):
    again = arguments(files, ask(files).url)
    (files / "p.json").write_text(json.dumps(PROMPT | {"instruction": "Add."}))
    assert "prompt_sha256 " in refused(extract.main, *again)
    make_files(files)
    (files / "in.jsonl").write_text((files / "in.jsonl").read_text().replace("What is 3", "What was 3"))
    assert "another input in row 'r3'" in refused(extract.main, *again)
    make_files(files)
    (files / "p.json").write_text(json.dumps(PROMPT | {"answer_marker": ["The answer is", "So it is"]}))
    assert extract.main(again) == 0, "the same requests: what is done is done"


@pytest.mark.parametrize("as_input", [False, True])
def test_failed_rows_may_be_asked_under_other_settings_also_with_the_errors_file_as_input(files, as_input):
    with Stub(always("cut short")) as stub:
        assert run(files, stub.url) == 1 and len(errors(files)) == 6
        if as_input:
            (files / "out.jsonl.errors.jsonl").rename(files / "in.jsonl")
        stub.behave = always("ok")
        assert run(files, stub.url, "--max-tokens 999") == 0 and not errors(files)
    assert len(rows(files)) == 6 and all("error" not in r and r["rationale"] for r in rows(files))


def test_rows_that_vanish_from_the_input_are_missed_at_the_end(files, monkeypatch, capsys):
    """What is done and what failed are together what was read at the start."""
    few = "".join((files / "in.jsonl").open().readlines()[:4])
    monkeypatch.setattr(extract, "print_header", lambda run: (files / "in.jsonl").write_text(few))
    ask(files, always("no marker", lambda q: "1 + 2" in q), status=3)
    assert len(rows(files)) == 3 and len(errors(files)) == 1
    assert "2 rows were not asked: did" in capsys.readouterr().err


@pytest.mark.parametrize("tail, again", [(b'{"id": "r9", "inp', 0), (b"\x00\x00\x00", 0), (b"", 0), (None, 1)])
def test_a_torn_last_line_is_cut_off_and_reported(files, capsys, tail, again):
    with Stub() as stub:
        assert run(files, stub.url, "--limit 3") == 0
        whole = (files / "out.jsonl").read_bytes()
        (files / "out.jsonl").write_bytes(whole[:-1] if tail is None else whole + tail)
        assert run(files, stub.url) == 0 and len(stub.requests) == 6 + again
    assert [r["id"] for r in rows(files)] == [f"r{i}" for i in range(6)]
    assert ("torn by a crash was cut off" in capsys.readouterr().err) == (tail != b"")


@settings(max_examples=20)
@given(share=st.floats(0, 1), cut_errors=st.booleans())
def test_wherever_a_crash_cuts_the_files_the_next_start_completes_them(tmp_path_factory, share, cut_errors):
    folder = make_files(tmp_path_factory.mktemp("cut"))
    with Stub(always("no marker", lambda q: int(re.search(r"\d+", q)[0]) < 2)) as stub:
        assert run(folder, stub.url) == 1
        before = rows(folder), errors(folder)
        path = folder / ("out.jsonl.errors.jsonl" if cut_errors else "out.jsonl")
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        assert run(folder, stub.url) == 1
    for was, now in zip(before, (rows(folder), errors(folder))):
        assert [lasting(row) for row in was] == [lasting(row) for row in now]


@given(names=st.lists(st.integers(0, 9)), order=st.permutations(range(10)), out=st.sets(st.integers(0, 9), max_size=4))
def test_lines_are_put_in_order_the_last_of_an_id_stays(tmp_path_factory, names, order, out):
    path = tmp_path_factory.mktemp("order") / "x.jsonl"
    path.write_text("".join(json.dumps({"id": str(name), "line": i}) + "\n" for i, name in enumerate(names)))
    known = [str(name) for name in order[:7]]  # the other three lie behind
    put_in_order(path, known, leave_out={str(name) for name in out})
    last = {str(name): i for i, name in enumerate(names) if name not in out}
    left = rows(path.parent, "x.jsonl")
    assert {row["id"]: row["line"] for row in left} == last and len(left) == len(last)
    assert [row["id"] for row in left][: len(last.keys() & set(known))] == [name for name in known if name in last]
    assert path.exists() == bool(last) and len(list(path.parent.iterdir())) == bool(last)


def test_a_second_process_is_refused(files, capsys):
    with locked(files / "out.jsonl"):
        assert run(files, "http://127.0.0.1:9/v1") == 2
    assert "another process (which holds" in capsys.readouterr().err
    ask(files)
    assert sorted(p.name for p in files.iterdir()) == ["in.jsonl", "out.jsonl", "p.json"], "no lock is left"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_ctrl_c_keeps_everything_that_is_finished_or_in_flight(tmp_path, number):
    with Stub(latency=0.1) as stub:
        process = start(make_files(tmp_path, 100), stub.url)
        wait_for_rows(tmp_path, 20, process)
        process.send_signal(number)
        said = process.communicate(timeout=20)[1]
        assert process.returncode == 130 and "interrupted; what was finished is kept" in said, said
        assert 20 <= len(rows(tmp_path)) == len(stub.requests) < 100, "each reply that was paid for is there"
        assert run(tmp_path, stub.url) == 0 and len(stub.requests) == 100
    assert [r["id"] for r in rows(tmp_path)] == [f"r{i}" for i in range(100)]


def test_the_second_ctrl_c_ends_at_once(tmp_path):
    with Stub(always("stall", lambda q: int(re.search(r"\d+", q)[0]) > 20)) as stub:
        process = start(make_files(tmp_path, 100), stub.url)
        wait_for_rows(tmp_path, 21, process)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        clock = time.monotonic()
        said = process.communicate(timeout=20)[1]
        assert process.returncode == 130 and time.monotonic() - clock < 3
        assert said.endswith("extract.py: interrupted\n") and "Ctrl-C ends at once" in said
    assert len(rows(tmp_path)) == 21


def test_a_full_disk_aborts_and_the_next_start_goes_on(tmp_path):
    with Stub() as stub:
        before = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
        process = start(make_files(tmp_path, 60), stub.url, before=before)
        said = process.communicate()[1]
        assert process.returncode == 3 and "extract.py: aborted: [Errno 27]" in said and "Traceback" not in said, said
        assert run(tmp_path, stub.url) == 0
    assert [r["id"] for r in rows(tmp_path)] == [f"r{i}" for i in range(60)]


def test_a_bug_of_ours_in_a_worker_is_raised_and_does_not_hang(files, monkeypatch):
    monkeypatch.setattr(extract, "take", lambda *_: 1 / 0)
    with Stub() as stub, pytest.raises(ZeroDivisionError):
        run(files, stub.url)


@settings(max_examples=4)
@given(pauses=st.lists(st.floats(0.1, 0.9), min_size=1, max_size=3))
def test_after_any_kills_the_file_is_as_an_undisturbed_runs(tmp_path_factory, pauses):
    folder, calm = make_files(tmp_path_factory.mktemp("killed"), 60), make_files(tmp_path_factory.mktemp("calm"), 60)
    with Stub(always("no marker", lambda q: "7 + 2" in q), latency=0.03) as stub:
        for pause in pauses:
            process = start(folder, stub.url, "--concurrency 4")
            time.sleep(pause)
            process.kill()
            process.communicate()
        assert run(folder, stub.url, "--concurrency 4") == 1
        assert max(stub.attempts.values()) <= 1 + len(pauses), "at most what was in flight is asked again"
        assert run(calm, stub.url, "--concurrency 4") == 1
    assert [lasting(row) for row in rows(folder)] == [lasting(row) for row in rows(calm)]
    assert [lasting(row) for row in errors(folder)] == [lasting(row) for row in errors(calm)]
    assert len(errors(calm)) == 6


BAD = ["429", "500", "503", "reset", "truncated", "not json", "html", "no choices", "disconnect", "stall"]
BAD += ["empty", "null"]
DEAD = ["null", "empty", "500", "not json", "no choices", "context", "cut short"]


def test_300_rows_a_teacher_that_fails_40_percent_and_three_kills(tmp_path):
    """Every answerable row once, in order, with its own rationale; the others in the errors file; the key nowhere."""
    make_files(tmp_path, 300)

    def number(question):
        return int(re.findall(r"\d+", question)[-2])

    def behave(question, attempt):
        i = number(question)
        if i % 25 == 7:
            return DEAD[i // 25 % len(DEAD)]
        draw = (i * 2654435761 + attempt * 40503) % 1000
        return BAD[draw % len(BAD)] if draw < 480 and attempt < 5 else "ok"

    said = []
    with Stub(behave, latency=0.01) as stub:
        for target in (60, 130, 210):
            process = start(tmp_path, stub.url, "--timeout 1")
            wait_for_rows(tmp_path, target, process)
            process.kill()
            said += process.communicate()
            assert process.returncode == -signal.SIGKILL
        process = start(tmp_path, stub.url, "--timeout 1")
        said += process.communicate(timeout=120)
        assert process.returncode == 1, said[-1]
        assert stub.most <= 8
        good = stub.actions["ok"] / stub.actions.total()
        assert 0.5 < good < 0.65 and set(stub.actions) == {*BAD, *DEAD, "ok"}, stub.actions
        asked = len(stub.requests)
        process = start(tmp_path, stub.url)
        said += process.communicate(timeout=60)
        assert process.returncode == 1 and len(stub.requests) == asked, "nothing left to ask, 12 rows failed"
    dead = [i for i in range(300) if i % 25 == 7]
    assert [r["id"] for r in rows(tmp_path)] == [f"r{i}" for i in range(300) if i not in dead]
    for row in rows(tmp_path):
        assert f"{row['rationale']} The answer is {row['teacher_label']}." == answer(row["input"])
    assert [e["id"] for e in errors(tmp_path)] == [f"r{i}" for i in dead]
    kinds = Counter(e["error"]["kind"] for e in errors(tmp_path))
    assert kinds == {"empty": 4, "http_500": 2, "bad_reply": 4, "context_exceeded": 1, "truncated": 1}
    assert all(e["error"]["raw"] for e in errors(tmp_path) if e["error"]["kind"] not in ("empty", "context_exceeded"))
    for text in [*filter(None, said), *(p.read_text("utf-8") for p in tmp_path.iterdir())]:
        assert KEY not in text


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_20_000_rows_in_flat_memory(tmp_path):
    memory = {}
    for number in (2000, 20000):
        folder = make_files(tmp_path / str(number), number)
        with Stub() as stub:
            after = "print(open('/proc/self/status').read(), file=sys.stderr)"
            said = start(folder, stub.url, "--concurrency 16", after=after).communicate()[1]
        memory[number] = int(re.search(r"VmHWM:\s+(\d+) kB", said)[1])  # the most it ever had
        assert [r["id"] for r in rows(folder)] == [f"r{i}" for i in range(number)]
    assert memory[20000] - memory[2000] < 18000, "at most 1 kB a row: its id, and where its line lies"
