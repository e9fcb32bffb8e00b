"""What is installed, locked and shipped, and that no tracked file names a machine or a package index."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import slmjax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(text) for group in (PROJECT["dependencies"], *EXTRAS.values()) for text in group]


def locked():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", pin) for pin in pins), "names and versions only, no addresses"
    return dict(pin.split("==") for pin in pins)


def tracked_files():
    # safe.directory: a checkout that belongs to another user, as in a container, is read all the same.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_version_has_one_source():
    assert PROJECT["dynamic"] == ["version"]
    assert importlib.metadata.version("slmjax") == slmjax.__version__


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_requirement_is_locked_at_a_version_that_it_accepts(requirement):
    assert requirement.specifier.contains(locked()[canonicalize_name(requirement.name)])


def test_the_installed_package_offers_the_extras_and_the_command():
    metadata = importlib.metadata.metadata("slmjax")
    assert set(metadata.get_all("Provides-Extra") or ()) == set(EXTRAS)
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="slmjax")
    assert command.load().__module__ == "slmjax.cli"


def test_every_import_is_declared():
    """A package that is imported but came only with another one would vanish with it."""
    declared = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
    providers = importlib.metadata.packages_distributions()
    undeclared = set()
    for path in [*(ROOT / "slmjax").rglob("*.py"), *(ROOT / "data_pipelines").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            else:
                names = {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                if name not in ("slmjax", "data_pipelines"):
                    distributions = {canonicalize_name(found) for found in providers.get(name, [name])}
                    if not distributions & declared:
                        undeclared.add((path.relative_to(ROOT).as_posix(), name))
    assert not undeclared


def test_every_folder_with_code_is_a_package():
    """setuptools' find leaves a folder without __init__.py out of the wheel, and an editable install hides it."""
    folders = {path.parent for root in ("slmjax", "data_pipelines") for path in (ROOT / root).rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_types_and_tables_are_shipped():
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    package = Path(slmjax.__file__).parent
    found = {path for pattern in shipped["slmjax"] for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert found == others == {package / "py.typed", package / "kernels/hopper/attention_tilings.json"}


# Written in pieces, so that this file does not match itself.
FORBIDDEN = re.compile(
    "|".join(
        (
            r"(?<![\w.])/(?:ro" + r"ot|wo" + r"rk|ho" + r"me/\w+)/",
            r"/tmp/ba" + r"sh_jobs|\.\./sha" + r"red\b",
            r"--(?:extra-)?ind" + r"ex-url|--find-" + r"links|--trusted-" + r"host",
            r"py" + r"pi\.org/simple|pythonho" + r"sted\.org|/opt/(?:py" + r"pi|whe" + r"els)",
            r"(?:py" + r"pi|devpi|art" + r"ifactory|ne" + r"xus)\.[\w.-]*(?:internal|local|corp)\b",
        )
    )
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see /wo" + "rk/main/x", True),
        ("/ho" + "me/someone/x", True),
        ("pip install --ind" + "ex-url http://x", True),
        ("https://py" + "pi.org/simple", True),
        ("https://py" + "pi.internal/a", True),
        ("--no-emit-ind" + "ex-url", False),
        ("docs/network/roots", False),
        ("https://py" + "pi.org/project/jax", False),
    ],
)
def test_the_pattern_finds_what_it_should(text, found):
    assert bool(FORBIDDEN.search(text)) == found


def test_no_tracked_file_names_a_machine_path_or_a_package_index():
    matches = []
    for path in tracked_files():
        text = path.read_text("utf-8", errors="ignore")
        matches += [f"{path.relative_to(ROOT)}: {match[0]}" for match in FORBIDDEN.finditer(text)]
    assert not matches
