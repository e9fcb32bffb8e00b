"""Which side of the split a document falls on."""

import io
import textwrap
from pathlib import Path

import orjson
import zstandard
from rich.console import Console

from data_pipelines.manifest import Manifest
from data_pipelines.run import run
from data_pipelines.selecting import is_held_out
from slmjax.config import (
    ExistingTokenizerConfig,
    PipelineConfig,
    PythonFunctionsSourceConfig,
    PythonLibrarySourceConfig,
    SplitConfig,
    TrainTokenizerConfig,
)
from slmjax.data.tokenizer import Tokenizer


def held_out_rows(root: Path) -> list[dict]:
    with open(root / "held_out.jsonl.zst", "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        return [orjson.loads(line) for line in stream.read().splitlines()]


def quiet(config: PipelineConfig) -> Manifest:
    return run(config, console=Console(file=io.StringIO()))


def test_the_split_is_stable_and_keeps_its_fraction():
    config = SplitConfig(held_out_fraction=0.1)
    sides = {f"k{i}": is_held_out(config, f"k{i}") for i in range(20_000)}
    assert abs(sum(sides.values()) / len(sides) - 0.1) < 0.01  # five standard deviations
    more = SplitConfig(held_out_fraction=0.2)
    assert all(is_held_out(more, key) for key, side in sides.items() if side)
    other = SplitConfig(held_out_fraction=0.1, salt="other")
    assert sum(is_held_out(other, key) for key, side in sides.items() if side) < 400
    assert [is_held_out(config, key) for key in ("k9", "k10", "k39")] == [False, True, True]


def module_text(name: str) -> str:
    body = "\n\n".join(
        textwrap.dedent(f'''
        def {name}_{i}(value, other):
            """Compute the {name} number {i} of a value and of another value.

            More words.
            """
            result = value * {i} + len("{name}")
            return result - other
        ''')
        for i in range(3)
    )
    return f'"""Module {name}."""\n{body}'


def test_functions_of_held_out_modules_are_held_out(tmp_path, monkeypatch):
    library = tmp_path / "lib"
    (library / "package/test").mkdir(parents=True)
    names = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    for name in names:
        (library / f"package/{name}.py").write_text(module_text(name))
    (library / "package/__init__.py").write_text("")
    (library / "package/test/test_alpha.py").write_text(module_text("test"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    split = SplitConfig(held_out_fraction=0.4)
    common = {"split": split, "num_workers": 1}
    quiet(
        PipelineConfig(
            output_dir=str(tmp_path / "text"),
            sources=(PythonLibrarySourceConfig(),),
            tokenizer=TrainTokenizerConfig(vocab_size=400),
            **common,
        )
    )
    manifest = quiet(
        PipelineConfig(
            output_dir=str(tmp_path / "pairs"),
            sources=(PythonFunctionsSourceConfig(),),
            tokenizer=ExistingTokenizerConfig(path=str(tmp_path / "text/tokenizer.model")),
            **common,
        )
    )
    modules = {row["id"].removeprefix("python/") for row in held_out_rows(tmp_path / "text")}
    pairs = held_out_rows(tmp_path / "pairs")
    assert {row["id"].removeprefix("python_functions/").partition(":")[0] for row in pairs} == modules
    assert manifest.steps[0].kept.documents == 3 * len(names)
    assert not (tmp_path / "pairs/tokenizer.model").exists()
    assert manifest.tokenizer_sha256 == Tokenizer.load(tmp_path / "text/tokenizer.model").sha256
