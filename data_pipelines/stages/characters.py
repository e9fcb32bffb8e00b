"""Which kinds of characters a document is made of."""

import pyarrow as pa

from data_pipelines.stages import alphabet
from data_pipelines.stages.counting import count
from data_pipelines.stages.ranges import share
from data_pipelines.stages.texts import Texts
from slmjax.config.filters import CharacterFilterConfig


def measure(config: CharacterFilterConfig, texts: Texts) -> dict[str, pa.Array]:
    """Shares of letters and of ASCII digits among what is not white space; hash signs and ellipses for every word."""
    visible = texts.num_chars - texts.count_kind(alphabet.SPACE)
    digits = count((texts.data - 48) < 10, 1, 1, texts.starts, texts.ends)
    symbols = texts.hash_signs + texts.ellipses
    return {
        "alphabetic_share": pa.array(share(texts.count_kind(alphabet.LETTER), visible)),
        "digit_share": pa.array(share(digits, visible)),
        "symbols_per_word": pa.array(symbols / texts.words(config.splitter).per_document.clip(1)),
    }
