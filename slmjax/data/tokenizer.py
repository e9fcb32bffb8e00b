"""SentencePiece tokenizers (Kudo & Richardson 2018, arXiv:1808.06226), lossless. The only importer of sentencepiece."""

import hashlib
import io
import itertools
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from slmjax.data.tokenizer_words import Encoded, WordEncoder, gathered, joined_pairs

_MODEL: Any = vars(sentencepiece_model_pb2)["ModelProto"]  # made when the module is imported

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"

# SentencePiece writes a space as U+2581, so a real U+2581 would come back as a space. It is written as _ESCAPE + "1",
# and a real _ESCAPE (private use, all but never seen in text) as _ESCAPE + "0".
_SPACE_MARK, _ESCAPE = "\u2581", "\uee00"

# Encoding needs about 100 bytes of memory a character, so a longer text is encoded in pieces of at most this length.
_MAX_CHARACTERS = 1 << 20
# Up to this length a BPE encodes faster than words are found.
_SHORT_BYTES = 4096
# The trainer rejects sentences with these two; they mark boundaries inside it. Text is cut at them.
_TRAINER_RESERVED = ("\t", "\u2585")
_PASSAGE_CHARACTERS = 4000

# One piece for line breaks and the indentation of the next line, less one space: that one goes to the word, so that
# " return" is the same piece at every depth. On Python source at 4096 pieces: 3.29 bytes a token against 3.04 for a
# separate line break and 3.22 for what BPE finds by itself.
_LINE_BREAKS = (
    *("\n", "\n\n", "\n\n\n"),
    *(breaks + _SPACE_MARK * spaces for breaks in ("\n", "\n\n") for spaces in range(1, 32, 2)),
)


class Tokenizer:
    """A trained SentencePiece model. `decode(encode(text)) == text` for every text that UTF-8 can hold.

    `encode` never yields control ids: a text that spells "<|end|>" is ordinary text.

    Attributes:
      sha256: of the model file, hexadecimal.
    """

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        self.pad_id: int = self._processor.pad_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        proto = _MODEL.FromString(model)
        joined = _joined_pairs(proto)
        self._is_bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
        self._words = (
            joined
            if joined is None
            else WordEncoder(joined, self._encode, frame=(self.bos_id, self.eos_id), dtype=self.dtype)
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Reads a model file; environment variables and ~ in `path` are expanded.

        Raises:
          ValueError: the file cannot be read or is no SentencePiece model with pad, bos and eos.
        """
        path = Path(os.path.expandvars(path)).expanduser()
        try:
            tokenizer = cls(path.read_bytes())
        except OSError as error:
            raise ValueError(f"cannot read the tokenizer model {path}: {error.strerror}") from error
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model (or is damaged): {error}") from error
        ids = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
        missing = [name for name, token_id in ids.items() if token_id < 0]
        if missing:
            raise ValueError(
                f"the tokenizer model {path} lacks {', '.join(missing)}; train it with these ids switched on"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, in one call. Raises ValueError for a lone surrogate, which UTF-8 cannot hold."""
        return self.encode_arrays(texts).lists()

    def encode_arrays(self, texts: Sequence[str] | pa.Array, *, framed: bool = False) -> Encoded:
        """Ids of each text as arrays: ten times as fast as SentencePiece, with the same ids.

        Only of a unigram model they may differ from SentencePiece's, where two ways to cut a word are equally likely
        (`----`): there the sums that it rounds depend on what stands before the word, which here they do not.

        Args:
          texts: strings, or an Arrow array of them without nulls.
          framed: put bos before and eos after each.

        Raises:
          ValueError: a lone surrogate, which UTF-8 cannot hold.
        """
        array = _array(texts)
        content, bounds = _bytes_of(array)
        if any(mark.encode() in content for mark in (_SPACE_MARK, _ESCAPE)):
            content, bounds = _bytes_of(pa.array(map(_escape, array.to_pylist()), pa.large_string()))
        if self._words is not None and (len(content) > _SHORT_BYTES or not self._is_bpe):
            return self._words.encode(content, bounds, framed=framed)
        rows = self._encode([content[start:stop] for start, stop in itertools.pairwise(bounds.tolist())])
        return gathered([[self.bos_id, *row, self.eos_id] for row in rows] if framed else rows, self.dtype)

    def _encode(self, texts: list[bytes]) -> list[list[int]]:
        """Ids of texts that are escaped."""
        if max(map(len, texts), default=0) <= _MAX_CHARACTERS:
            return self._processor.encode(texts, num_threads=1)
        return [
            list(itertools.chain(*self._processor.encode(list(_cut(text.decode())), num_threads=1))) for text in texts
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control ids are left out, and bytes that are no UTF-8 become U+FFFD."""
        return _unescape(self._processor.decode([int(token_id) for token_id in ids]))

    def piece(self, token_id: int) -> str:
        """Written form of one id, for people to read; a space is shown as U+2581."""
        return self._processor.id_to_piece(token_id)

    def control_id(self, name: str) -> int:
        """Id of a control symbol such as "<|user|>". Raises ValueError when the model has none of that name."""
        token_id = self._processor.piece_to_id(name)
        if not self._processor.is_control(token_id):
            raise ValueError(
                f"the tokenizer has no control symbol {name!r}; train it with slmjax, which adds "
                f"{SYSTEM}, {USER}, {ASSISTANT} and {END}"
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
    pieces_across_words: bool = False,
    max_passages: int | None = None,
    seed: int = 0,
) -> Tokenizer:
    """Trains a lossless tokenizer on `texts`, writes it to `path` and returns it. The same input gives the same bytes.

    Ids: pad 0, unk 1 (never used: rare characters become bytes), bos 2, eos 3, the four chat symbols, user symbols,
    line breaks with indentation, 256 bytes, then learned pieces. Digits are always single.

    Args:
      texts: passages of at most 4,000 characters are cut from them and held in memory.
      path: model file to write.
      vocab_size: number of ids, all kinds together.
      model_type: BPE (Sennrich et al. 2016, arXiv:1508.07909) or unigram (Kudo 2018, arXiv:1804.10959).
      user_symbols: strings that are always one piece, wherever they stand in a text.
      character_coverage: share of the characters of `texts` that get a piece of their own; the rest become bytes.
      pieces_across_words: let pieces span spaces and mix letters with punctuation: fewer tokens (3.7 bytes a token
        instead of 3.3 on Python source), with more meanings each.
      max_passages: train on a random sample of this many passages; None is all.
      seed: of that sample.

    Raises:
      ValueError: the text is too little or too varied for `vocab_size`, or is empty.
    """
    model = io.BytesIO()
    passages = _passages(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=passages if max_passages is None else iter(_sample(passages, max_passages, seed)),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=PAD,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            control_symbols=[SYSTEM, USER, ASSISTANT, END],
            user_defined_symbols=[*map(_written, user_symbols), "\t", *_LINE_BREAKS],
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            split_by_whitespace=not pieces_across_words,
            split_by_unicode_script=not pieces_across_words,
            max_sentence_length=8 * _PASSAGE_CHARACTERS,
            num_threads=1,  # unigram sums in the order of threads, so more of them would change the last digits
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"cannot train a tokenizer of vocab_size {vocab_size} on this text: {_reason(str(error))}"
        ) from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(model.getvalue())
    partial.replace(path)
    return Tokenizer.load(path)


def _reason(error: str) -> str:
    """What SentencePiece says, without the place in its source; where it says nothing, the check that failed."""
    check, _, reason = error.partition("] ")
    if reason.startswith("Vocabulary size too high"):
        return f"{reason} More text allows a larger vocab_size."
    if "sentences_.empty()" in check:
        return "the text is empty."
    return reason.replace(" with --character_coverage option", "") or f"it needs {check.partition('[')[2]}."


def _passages(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        _require_utf8(text)
        for reserved in _TRAINER_RESERVED[1:]:
            text = text.replace(reserved, _TRAINER_RESERVED[0])
        for part in text.split(_TRAINER_RESERVED[0]):
            for start in range(0, len(part), _PASSAGE_CHARACTERS):
                yield _escape(part[start : start + _PASSAGE_CHARACTERS])


def _sample(passages: Iterable[str], size: int, seed: int) -> list[str]:
    """A uniform sample in one pass (Vitter 1985, algorithm R)."""
    generator, sample = random.Random(seed), []
    for i, passage in enumerate(passages):
        if i < size:
            sample.append(passage)
        elif (place := generator.randrange(i + 1)) < size:
            sample[place] = passage
    return sample


def _require_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds a lone surrogate, {error.object[error.start : error.end]!r} at character {error.start}, "
            "which UTF-8 cannot hold; remove it first"
        ) from error


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most _MAX_CHARACTERS; before a line break where there is one, so that tokens stay the same."""
    start = 0
    while len(text) - start > _MAX_CHARACTERS:
        stop = text.rfind("\n", start + 1, start + _MAX_CHARACTERS)
        while stop > start + 1 and text[stop - 1] == "\n":
            stop -= 1
        stop = stop if stop > start else start + _MAX_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


def _array(texts: Sequence[str] | pa.Array) -> pa.Array:
    if isinstance(texts, pa.Array):
        return texts
    try:
        return pa.array(texts, pa.large_string())
    except UnicodeEncodeError:
        for text in texts:
            _require_utf8(text)
        raise


def _bytes_of(texts: pa.Array) -> tuple[bytes, np.ndarray]:
    """The bytes of an Arrow array of strings, and where in them each string starts and the last one ends."""
    texts = texts.cast(pa.large_string())
    if len(texts) == 0:
        return b"", np.zeros(1, np.int64)
    _, offsets, content = texts.buffers()
    bounds = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return bytes(memoryview(content or b"")[bounds[0] : bounds[-1]]), bounds - bounds[0]


def _joined_pairs(proto: Any) -> np.ndarray | None:
    """Which pairs of bytes stand next to each other in a piece; None for a model that must see whole texts.

    That is one that changes texts before it cuts them, or takes unknown characters in a row for one.
    """
    normalizer, kinds = proto.normalizer_spec, _MODEL.SentencePiece
    changes = normalizer.precompiled_charsmap or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
    pieces = [piece.piece for piece in proto.pieces if piece.type in (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)]
    if changes or not normalizer.escape_whitespaces or not proto.trainer_spec.byte_fallback:
        return None
    return joined_pairs(piece.replace(_SPACE_MARK, " ").encode() for piece in pieces)


def _written(symbol: str) -> str:
    return _escape(symbol).replace(" ", _SPACE_MARK)


def _escape(text: str) -> str:
    return text.replace(_ESCAPE, _ESCAPE + "0").replace(_SPACE_MARK, _ESCAPE + "1")


def _unescape(text: str) -> str:
    return text.replace(_ESCAPE + "1", _SPACE_MARK).replace(_ESCAPE + "0", _ESCAPE)
