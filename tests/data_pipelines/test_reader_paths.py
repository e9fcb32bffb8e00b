"""A file is read once, however many paths lead to it."""

import io

import orjson
import pytest
from rich.console import Console

from data_pipelines.readers.inputs import check_read_once, list_inputs
from data_pipelines.run import run
from slmjax.config import (
    FilesSourceConfig,
    PipelineConfig,
    PythonFunctionsSourceConfig,
    PythonLibrarySourceConfig,
    SourceTreeConfig,
    SplitConfig,
    TrainTokenizerConfig,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """in/a.jsonl and in/b.jsonl by two links of files and one of the directory; the working directory is beside it."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/deeper").mkdir()
    for name in "ab":
        rows = [orjson.dumps({"text": f"{name} has number {i} of its {i * 7} texts"}) for i in range(40)]
        (tmp_path / f"in/{name}.jsonl").write_bytes(b"\n".join(rows))
    (tmp_path / "in/0.jsonl").symlink_to("b.jsonl")
    (tmp_path / "linked").symlink_to("in")
    (tmp_path / "z.jsonl").symlink_to("in/a.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "in"


SPELLINGS = ["in/a.jsonl", "./in/./a.jsonl", "in/deeper/../a.jsonl", "linked/a.jsonl", "z.jsonl", "in//a.jsonl"]


@pytest.mark.parametrize("spelled", [*SPELLINGS, "file://{folder}/a.jsonl", "{folder}/[a]*", "linked"])
def test_of_one_source_every_file_is_read_once_under_its_own_name(folder, spelled):
    spelled = spelled.format(folder=folder)
    for paths in ((spelled, str(folder)), (str(folder), spelled), (str(folder), *SPELLINGS)):
        inputs = list_inputs(FilesSourceConfig(paths=paths))
        assert [(file.address, file.name) for file in inputs] == [
            (str(folder / "a.jsonl"), "a.jsonl"),
            (str(folder / "b.jsonl"), "b.jsonl"),
        ]


def test_of_links_alone_the_first_is_read(folder):
    (folder / "1.jsonl").symlink_to("a.jsonl")
    (file,) = list_inputs(FilesSourceConfig(paths=("in/1.jsonl", "z.jsonl")))
    assert (file.address, file.name) == (str(folder / "1.jsonl"), "1.jsonl")


def test_what_is_passed_over_does_not_stand_for_its_links(tmp_path):
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/real.py").write_text("x = 1\n")
    (tmp_path / "shown.py").symlink_to(".hidden/real.py")
    (tmp_path / "gone.py").symlink_to("nowhere")
    (tmp_path / "lost.py").symlink_to("nowhere")
    inputs = list_inputs(SourceTreeConfig(paths=(str(tmp_path),)))
    assert {file.name: (file.skipped, file.format) for file in inputs} == {
        ".hidden/real.py": ("hidden", "text"),
        "gone.py": ("", "not_a_file"),
        "lost.py": ("", "not_a_file"),
        "shown.py": ("", "text"),
    }


def run_on(output, *sources):
    config = PipelineConfig(
        output_dir=str(output),
        sources=sources,
        tokenizer=TrainTokenizerConfig(vocab_size=340),
        split=SplitConfig(held_out_fraction=0.2),
        num_workers=1,
    )
    return run(config, console=Console(file=io.StringIO()))


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_a_file_of_two_sources_is_an_error(folder, spelled):
    sources = (
        FilesSourceConfig(paths=(str(folder),), name="all"),
        FilesSourceConfig(paths=(spelled,), name="part", format="jsonl", max_record_bytes=100),
    )
    with pytest.raises(
        ValueError, match=r"^sources all and part both read /.*\.jsonl; name it in the paths of one of "
    ):
        run_on(folder.parent / "out", *sources)


def test_two_sources_may_take_different_fields_of_a_file(folder):
    rows = [orjson.dumps({"title": f"title of {i}", "text": f"a text about {i} and {i * 7}"}) for i in range(40)]
    (folder / "both.jsonl").write_bytes(b"\n".join(rows))
    texts = FilesSourceConfig(paths=("in/both.jsonl",), name="texts")
    titles = FilesSourceConfig(paths=("linked/both.jsonl",), name="titles", text_field="title")
    manifest = run_on(folder.parent / "out", texts, titles)
    assert [(step.source, step.kept.documents) for step in manifest.steps] == [("texts", 40), ("titles", 40)]


def check(*sources):
    check_read_once(sources, [list_inputs(source) for source in sources])


def test_whole_files_are_the_same_whatever_reads_them(tmp_path):
    (tmp_path / "a.md").write_text("one text")
    (tmp_path / "b.py").write_text("x = 1\n")
    files = FilesSourceConfig(paths=(str(tmp_path),), text_field="body")
    check(files, SourceTreeConfig(paths=(str(tmp_path),), languages=("python",)))  # what is rejected or passed over
    with pytest.raises(ValueError, match=r"sources files and code both read .*a\.md"):
        check(files, SourceTreeConfig(paths=(str(tmp_path),)))
    with pytest.raises(ValueError, match=r"sources python and more both read "):
        check(PythonLibrarySourceConfig(), PythonLibrarySourceConfig(name="more", include_tests=True))
    check(PythonFunctionsSourceConfig(), PythonFunctionsSourceConfig(name="again", instruction="Write it again."))


def test_the_output_is_not_read_by_a_link_either(folder):
    first = run_on(folder.parent / "out", FilesSourceConfig(paths=("in",)))
    (folder / "own").symlink_to("../out")
    (folder / "tokens.txt").symlink_to("../out/manifest.json")
    again = run_on(folder.parent / "out", FilesSourceConfig(paths=("in", "in/own/documents")))
    assert (again.steps, again.splits) == (first.steps, first.splits)
