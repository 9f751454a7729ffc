"""Who imports whom: packages in one direction, files without circles, and nothing else needed."""

import ast
import graphlib
import subprocess
import sys
from functools import cache

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
    """{dotted name: (path, syntax tree)} of all files of ours but tests."""
    found = {}
    folders = [ROOT / name for name in MAY_IMPORT if (ROOT / name).is_dir()]
    for path in [*ROOT.glob("*.py"), *(p for folder in folders for p in folder.rglob("*.py"))]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        found[name] = (path, ast.parse(path.read_text("utf-8")))
    return found


def imported(name, nodes):
    """The dotted names that imports among nodes, of the file `name`, may load."""
    path, _ = files()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = f"{package}.{module}".strip(".")
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                found.add(submodule if submodule in files() else module)
    return found


def imported_anywhere(name):
    _, tree = files()[name]
    return imported(name, ast.walk(tree))  # inside functions, too


def test_packages_import_in_one_direction():
    for name in files():
        own = name.split(".")[0]
        packages = {other.split(".")[0] for other in imported_anywhere(name)}
        wrong = (packages & MAY_IMPORT.keys()) - MAY_IMPORT[own] - {own}
        assert not wrong, f"{name} imports {wrong}"


def test_no_file_imports_itself_over_others():
    graph = {name: imported_anywhere(name) & files().keys() - {name} for name in files()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle


def test_files_of_dss_import_only_earlier_ones_of_their_line():
    listed = {name for line in LINES for name in line}
    there = {name.removeprefix("dss.") for name in files() if name.startswith("dss.")}
    assert there == listed
    for line in LINES:
        for place, name in enumerate(line):
            later = {f"dss.{other}" for other in line[place + 1 :]}
            wrong = imported_anywhere(f"dss.{name}") & later
            assert not wrong, f"dss.{name} imports {wrong}"
    model_files = {f"dss.{other}" for other in LINES[0]}
    assert not imported_anywhere("dss.config") & model_files


def test_nothing_but_the_listed_packages_is_needed():
    known = MAY_IMPORT.keys() | PACKAGES | set(sys.stdlib_module_names)
    for name, (_, tree) in files().items():
        foreign = {other.split(".")[0] for other in imported_anywhere(name)} - known
        assert foreign <= OPTIONAL, f"{name} imports {foreign}"
        at_once = {other.split(".")[0] for other in imported(name, tree.body)}
        assert not at_once & OPTIONAL, f"{name} imports {at_once} before it is asked to"


def test_no_function_asks_for_a_method_by_its_name():
    """Defaults and presets may name one."""
    for name in files().keys() - {"dss.methods", "dss.bench"}:
        _, tree = files()[name]
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                texts = {n.value for n in ast.walk(function) if isinstance(n, ast.Constant)}
                assert not METHODS.keys() & texts, f"{name}.{function.name}"


def runs(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_importing_the_data_tools_does_not_load_torch():
    """They are used on machines that only talk to a teacher, and torch takes seconds to load."""
    modules = "data.jsonl, data.official, data.toy, data.report, extract"
    assert runs(f"import sys, {modules}; sys.exit('torch' in sys.modules)")


def test_all_but_the_kernels_works_without_triton():
    """There is none for macOS and Windows. Only asking for it fails."""
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
    assert runs(code)
