"""The shipped data configs load, their parts make a pipeline with any source, and wrong values are refused."""

from pathlib import Path

import pytest

from slmjax.config import (
    ExistingTokenizerConfig,
    NearDedupConfig,
    PipelineConfig,
    PythonFunctionsSourceConfig,
    PythonLibrarySourceConfig,
    SplitConfig,
    TrainTokenizerConfig,
)
from slmjax.gin_loader import load

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_instruct_corpus_uses_the_tokenizer_and_the_split_of_the_text_corpus():
    text = load([CONFIGS / "quickstart_data.gin"]).config
    pairs = load([CONFIGS / "quickstart_instruct_data.gin"]).config
    assert isinstance(text, PipelineConfig)
    assert isinstance(text.tokenizer, TrainTokenizerConfig)
    assert pairs.tokenizer == ExistingTokenizerConfig(path=f"{text.output_dir}/tokenizer.model")
    assert isinstance(text.split, SplitConfig)
    assert pairs.split == text.split
    assert pairs.conversations
    assert not text.conversations


@pytest.mark.parametrize("part", sorted((CONFIGS / "data").glob("*.gin")), ids=lambda path: path.stem)
def test_every_part_makes_a_pipeline(part):
    of_turns = part.stem.startswith(("conversation", "instruction"))
    source = "ConversationFilesSourceConfig" if of_turns else "FilesSourceConfig"
    bindings = [
        'PipelineConfig.output_dir = "x"',
        f"PipelineConfig.sources = (@{source}(),)",
        f'{source}.paths = ("x",)',
        "PipelineConfig.tokenizer = @TrainTokenizerConfig()",
        "TrainTokenizerConfig.vocab_size = 1000",
    ]
    assert load([part], bindings).config.stages


def test_contradictory_configs_are_refused():
    with pytest.raises(ValueError, match="all text or all conversations"):
        PipelineConfig(
            output_dir="x",
            sources=(PythonLibrarySourceConfig(), PythonFunctionsSourceConfig()),
            tokenizer=TrainTokenizerConfig(vocab_size=400),
        )
    with pytest.raises(ValueError, match="output_dir must be a local directory, got 's3://bucket/x'"):
        PipelineConfig(
            output_dir="s3://bucket/x",
            sources=(PythonLibrarySourceConfig(),),
            tokenizer=TrainTokenizerConfig(vocab_size=400),
        )
    with pytest.raises(ValueError, match=r"names of sources must differ, got \['python', 'python'\]"):
        PipelineConfig(
            output_dir="x",
            sources=(PythonLibrarySourceConfig(), PythonLibrarySourceConfig(include_tests=True)),
            tokenizer=TrainTokenizerConfig(vocab_size=400),
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"worker_bytes": 1}, r"^PipelineConfig: worker_bytes must be at least 1048576 \(1 MiB\), got 1: "),
        ({"worker_bytes": (1 << 20) - 1}, "got 1048575"),
        ({"output_dir": ""}, "output_dir must name a directory, got ''; the one you are in is '.'"),
        ({"output_dir": "a\0b"}, r"output_dir must name a directory, got a null byte in 'a\\x00b'"),
        ({"output_dir": "\ud800"}, r"output_dir must be text without lone surrogates, got '\\ud800'"),
        ({"sources": (PythonLibrarySourceConfig(name="\ud800"),)}, "PythonLibrarySourceConfig: name must be text wi"),
    ],
)
def test_values_that_cannot_be_are_refused_in_words_of_the_config(wrong, message):
    fields = {
        "output_dir": "x",
        "sources": (PythonLibrarySourceConfig(),),
        "tokenizer": TrainTokenizerConfig(vocab_size=400),
        "worker_bytes": 1 << 20,
    }
    assert PipelineConfig(**fields).worker_bytes == 1 << 20
    with pytest.raises(ValueError, match=message):
        PipelineConfig(**{**fields, **wrong})


def test_signatures_have_a_bound():
    assert NearDedupConfig(bands=450, rows=20).rows == 20
    with pytest.raises(ValueError, match=r"^NearDedupConfig: bands \* rows, .* at most 16384, got 1000000000 \* 8$"):
        NearDedupConfig(bands=10**9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vocab_size": 300}, r"^TrainTokenizerConfig: vocab_size must be more than 300, which .* got 300$"),
        ({"vocab_size": 2**31}, r"and less than 2\*\*31, got 2147483648$"),
        ({"character_coverage": 0.9}, "character_coverage must lie between 0.98 and 1, got 0.9"),
    ],
)
def test_tokenizers_that_cannot_be_trained_are_known_before_reading(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainTokenizerConfig(**{"vocab_size": 400, **wrong})
