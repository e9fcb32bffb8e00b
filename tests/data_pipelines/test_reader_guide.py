"""The guide to sources: its configs can be loaded, and it and the guide to data name every reason that readers give."""

import re
from pathlib import Path

from slmjax.config import PipelineConfig
from slmjax.gin_loader import load

ROOT = Path(__file__).parents[2]
REQUIRED = """
PipelineConfig.output_dir = "out"
PipelineConfig.tokenizer = @ExistingTokenizerConfig()
ExistingTokenizerConfig.path = "model"
"""


def test_the_configs_of_the_guide_can_be_loaded(tmp_path):
    guide = (ROOT / "docs/guides/data_sources.md").read_text("utf-8")
    blocks = re.findall(r"```gin\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        whole = (
            block if "PipelineConfig.sources" in block else f"PipelineConfig.sources = (@HubSourceConfig(),)\n{block}"
        )
        path = tmp_path / f"{number}.gin"
        path.write_text(whole + REQUIRED)
        assert load([path], root=PipelineConfig).config.sources[-1].dataset == "owner/name"


def test_every_reason_is_in_the_guides():
    code = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "data_pipelines/readers").glob("*.py")))
    found = re.findall(r'(?:Reject|_rejected|DamagedError)\((?:[\w.]+, )?"(\w+)"', code)
    found += re.findall(r'(?:Skip\(|return )"([a-z_]+)"', code)
    assert len(set(found)) > 20
    guides = "".join((ROOT / f"docs/guides/{name}.md").read_text("utf-8") for name in ("data", "data_sources"))
    assert not {reason for reason in found if f"`{reason}`" not in guides}
