"""The house has one direction: data, tokenizer and kernels stand alone, dss builds on them, train.py joins all."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"data", "tokenizer", "kernels", "dss", "train", "extract", "tests"}
MAY_IMPORT = {"data": set(), "tokenizer": set(), "kernels": set(), "dss": {"data", "tokenizer", "kernels"}}
PACKAGES = {"torch", "triton", "sentencepiece", "numpy", "tqdm"}
OPTIONAL = {"matplotlib", "liger_kernel", "transformers", "ctranslate2"}  # pictures, and peers: imported where used


def imports(path):
    """Top-level names of the absolute imports in a file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_in_one_direction(package):
    for path in (ROOT / package).rglob("*.py"):
        wrong = set(imports(path)) & OURS - MAY_IMPORT[package] - {package}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_extract_needs_data_alone():
    assert set(imports(ROOT / "extract.py")) & OURS == {"data"}


def test_nothing_but_the_listed_packages_is_needed():
    for path in [*ROOT.glob("*.py"), *(p for name in MAY_IMPORT for p in (ROOT / name).rglob("*.py"))]:
        foreign = set(imports(path)) - OURS - PACKAGES - OPTIONAL - set(sys.stdlib_module_names)
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"
        at_once = [node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.Import)]
        assert not OPTIONAL & {alias.name for node in at_once for alias in node.names}, path


def test_importing_the_data_tools_does_not_load_torch():
    """data is used on machines that only talk to a teacher; torch takes seconds to load."""
    code = "import sys, data.jsonl, data.official, data.toy, data.equation, extract; sys.exit('torch' in sys.modules)"
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
    kernels.relu(x)
except ValueError as problem:
    sys.exit("not installed" not in str(problem))
sys.exit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_kernels_references_are_reachable_as_the_contract_names_them():
    import kernels

    assert kernels.__version__
    for name, module in {"attention": kernels.attention, "rms_norm": kernels.rms_norm, "geglu": kernels.geglu}.items():
        assert callable(module) and callable(getattr(module, f"{name}_reference"))
    assert callable(kernels.cross_entropy.linear_cross_entropy_reference)
    from kernels.attention import attention_reference
    from kernels.cross_entropy import linear_cross_entropy_reference

    assert kernels.relu.relu_reference is kernels.geglu.relu_reference
    assert kernels.attention.attention_reference is attention_reference
    assert kernels.cross_entropy.linear_cross_entropy_reference is linear_cross_entropy_reference
