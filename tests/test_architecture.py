"""Holds the import arrows and the single importers of docs/architecture.md, read from the source with `ast`."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"axes", "config"}
LIBRARY = BASE | {"files", "ops", "model", "optim", "data", "parallel"}
VERBS = {"train", "generate", "evaluate", "report"}

# Part -> the parts that it may import. A part is a package or module directly below slmjax/, or data_pipelines.
ALLOWED = {
    "axes": set(),
    "config": set(),
    "files": set(),
    "page": set(),
    "gin_loader": {"config"},
    "kernels": set(),
    "ops": BASE | {"kernels"},
    "model": BASE | {"ops"},
    "optim": BASE | {"ops"},
    "data": BASE | {"files"},
    "parallel": BASE,
    "data_pipelines": BASE | {"page", "files", "data"},
    "train": LIBRARY | VERBS,
    "generate": LIBRARY | VERBS,
    "evaluate": LIBRARY | VERBS,
    "report": LIBRARY | VERBS | {"page"},
    "cli": LIBRARY | VERBS | {"gin_loader", "data_pipelines"},
    "__main__": {"cli"},
}

# Third-party package -> the one module that imports it.
SINGLE_IMPORTERS = {
    "gin": "slmjax.gin_loader",
    "grain": "slmjax.data.loader",
    "orbax": "slmjax.train.checkpoint",
    "wandb": "slmjax.train.tracking",
    "sentencepiece": "slmjax.data.sentencepieces",
    "tokenizers": "slmjax.data.tokenizer_json",
}

# Part -> the only third-party packages it may import.
THIRD_PARTY = {
    "axes": set(),
    "config": set(),
    "files": set(),
    "page": set(),
    "ops": {"jax", "numpy"},
    "model": {"jax", "numpy", "flax"},
    "optim": {"jax", "numpy", "optax"},
    "parallel": {"jax", "numpy"},
    "data": {"numpy", "pyarrow", "grain", "sentencepiece", "tokenizers"},
}


class Import(NamedTuple):
    module: str  # that imports
    target: str  # that is imported
    lazy: bool  # inside a function

    @property
    def package(self):
        return self.target.partition(".")[0]


def part(module):
    """Part of a module's name: "slmjax.ops.loss" -> "ops", "data_pipelines.run" -> "data_pipelines"."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "slmjax" else package


def imports_of(module, tree):
    """Yields every import of a syntax tree; `from package import name` counts as module package.name if it is one."""

    def visit(node, lazy):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, lazy)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports in full, not relative"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield Import(module, name if name in source_files() else str(node.module), lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(tree, False)


@functools.cache
def source_files():
    """Module name -> file, of the library and the pipelines."""
    paths = [path for root in ("slmjax", "data_pipelines") for path in (ROOT / root).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@functools.cache
def all_imports():
    return [
        found for name, path in source_files().items() for found in imports_of(name, ast.parse(path.read_text("utf-8")))
    ]


def ours(found):
    return found.package in ("slmjax", "data_pipelines")


def test_the_reader_of_imports_sees_what_is_there():
    code = "import a.b\nfrom slmjax import axes, __version__\ndef f():\n  from c import d\n"
    found = [(each.target, each.lazy) for each in imports_of("m", ast.parse(code))]
    assert found == [("a.b", False), ("slmjax.axes", False), ("slmjax", False), ("c", True)]
    assert any(each.target.startswith("slmjax.") for each in all_imports())


def test_arrows_point_down():
    parts = {part(name) for name in source_files()} - {""}
    assert parts == set(ALLOWED), "a new part: say in ALLOWED and in docs/architecture.md what it may import"
    wrong = [
        f"{found.module} imports {found.target}"
        for found in all_imports()
        if ours(found) and part(found.target) not in ALLOWED.get(part(found.module), set()) | {part(found.module), ""}
    ]
    assert not wrong


def test_modules_exist_and_import_in_no_circle():
    graph = {name: set() for name in source_files()}
    for found in all_imports():
        # A module may name the package that it is in: a package's __init__ only gathers its modules.
        if ours(found) and not found.lazy and not f"{found.module}.".startswith(f"{found.target}."):
            graph[found.module].add(found.target)
    missing = set().union(*graph.values()) - set(graph)
    assert not missing
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_the_pipelines_are_imported_by_the_cli_alone_and_lazily():
    importers = {(found.module, found.lazy) for found in all_imports() if found.package == "data_pipelines"}
    outside = {(module, lazy) for module, lazy in importers if part(module) != "data_pipelines"}
    assert {(part(module), lazy) for module, lazy in outside} == {("cli", True)}


@pytest.mark.parametrize(("package", "module"), SINGLE_IMPORTERS.items())
def test_one_module_per_third_party_system(package, module):
    assert {found.module for found in all_imports() if found.package == package} == {module}


@pytest.mark.parametrize(("name", "packages"), THIRD_PARTY.items())
def test_what_a_part_may_import_from_outside(name, packages):
    outside = {found.package for found in all_imports() if part(found.module) == name and not ours(found)}
    assert outside - sys.stdlib_module_names <= packages


def test_a_file_is_a_noun_and_of_readable_size():
    tops = ("slmjax", "data_pipelines", "tests", "benchmarks")
    python_files = [path for top in tops for path in (ROOT / top).rglob("*.py")]
    nameless = {"utils.py", "helpers.py", "common.py", "util.py", "misc.py"}
    assert not [path for path in python_files if path.name in nameless]
    lengths = {path.relative_to(ROOT): len(path.read_text("utf-8").splitlines()) for path in python_files}
    assert not {path: length for path, length in lengths.items() if length > 500}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import slmjax", {"jax", "gin", "wandb", "numpy"}),
        ("import slmjax.cli", {"jax", "gin", "wandb", "grain", "orbax", "pyarrow"}),
        ("import slmjax.config, slmjax.axes", {"jax", "gin", "wandb", "numpy"}),
        ("import slmjax.train.loop", {"gin", "wandb", "data_pipelines"}),
    ],
)
def test_an_import_loads_nothing_heavy(statement, absent):
    program = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert not absent & set(done.stdout.split())
