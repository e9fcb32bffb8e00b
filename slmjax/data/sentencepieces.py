"""SentencePiece models (Kudo & Richardson 2018, arXiv:1808.06226), lossless. The only importer of sentencepiece."""

import io
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from slmjax.data.control_symbols import ASSISTANT, BOS, END, EOS, PAD, SYSTEM, UNK, USER
from slmjax.data.tokenizer_words import Encoded, WordEncoder, gathered, ids_dtype, joined_pairs, require_utf8

ModelProto: Any = vars(sentencepiece_model_pb2)["ModelProto"]  # made when the module is imported
_KIND = ModelProto.SentencePiece

# SentencePiece writes a space as U+2581, so a real U+2581 would come back as a space. It is written as _ESCAPE + "1",
# and a real _ESCAPE (private use, all but never seen in text) as _ESCAPE + "0".
SPACE_MARK, _ESCAPE = "\u2581", "\uee00"
_ESCAPES = {SPACE_MARK: _ESCAPE + "1", _ESCAPE: _ESCAPE + "0"}

# Encoding needs about 100 bytes of memory a byte, so a longer text is encoded in pieces of at most this length.
_MAX_BYTES = 1 << 20
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
    *(breaks + SPACE_MARK * spaces for breaks in ("\n", "\n\n") for spaces in range(1, 32, 2)),
)


class SentencePieceModel:
    """What a `Tokenizer` asks of a SentencePiece model.

    Raises:
      ValueError: `model` is none.
    """

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise ValueError(f"is not a SentencePiece model (or is damaged): {error}") from error
        self.vocab_size: int = self._processor.get_piece_size()
        self.pad_id: int = self._processor.pad_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        proto = ModelProto.FromString(model)
        self._proto_kinds = [piece.type for piece in proto.pieces]
        self._is_bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
        self._dtype = ids_dtype(self.vocab_size)
        joined = _joined_pairs(proto)
        self._words = None
        if joined is not None:
            self._words = WordEncoder(joined, self._encode, frame=(self.bos_id, self.eos_id), dtype=self._dtype)

    def encode(self, content: bytes, bounds: np.ndarray, *, framed: bool) -> Encoded:
        """Ids of texts in UTF-8; text i is content[bounds[i] : bounds[i + 1]]."""
        if self._words is not None and (len(content) > _SHORT_BYTES or not self._is_bpe):
            return self._words.encode(content, bounds, framed=framed)
        rows = self._encode([content[start:stop] for start, stop in itertools.pairwise(bounds.tolist())])
        return gathered([[self.bos_id, *row, self.eos_id] for row in rows] if framed else rows, self._dtype)

    def _encode(self, texts: list[bytes]) -> list[list[int]]:
        content = b"\0".join(texts)
        if any(mark.encode() in content for mark in _ESCAPES):
            texts = [_escape(text.decode()).encode() for text in texts]
        if max(map(len, texts), default=0) <= _MAX_BYTES:
            return self._processor.encode(texts, num_threads=1)
        return [list(itertools.chain(*self._processor.encode(list(_cut(text)), num_threads=1))) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`."""
        return _unescape(self._processor.decode(ids))

    def piece(self, token_id: int) -> str:
        """Written form of one id."""
        return self._processor.id_to_piece(token_id)

    def control_id(self, name: str) -> int | None:
        """Id of a control symbol, None where there is none."""
        token_id = self._processor.piece_to_id(name)
        return token_id if self._processor.is_control(token_id) else None

    def kind(self, token_id: int) -> Literal["control", "byte", "symbol", "piece"]:
        """What an id is: a control symbol (or unknown), a single byte, a symbol that is always whole, or learned."""
        if self._processor.is_control(token_id) or self._processor.is_unknown(token_id):
            return "control"
        if self._processor.is_byte(token_id):
            return "byte"
        return "symbol" if self._proto_kinds[token_id] == _KIND.USER_DEFINED else "piece"


def train_model(
    texts: Iterable[str],
    *,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"],
    user_symbols: Sequence[str],
    character_coverage: float,
    split_digits: bool,
    pieces_across_words: bool,
    max_passages: int | None,
    seed: int,
) -> bytes:
    """A model file, as `slmjax.data.tokenizer.train_tokenizer` describes it."""
    controls = [SYSTEM, USER, ASSISTANT, END]
    for symbol in user_symbols:
        if not symbol or symbol in (PAD, UNK, BOS, EOS, *controls) or re.fullmatch(r"<0x[0-9A-F]{2}>", symbol):
            raise ValueError(f"user_symbols must not be empty, nor names of control symbols or bytes; got {symbol!r}")
        require_utf8(symbol)
    symbols = list(dict.fromkeys([*map(_written, user_symbols), "\t", *_LINE_BREAKS]))
    fixed = len((PAD, UNK, BOS, EOS)) + len(controls) + len(symbols) + 256
    if not fixed < vocab_size < 2**31:
        raise ValueError(
            f"vocab_size must be more than {fixed}, which are control symbols, user symbols, line breaks and bytes, "
            f"and less than 2**31, got {vocab_size}"
        )
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
            control_symbols=controls,
            user_defined_symbols=symbols,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=split_digits,
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
    return model.getvalue()


def _reason(error: str) -> str:
    """What SentencePiece says, without the place in its source; where it says nothing, the check that failed."""
    check, _, reason = error.partition("] ")
    if found := re.match(r"Vocabulary size too high .* value <= (\d+)", reason):
        return f"it gives at most {found[1]}. Lower vocab_size, or take more text."
    if found := re.match(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)", reason):
        return f"its characters, with symbols and bytes, need {found[1]}. Raise vocab_size or lower character_coverage."
    if "sentences_.empty()" in check:
        return "the text is empty."
    return reason or f"it needs {check.partition('[')[2]}."


def _passages(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        require_utf8(text)
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


def _cut(text: bytes) -> Iterator[bytes]:
    """Pieces of at most _MAX_BYTES; before a line break where there is one, so that tokens stay the same."""
    start = 0
    while len(text) - start > _MAX_BYTES:
        stop = text.rfind(b"\n", start + 1, start + _MAX_BYTES)
        while stop > start + 1 and text[stop - 1] == ord("\n"):
            stop -= 1
        if stop <= start:
            stop = start + _MAX_BYTES
            while text[stop] & 0xC0 == 0x80:  # within a character
                stop -= 1
        yield text[start:stop]
        start = stop
    yield text[start:]


def _joined_pairs(proto: Any) -> np.ndarray | None:
    """Which pairs of bytes stand next to each other in a piece; None for a model that must see whole texts.

    That is one that changes texts before it cuts them, or takes unknown characters in a row for one.
    """
    normalizer, found_in_texts = proto.normalizer_spec, (_KIND.NORMAL, _KIND.USER_DEFINED, _KIND.UNUSED)
    changes = normalizer.precompiled_charsmap or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
    if changes or not normalizer.escape_whitespaces or not proto.trainer_spec.byte_fallback:
        return None
    pieces = (piece.piece for piece in proto.pieces if piece.type in found_in_texts)
    return joined_pairs((piece.replace(SPACE_MARK, " ").encode() for piece in pieces), _ESCAPES)


def _written(symbol: str) -> str:
    return _escape(symbol).replace(" ", SPACE_MARK)


def _escape(text: str) -> str:
    return text.replace(_ESCAPE, _ESCAPES[_ESCAPE]).replace(SPACE_MARK, _ESCAPES[SPACE_MARK])


def _unescape(text: str) -> str:
    return text.replace(_ESCAPES[SPACE_MARK], SPACE_MARK).replace(_ESCAPES[_ESCAPE], _ESCAPE)
