"""Loops that numba compiles: what they may use, and where they can be kept."""

import ast
import errno
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys

import numpy as np
import pytest
from numba.core.caching import IndexDataCacheFile
from numba.core.registry import CPUDispatcher

import data_pipelines
from data_pipelines.stages.compiled import compiled


def _compiled_functions():
    for found in pkgutil.walk_packages(data_pipelines.__path__, "data_pipelines."):
        module = importlib.import_module(found.name)
        for function in vars(module).values():
            if isinstance(function, CPUDispatcher) and function.py_func.__module__ == found.name:
                yield module, function.py_func


def _names_used(code):
    yield from code.co_names
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _names_used(constant)


def _names_in(nodes):
    return {found.id for node in nodes for found in ast.walk(node) if isinstance(found, ast.Name)}


def test_compiled_functions_use_nothing_of_other_modules_but_numpy():
    functions = list(_compiled_functions())
    assert len(functions) > 5
    for module, function in functions:
        tree = ast.parse(inspect.getsource(module)).body
        imports = [node for node in tree if isinstance(node, ast.ImportFrom | ast.Import)]
        others = {alias.asname or alias.name for node in imports for alias in node.names} - {"np"}
        for node in tree:  # and what is made of them
            if isinstance(node, ast.Assign) and others & {
                n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)
            }:
                others |= {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        # What is kept of it on disk would not be made anew when the other module changes.
        assert not others & set(_names_used(function.__code__)), f"{module.__name__}.{function.__name__}"


def test_where_no_directory_can_be_written_to_code_is_compiled_and_not_kept():
    names = {"np": np}
    exec(compile("def double(values):\n    return values + values\n", "<nowhere>", "exec"), names)
    assert compiled(names["double"])(np.arange(3)).tolist() == [0, 2, 4]


def _twice(directory):
    """Runs a loop in a process of its own, which keeps its code below a directory; returns two sums, and loads."""
    (directory / "loops.py").write_text(
        "import numpy as np\nfrom data_pipelines.stages.compiled import compiled\n\n\n@compiled\n"
        "def total(values):\n    return values.sum()\n\n\n"
        "if __name__ == '__main__':\n    print(total(np.arange(4)), total(np.ones(3)), end=' ')\n"
        "    print(total.stats.cache_hits.total())\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(directory / "kept"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(directory / "loops.py")]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()


def test_code_that_is_kept_is_used_unless_it_is_broken(tmp_path):
    assert _twice(tmp_path) == ["6", "3.0", "0"]
    assert _twice(tmp_path) == ["6", "3.0", "2"]
    first, second = sorted(tmp_path.glob("kept/*/*.nbc"))
    (index,) = tmp_path.glob("kept/*/*.nbi")
    second.write_bytes(first.read_bytes())  # as two processes can leave it
    assert _twice(tmp_path) == ["6", "3.0", "1"]
    assert _twice(tmp_path) == ["6", "3.0", "2"]
    for file in (first, index):
        file.write_bytes(file.read_bytes()[:20])
        assert _twice(tmp_path)[:2] == ["6", "3.0"]
        assert _twice(tmp_path) == ["6", "3.0", "2"]


def test_on_a_full_disk_code_is_compiled_and_not_kept(monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(IndexDataCacheFile, "_save_data", fail)
    assert compiled(_double)(np.arange(3)).tolist() == [0, 2, 4]


def _double(values):
    return values + values


def test_without_numba_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "data_pipelines.stages.compiled")
    with pytest.raises(ImportError, match=r"pip install -e '\.\[data\]'"):
        importlib.import_module("data_pipelines.stages.compiled")
