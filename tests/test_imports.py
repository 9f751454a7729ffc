"""The house has one direction: data, tokenizer and kernels stand alone, dss builds on them, train.py joins all."""

import ast
import subprocess
import sys

import pytest
from running import ROOT

OURS = {"data", "tokenizer", "kernels", "dss", "train", "extract", "tests"}
MAY_IMPORT = {"data": set(), "tokenizer": set(), "kernels": set(), "dss": {"data", "tokenizer", "kernels"}}
PACKAGES = {"torch", "triton", "sentencepiece", "numpy", "tqdm"}
OPTIONAL = {"huggingface_hub", "matplotlib", *"transformers ctranslate2 liger_kernel cut_cross_entropy".split()}  # imported where used


def parse(path):
    return ast.parse(path.read_text("utf-8"))


def imports(nodes):
    """Top-level names of the absolute imports among nodes of a syntax tree."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_in_one_direction(package):
    for path in (ROOT / package).rglob("*.py"):
        wrong = set(imports(ast.walk(parse(path)))) & OURS - MAY_IMPORT[package] - {package}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_extract_needs_data_alone():
    assert set(imports(ast.walk(parse(ROOT / "extract.py")))) & OURS == {"data"}


def test_nothing_but_the_listed_packages_is_needed():
    for path in [*ROOT.glob("*.py"), *(p for name in MAY_IMPORT for p in (ROOT / name).rglob("*.py"))]:
        foreign = set(imports(ast.walk(parse(path)))) - OURS - PACKAGES - OPTIONAL - set(sys.stdlib_module_names)
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"
        assert not OPTIONAL & set(imports(parse(path).body)), path


def test_importing_the_data_tools_does_not_load_torch():
    """data is used on machines that only talk to a teacher; torch takes seconds to load."""
    code = "import sys, data.jsonl, data.official, data.toy, data.report, extract; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_all_but_the_kernels_works_without_triton():
    """On macOS and Windows there is none: everything imports, the references run, and only asking for Triton fails."""
    code = """
import os, sys
sys.modules["triton"] = None  # what an import of it raises then is ImportError
import torch, kernels, train, dss.generate
x = torch.ones(3, 4)
assert kernels.rms_norm(x, x[0]).shape == (3, 4)
os.environ["DSS_KERNELS"] = "triton"
try:
    kernels.geglu(x, x)
except ValueError as problem:
    sys.exit("not installed" not in str(problem))
sys.exit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_functions_of_dss_and_kernels_that_others_use_have_types():
    """The linter checks functions that have some annotations; this finds those that have none."""
    inside = {path for path in (ROOT / "kernels").glob("*.py") if path.name != "__init__.py"}
    files = [*ROOT.glob("*.py"), *(p for name in MAY_IMPORT for p in (ROOT / name).rglob("*.py"))]
    nodes = [n for path in set(files) - inside for n in ast.walk(parse(path))]
    used = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    for path in [*(ROOT / "dss").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in parse(path).body:
            if isinstance(node, ast.FunctionDef) and node.name in used:
                missing = [a.arg for a in [*node.args.args, *node.args.kwonlyargs] if a.annotation is None]
                assert node.returns and not missing, f"{path.relative_to(ROOT)}: {node.name}"
