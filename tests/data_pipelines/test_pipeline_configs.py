"""The shipped data configs load, and their parts make a pipeline with any source."""

from pathlib import Path

import pytest

from slmjax.config import ExistingTokenizerConfig, PipelineConfig, SplitConfig, TrainTokenizerConfig
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
