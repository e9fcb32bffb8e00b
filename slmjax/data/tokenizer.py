"""Tokenizers: text to ids and back, lossless. SentencePiece models, and tokenizer.json files of Hugging Face."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from slmjax import files
from slmjax.data.control_symbols import ASSISTANT, END, SYSTEM, USER
from slmjax.data.sentencepieces import SentencePieceModel, train_model
from slmjax.data.tokenizer_json import JsonModel
from slmjax.data.tokenizer_words import Encoded, ids_dtype, require_utf8

__all__ = ["ASSISTANT", "END", "SYSTEM", "USER", "Tokenizer", "train_tokenizer", "write_model"]


class Tokenizer:
    """A model of tokens. `decode(encode(text)) == text` for every text that UTF-8 can hold.

    `encode` never yields control ids: a text that spells "<|end|>" is ordinary text.

    Args:
      model: of a SentencePiece model file, or of a tokenizer.json.

    Attributes:
      sha256: of the model file, hexadecimal.
      dtype: of ids in arrays: uint16, or uint32 where the vocabulary needs it.

    Raises:
      ValueError: `model` is neither.
    """

    def __init__(self, model: bytes):
        self._model = JsonModel(model) if model.lstrip()[:1] == b"{" else SentencePieceModel(model)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._model.vocab_size
        self.pad_id: int = self._model.pad_id
        self.bos_id: int = self._model.bos_id
        self.eos_id: int = self._model.eos_id
        self.dtype = ids_dtype(self.vocab_size)

    @property
    def is_sentencepiece(self) -> bool:
        """Whether it is a SentencePiece model, and no tokenizer.json."""
        return isinstance(self._model, SentencePieceModel)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Reads a model file; environment variables and ~ in `path` are expanded.

        Raises:
          ValueError: the file cannot be read or is no tokenizer with pad, bos and eos.
        """
        path = Path(os.path.expandvars(path)).expanduser()
        try:
            model = path.read_bytes()
        except (OSError, ValueError) as error:  # the latter: a null byte in the path
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"cannot read the tokenizer model {str(path)!r}: {reason}") from error
        try:
            tokenizer = cls(model)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error
        ids = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
        missing = [name for name, token_id in ids.items() if token_id < 0]
        if missing:
            how = (
                "`slmjax tokenizer import` names or adds them"
                if path.suffix == ".json"
                else "train it with these ids switched on"
            )
            raise ValueError(f"the tokenizer model {path} lacks {', '.join(missing)}; {how}")
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, in one call. Raises ValueError for a lone surrogate, which UTF-8 cannot hold."""
        return self.encode_arrays(texts).lists()

    def encode_arrays(self, texts: Sequence[str] | pa.Array, *, framed: bool = False) -> Encoded:
        """Ids of each text as arrays: several times as fast as SentencePiece, with the same ids.

        Only of a unigram model they may differ from SentencePiece's, where two ways to cut a word are equally likely
        (`----`): there the sums that it rounds depend on what stands before the word, which here they do not.

        Args:
          texts: strings, or an Arrow array of them without nulls.
          framed: put bos before and eos after each.

        Raises:
          ValueError: a lone surrogate, which UTF-8 cannot hold.
        """
        return self._model.encode(*_bytes_of(texts), framed=framed)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control ids are left out, and bytes that are no UTF-8 become U+FFFD."""
        return self._model.decode([int(token_id) for token_id in ids])

    def piece(self, token_id: int) -> str:
        """Written form of one id, for people to read; in SentencePiece a space is U+2581."""
        return self._model.piece(token_id)

    def kind(self, token_id: int) -> Literal["control", "byte", "symbol", "piece"]:
        """What an id is: a control symbol (or unknown), a single byte, a symbol that is always whole, or learned."""
        return self._model.kind(token_id)

    def control_id(self, name: str) -> int:
        """Id of a control symbol such as "<|user|>". Raises ValueError when the model has none of that name."""
        token_id = self._model.control_id(name)
        if token_id is None:
            raise ValueError(
                f"the tokenizer has no control symbol {name!r}; train it with slmjax, or let `slmjax tokenizer import` "
                f"add {SYSTEM}, {USER}, {ASSISTANT} and {END}"
            )
        return token_id


def train_tokenizer(
    texts: Iterable[str],
    path: str | os.PathLike,
    *,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    user_symbols: Sequence[str] = (),
    character_coverage: float = 0.9995,
    split_digits: bool = True,
    pieces_across_words: bool = False,
    max_passages: int | None = None,
    seed: int = 0,
) -> Tokenizer:
    """Trains a lossless tokenizer on `texts`, writes it to `path` and returns it. The same input gives the same bytes.

    Ids: pad 0, unk 1 (never used: rare characters become bytes), bos 2, eos 3, the four chat symbols, user symbols,
    line breaks with indentation, 256 bytes, then learned pieces.

    Args:
      texts: passages of at most 4,000 characters are cut from them and held in memory.
      path: model file to write.
      vocab_size: number of ids, all kinds together.
      model_type: BPE (Sennrich et al. 2016, arXiv:1508.07909) or unigram (Kudo 2018, arXiv:1804.10959).
      user_symbols: strings that are always one piece, wherever they stand in a text.
      character_coverage: share of the characters of `texts` that get a piece of their own; the rest become bytes.
      split_digits: make every digit a token of its own, so that all numbers are written alike.
      pieces_across_words: let pieces span spaces and mix letters with punctuation: fewer tokens (3.7 bytes a token
        instead of 3.3 on Python source), with more meanings each.
      max_passages: train on a random sample of this many passages; None is all.
      seed: of that sample.

    Raises:
      ValueError: the text is too little or too varied for `vocab_size`, or is empty.
    """
    model = train_model(
        texts,
        vocab_size=vocab_size,
        model_type=model_type,
        user_symbols=user_symbols,
        character_coverage=character_coverage,
        split_digits=split_digits,
        pieces_across_words=pieces_across_words,
        max_passages=max_passages,
        seed=seed,
    )
    write_model(model, path)
    return Tokenizer.load(path)


def write_model(model: bytes, path: str | os.PathLike) -> None:
    """Writes a whole file or none."""
    with files.replacing(Path(path)) as partial:
        partial.write_bytes(model)


def _bytes_of(texts: Sequence[str] | pa.Array) -> tuple[bytes, np.ndarray]:
    """The bytes of strings, and where in them each starts and the last one ends."""
    try:
        array = pa.array(texts, pa.large_string())
    except UnicodeEncodeError:
        for text in texts:
            require_utf8(text)
        raise
    if len(array) == 0:
        return b"", np.zeros(1, np.int64)
    _, offsets, content = array.buffers()
    bounds = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    return bytes(memoryview(content or b"")[bounds[0] : bounds[-1]]), bounds - bounds[0]
