"""Fixtures that several files share."""

import itertools
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is defined: NumPy runs them
    os.environ.setdefault("TRITON_INTERPRET", "1")

from checkpoints import make_student
from extracting import make_files
from hypothesis import settings

import tokenizer

torch.set_num_threads(1)  # on a busy machine threads wait for one another
# The same examples on every run; new ones with --hypothesis-profile=search.
settings.register_profile("dss", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=100)
settings.load_profile("dss")

FIGURES = pytest.StashKey()


def mend_interpreter():
    """Make Triton's interpreter round fp32 to bf16 as a GPU does, where Triton 3.9's truncates; and
    prepare triton.language once a function: it does so for each call, a fifth of its time."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    truncating = interpreter.InterpreterBuilder.cast_impl

    def cast(self, source, to):
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return truncating(self, source, to)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    prepare = cache(interpreter._patch_lang)

    def prepare_once(function):
        prepare(function)
        return interpreter._LangPatchScope()  # which undoes nothing

    interpreter.InterpreterBuilder.cast_impl = cast
    interpreter._patch_lang = prepare_once


mend_interpreter()
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "official" / "datasets"
OFFICIAL = Path(os.environ.get("DSS_OFFICIAL", BESIDE))


@pytest.fixture
def figures(request):
    """Lines that are printed at the end of the test run."""
    return request.config.stash.setdefault(FIGURES, [])


@pytest.fixture
def measured(figures):
    """A function (what, figure, bound): notes a relative error, and fails if it is larger."""

    def check(what, figure, bound):
        figures.append(f"{what}: {figure:.1e} (bound {bound:.0e})")
        assert figure <= bound, what

    return check


def pytest_terminal_summary(terminalreporter, config):
    if lines := config.stash.get(FIGURES, []):
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture(scope="session")
def official():
    """The folder of the paper's released datasets, where there is one."""
    if not OFFICIAL.is_dir():
        pytest.skip(f"the released datasets are not at {OFFICIAL}; DSS_OFFICIAL names a place")
    return OFFICIAL


@pytest.fixture(scope="session")
def transformers():
    """The peer that model and tokenizer are compared with."""
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="session")
def auto_tokenizer(transformers):
    """transformers' AutoTokenizer; it needs protobuf to read a spiece.model."""
    pytest.importorskip("google.protobuf", reason="transformers needs protobuf here")
    return transformers.AutoTokenizer


@pytest.fixture(scope="session")
def spiece(tmp_path_factory):
    """A directory with a small tokenizer: spiece.model and tokenizer_config.json."""
    directory = tmp_path_factory.mktemp("spiece")
    words = "one two three four plus minus times apples pears boxes left how many are there".split()
    words += ["Tom", "gave", "Mia"]
    texts = []
    for a, b, c in itertools.product(words, words[:6], words[:3]):
        texts.append(f"{a} {b} {c}, {a}? ( 84.0 / 2.0 ) {b}. café naïve")
    tokenizer.train(texts, directory / "spiece.model", vocab_size=300).save(directory)
    return directory


@pytest.fixture(scope="session")
def tok(spiece):
    return tokenizer.T5Tokenizer(spiece)


@pytest.fixture(scope="session")
def student(tmp_path_factory, spiece):
    """A directory with an untrained student, which has no dss.json."""
    return make_student(tmp_path_factory.mktemp("student"), spiece)


@pytest.fixture(autouse=True)
def no_key_of_the_user(monkeypatch):
    """No test may send, or depend on, what the user's environment holds."""
    proxies = [scheme + "_proxy" for scheme in ("http", "https", "no", "all")]
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", *proxies, *map(str.upper, proxies)):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def refused(capsys):
    """A function (main, *arguments): the one line, all that it prints, of a program that ends with
    status 2."""

    def what(main, *arguments):
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as end:
            status = end.code
        out, error = capsys.readouterr()
        assert (status, error.count("\n"), out) == (2, 1, ""), error
        return error

    return what


@pytest.fixture
def files(tmp_path):
    """A folder with extract.py's small task: in.jsonl and p.json."""
    return make_files(tmp_path)
