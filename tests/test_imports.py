"""Who imports whom: packages in one direction, files without circles, and nothing else needed."""

import ast
import graphlib
import importlib
import sys
from functools import cache
from unittest.mock import patch

import pytest
import torch
from running import ROOT

from dss.methods import METHODS

MAY_IMPORT = {
    "data": set(),
    "tokenizer": set(),
    "kernels": set(),
    "dss": {"data", "tokenizer", "kernels"},
    "extract": {"data"},
    "train": {"data", "tokenizer", "kernels", "dss"},
}
# Inside dss a file imports none that is listed later in its own line, and config none of the first.
LINES = [
    "batch methods linear model loss generate download weights student aids".split(),
    "config distributed rows stats log graph checkpoint report".split(),
    "predict study bench".split(),
]
PACKAGES = {"torch", "triton", "sentencepiece", "numpy", "tqdm"}
OPTIONAL = {"google", "huggingface_hub", "liger_kernel", "matplotlib", "transformers"}


@cache
def files():
    """{dotted name: syntax tree} of all files of ours but tests."""
    found = {}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not name.startswith("tests."):
            found[name.removesuffix(".__init__")] = ast.parse(path.read_text("utf-8"))
    return found


def imported(name, nodes):
    """The dotted names that imports among nodes, of the file `name`, may load."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = f"{name.split('.')[0]}.{module}".strip(".")
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                found.add(submodule if submodule in files() else module)
    return found


@cache
def imported_anywhere(name):
    return imported(name, ast.walk(files()[name]))  # inside functions, too


def packages(names):
    return {name.split(".")[0] for name in names}


def test_packages_import_in_one_direction():
    """And those who only ask a teacher need not wait for torch."""
    for name in files():
        (own,) = packages([name])
        others = MAY_IMPORT.keys() - MAY_IMPORT[own] - {own}
        if own in ("data", "extract"):
            others |= {"torch"}
        assert not packages(imported_anywhere(name)) & others, name


def test_no_file_imports_itself_over_others():
    graph = {name: imported_anywhere(name) & files().keys() - {name} for name in files()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle


def test_files_of_dss_import_only_earlier_ones_of_their_line():
    listed = {f"dss.{name}" for line in LINES for name in line}
    assert listed == {name for name in files() if name.startswith("dss.")}
    for line in LINES:
        for place, name in enumerate(line):
            later = {f"dss.{other}" for other in line[place + 1 :]}
            assert not imported_anywhere(f"dss.{name}") & later, name
    assert not imported_anywhere("dss.config") & {f"dss.{other}" for other in LINES[0]}


def test_nothing_but_the_listed_packages_is_needed():
    known = MAY_IMPORT.keys() | PACKAGES | set(sys.stdlib_module_names)
    for name, tree in files().items():
        assert packages(imported_anywhere(name)) - known <= OPTIONAL, name
        assert not packages(imported(name, tree.body)) & OPTIONAL, f"{name}, only when asked to"


def test_no_function_asks_for_a_method_by_its_name():
    """Defaults and presets may name one."""
    for name in files().keys() - {"dss.methods", "dss.bench"}:
        for function in ast.walk(files()[name]):
            if isinstance(function, ast.FunctionDef):
                texts = {n.value for n in ast.walk(function) if isinstance(n, ast.Constant)}
                assert not METHODS.keys() & texts, f"{name}.{function.name}"


def test_all_but_the_kernels_works_without_triton(monkeypatch):
    """There is none for macOS and Windows. Only asking for it fails."""
    x = torch.ones(3, 4)
    with patch.dict(sys.modules, {"triton": None}):  # what an import of it raises is ImportError
        for name in files():
            sys.modules.pop(name, None)
        importlib.import_module("train")
        kernels = importlib.import_module("kernels")
        assert kernels.rms_norm(x, x[0]).shape == (3, 4)
        monkeypatch.setenv("DSS_KERNELS", "triton")
        with pytest.raises(ValueError, match="not installed"):
            kernels.geglu(x, x)
